"""Calls that a launch may leave out: one build shows of each barrier and each wait that it is needed.

    kernel = source(switched(text, r"__syncthreads\\(\\);"), name)
    kernel(grid, threads, arguments, left_out=2)  # goes on where the third barrier is

In PTX each barrier has its switch anyway, in the order of the text.
"""

from __future__ import annotations

import re
from itertools import count


def switched(text: str, pattern: str) -> str:
    """A text with a switch for each call, semicolon included, that matches. All lines stay where they are."""
    number = count()

    def behind_a_switch(found: re.Match[str]) -> str:
        return f"(runner::keeps({next(number)}) ? void({found[0].removesuffix(';')}) : void());"

    return re.sub(pattern, behind_a_switch, text, flags=re.MULTILINE)
