"""Compiled kernels on disk: one file per kernel, dtype and processor, which is right, or is not there.

Numba keeps an index beside numbered files. Two processes that fill a cold cache can leave an index that calls one's
file by the other's name; a file that was cut short raises wherever it is read; and an edit of a file that a kernel
imports goes unnoticed. Here a file is named by all that its content depends on, and ends with its checksum.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import njit

from ._compile import OPTIONS

__all__ = ["compiled", "kept"]

HERE = Path(__file__).parents[1]  # kernels also take numbers and functions from the solvers


@cache
def sources() -> str:
    """What tells one state of the files that kernels are made of from another."""
    contents = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(HERE.rglob("*.py"))))
    return repr((numba.__version__, numba.config.OPT, numba.config.BOUNDSCHECK, contents.hexdigest()))


def digest(*parts: str) -> str:
    """A name that no other parts have."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


class Files:
    """Numba's interface to the files of one kernel: ``load`` and ``save`` what belongs to a key."""

    def __init__(self, folder: str, kernel: str) -> None:
        self.folder, self.kernel = Path(folder), kernel

    def path(self, key: Any) -> Path:
        """Where the code for a key is."""
        return self.folder / f"{self.kernel}-{digest(repr(key))}-{digest(sources())}.nbc"

    def load(self, key: Any) -> Any:
        """What was saved, or None: where there is no file, or what there is has no valid checksum."""
        try:
            content = self.path(key).read_bytes()
        except OSError:
            return None
        body, sum_ = content[:-32], content[-32:]
        return pickle.loads(body) if hashlib.sha256(body).digest() == sum_ else None

    def save(self, key: Any, data: Any) -> None:
        """Write a whole file or none, and remove those of other states of the sources."""
        body, path = numba.core.serialize.dumps(data), self.path(key)
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(body + hashlib.sha256(body).digest())
            os.replace(file.name, path)
            for old in self.folder.glob(f"{self.kernel}-{digest(repr(key))}-*.nbc"):
                if old != path:
                    old.unlink(missing_ok=True)
        except OSError as problem:  # a full disk, say: what was compiled is there all the same
            warnings.warn(f"{self.kernel} is compiled but not kept: {problem}", RuntimeWarning, stacklevel=2)

    def flush(self) -> None:
        """Forget what was saved."""
        for path in self.folder.glob(f"{self.kernel}-*.nbc"):
            path.unlink(missing_ok=True)


def kept(dispatcher: Any) -> Any:
    """Let a function that Numba caches use these files."""
    own = dispatcher._cache
    own._cache_file = Files(own.cache_path, own._impl.filename_base)
    return dispatcher


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a kernel: when it is first called, without the interpreter lock, kept on disk."""
    try:
        return kept(njit(cache=True, **OPTIONS)(function))
    except RuntimeError:  # Numba found no folder it may write to
        words = "no folder to keep compiled kernels in, so every process compiles anew: set NUMBA_CACHE_DIR"
        warnings.warn(words, RuntimeWarning, stacklevel=2)
        return njit(**OPTIONS)(function)
