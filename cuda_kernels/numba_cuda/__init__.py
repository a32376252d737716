"""Backend ``numba-cuda``: the readable GPU form, Python functions compiled by numba-cuda (never Numba's own target)."""

from __future__ import annotations

from importlib import import_module

__all__ = ["reason"]


def reason() -> str:
    """``ok``, or why numba-cuda cannot run kernels here; it is installed."""
    from numba import config, cuda

    if config.ENABLE_CUDASIM:
        return "Numba's simulator is switched on (NUMBA_ENABLE_CUDASIM), which is no GPU"
    if "numba_cuda" not in (cuda.__file__ or ""):
        return f"numba.cuda is Numba's own target ({cuda.__file__}), not numba-cuda"
    if not cuda.is_available():
        words = str(cuda.cuda_error() or "no GPU").split("\n")
        return "no driver: " + " ".join(word.strip() for word in words if word.strip(" :"))
    try:
        import_module("numba.cuda.cudaimpl")  # else the first kernel would: numba-cuda 0.30 fails there on NumPy 2.5
    except Exception as problem:  # in its own ways
        return f"numba-cuda cannot compile with the packages that are installed: {type(problem).__name__}: {problem}"
    return "ok"
