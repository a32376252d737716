"""Backend ``cupy``: CUDA C++ compiled at run time by NVRTC, through CuPy. One ``<operator>.cu`` beside its launcher."""

from __future__ import annotations

__all__ = ["reason"]


def reason() -> str:
    """``ok``, or why CuPy cannot run kernels here; CuPy itself is installed."""
    import cupy

    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as problem:
        return f"no driver: {problem}"
    if not devices:
        return "no GPU"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as problem:  # CuPy loads NVRTC at its first use, and has its own ways to fail
        return f"no compiler: {problem}"
    return "ok"
