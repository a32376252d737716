"""Measurements that come with the package.

``co2_weekly.csv``: weekly atmospheric CO2 at Mauna Loa, 1958-03-29 to 2001-12-29, parts per million; 2,284 rows, 59 of
them empty: real gaps, not zeros. Source: Keeling and Whorf 2004, Carbon Dioxide Information Analysis Center. Licence:
public domain.
"""

from pathlib import Path

__all__ = ["co2_weekly"]


def co2_weekly() -> Path:
    """Where the weekly CO2 series of Mauna Loa is: columns ``date`` and ``co2``.

    Returns
    -------
    pathlib.Path
        A CSV file of the package.

    Examples
    --------
    >>> from ttr_np.data import co2_weekly
    >>> len(co2_weekly().read_text().splitlines())
    2285
    """
    return Path(__file__).with_name("co2_weekly.csv")
