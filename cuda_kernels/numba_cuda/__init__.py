"""Backend ``numba-cuda``: the readable GPU form, Python functions compiled by numba-cuda (never Numba's own target)."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

import numpy as np

__all__ = ["import_compiler", "reason"]


def import_compiler() -> Any:
    """``numba.cuda`` with all that it compiles with, which otherwise waits for the first kernel.

    numba-cuda 0.30 asks NumPy for ``row_stack``, a name that NumPy 2.5 no longer has: it is lent for the time of the
    import. What numba-cuda hears of its own future there is nothing that users can mend.
    """
    lent = not hasattr(np, "row_stack")
    if lent:
        np.row_stack = np.vstack
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import_module("numba_cuda")  # without it, numba.cuda would be Numba's own target
            import_module("numba.cuda.cudaimpl")
    finally:
        if lent:
            del np.row_stack
    return import_module("numba.cuda")


def reason() -> str:
    """``ok``, or why numba-cuda cannot run kernels here; it is installed."""
    from numba import config

    if config.ENABLE_CUDASIM:
        return "Numba's simulator is switched on (NUMBA_ENABLE_CUDASIM), which is no GPU"
    try:
        cuda = import_compiler()
    except Exception as problem:  # a compiler for other versions of its packages fails in its own ways
        return f"numba-cuda cannot compile with the packages that are installed: {type(problem).__name__}: {problem}"
    if "numba_cuda" not in (cuda.__file__ or ""):
        return f"numba.cuda is Numba's own target ({cuda.__file__}), not numba-cuda"
    if not cuda.is_available():
        words = str(cuda.cuda_error() or "no GPU").split("\n")
        return "no driver: " + " ".join(word.strip() for word in words if word.strip(" :"))
    return "ok"
