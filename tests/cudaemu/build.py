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
BASE = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w", f"-I{HERE}")
BASE += ("-march=x86-64-v3", "-fno-threadsafe-statics")


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


@cache
def runtime() -> Path:
    """The runtime as an object file."""
    made = folder() / "runtime.o"
    if not made.exists():
        own = made.with_suffix(f".{os.getpid()}")
        compiler("-O2", "-g1", *BASE, "-c", HERE / "runtime.cpp", "-o", own)
        own.replace(made)  # two processes may build it at once: each sees a whole file or none
    return made


def library(text: str, flags: tuple[str, ...]) -> Path:
    """A text and the runtime as one library."""
    key = hashlib.sha256("\0".join((text, *flags)).encode()).hexdigest()[:20]
    made = folder() / f"{key}.so"
    if not made.exists():
        own = made.with_suffix(f".{os.getpid()}.cpp")
        own.write_text(text)
        code, linked = own.with_suffix(".o"), own.with_suffix(".so")
        compiler(*BASE, *flags, "-c", own, "-o", code)
        compiler("-shared", "-Wl,-Bsymbolic", code, runtime(), "-o", linked, "-lm", "-lrt", "-ldl")
        linked.replace(made)
        own.unlink(), code.unlink()
    return made
