"""Five experiments without training: each makes one claim of the paper visible in numbers.

Each function returns a dict of plain numbers, strings and lists, the same for the same seed: its ``settings``, its
``panels`` (a horizontal axis, a measure, and one row per method with mean, standard error over repeats and, where there
is one, the closed form as ``theory``) and its ``finding``, the sentence that sums the numbers up.
``ttr experiment NAME`` prints it.

[1] Wang, Shi, Fox (2025), Test-time regression, arXiv:2501.12352
"""

from .capacity import capacity
from .conditioning import conditioning
from .drift import drift
from .mqar import mqar
from .tracking import tracking

__all__ = ["capacity", "conditioning", "drift", "mqar", "tracking"]
