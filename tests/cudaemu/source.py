"""The first route: the text of a CUDA C++ kernel through g++."""

from __future__ import annotations

from . import build
from .launch import Kernel

FAST = ("-fwrapv", "-ffp-contract=fast")
CHECK = ("-gdwarf-4", "-g1", "-ffp-contract=fast")
CHECK += ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")
CHECK += ("-fsanitize=signed-integer-overflow,bounds,shift,integer-divide-by-zero,alignment",)


def level(text: str) -> str:
    """How far g++ optimises: -Og contracts as -O1 does, in half of the time, and most texts run for less than that.

    Not so where products are under way: each then needs its registers for itself, as the loops of -O1 give them.
    """
    return "-O1" if "begin_products" in text else "-Og"


def source(text: str, name: str, check: bool = True, flush: bool = True) -> Kernel:
    """Build one ``extern "C"`` kernel of a text.

    Parameters
    ----------
    text
        CUDA C++ as NVRTC takes it.
    name
        Of the kernel.
    check
        Whether launches may look at every load and store.
    flush
        Whether denormal numbers are zeros, as CuPy asks of NVRTC.
    """
    unit = f'#line 1 "kernel.cu"\n{text}\nRUNNER_EXPORT({name})\n'
    return Kernel(build.library("kernel.h", unit, (level(text), *(CHECK if check else FAST))), flush=flush)
