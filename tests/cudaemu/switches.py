"""Calls that a launch may leave out: one build shows of each barrier and each wait that it is needed.

    kernel = source(switched(text, r"__syncthreads\\(\\);"), name)
    kernel(grid, threads, arguments, left_out=2)  # goes on where the third barrier is

In PTX each barrier has its switch anyway, in the order of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count


def switched(text: str, pattern: str, numbers: Iterator[int] | None = None) -> str:
    """A text with a switch for each call that matches, numbered from 0 unless given. All lines stay where they are.

    What matches is a call with its semicolon, or the name of a vote: where that is left out, each thread is alone.
    """

    numbers = count() if numbers is None else numbers

    def behind_a_switch(found: re.Match[str]) -> str:
        number = next(numbers)
        if not found[0].endswith(";"):
            return f"runner::Vote{{{number}}}"
        return f"(runner::keeps({number}) ? void({found[0].removesuffix(';')}) : void());"

    return re.sub(pattern, behind_a_switch, text, flags=re.MULTILINE)
