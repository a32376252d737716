"""C++ texts to libraries, made once and shared by all test processes."""

from __future__ import annotations

import getpass
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

ON_GPU = os.environ.get("TTR_TESTS_ON") == "gpu"  # then kernels run on the device, and nothing is looked at
HERE = Path(__file__).parent
BASE = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w")
BASE += ("-march=x86-64-v3", "-fno-threadsafe-statics")
LINK = ("-shared", "-Wl,-Bsymbolic", *(("-fuse-ld=gold",) if shutil.which("ld.gold") else ()))  # a third of the time


def missing() -> str:
    """Why nothing can be built here; empty where it can, and where tests run on a GPU instead."""
    if ON_GPU:
        return ""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return f"the runner of CUDA kernels needs Linux on x86-64, not {platform.system()} on {platform.machine()}"
    return "" if shutil.which("g++") else "the runner of CUDA kernels needs g++"


@cache
def folder() -> Path:
    """Where libraries are kept between runs: a folder of this user, named by what this package says."""
    texts = b"".join(path.read_bytes() for path in sorted(HERE.iterdir()) if path.suffix in (".h", ".cpp", ".py"))
    name = f"cudaemu-{getpass.getuser()}-{hashlib.sha256(texts).hexdigest()[:12]}"
    place = Path(tempfile.gettempdir()) / name
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise PermissionError(f"{place} belongs to another user")
    return place


def compiler(*arguments: object) -> None:
    """Run g++; its words are the error."""
    done = subprocess.run(["g++", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[-4000:]}")


def once(made: Path, *arguments: object) -> Path:
    """What g++ makes of a file of this package, made unless it is there."""
    if not made.exists():
        own = made.with_suffix(f".{os.getpid()}")
        compiler(*BASE, *arguments, "-o", own)
        own.replace(made)  # two processes may build it at once: each sees a whole file or none
    return made


@cache
def runtime() -> Path:
    """The runtime as an object file."""
    return once(folder() / "runtime.o", "-O2", "-g1", "-c", HERE / "runtime.cpp")


@cache
def precompiled(header: str, flags: tuple[str, ...]) -> Path:
    """Where g++ finds one of our headers, and all of the standard library in it, read already by the same flags."""
    place = folder() / digest(header, *flags)
    place.mkdir(exist_ok=True)
    once(place / f"{header}.gch", *flags, "-x", "c++-header", HERE / header)
    return place


def digest(*words: str) -> str:
    """A name for what is made of texts and flags."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:20]


def library(header: str, text: str, flags: tuple[str, ...]) -> Path:
    """A text, one of our headers before it, and the runtime as one library."""
    made = folder() / f"{digest(header, text, *flags)}.so"
    if not made.exists():
        own = made.with_suffix(f".{os.getpid()}.cpp")
        own.write_text(f'#include "{header}"\n{text}')
        code, linked = own.with_suffix(".o"), own.with_suffix(".so")
        compiler(*BASE, *flags, "-I", precompiled(header, flags), "-c", own, "-o", code)
        compiler(*LINK, code, runtime(), "-o", linked, "-lm", "-lrt", "-ldl")
        linked.replace(made)
        own.unlink(), code.unlink()
    return made
