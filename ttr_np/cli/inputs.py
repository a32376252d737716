"""What subcommands are given: text files, and names separated by commas."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from . import Refusal

__all__ = ["read", "split"]


def read(path: str) -> str:
    """A text file, which must be UTF-8 and hold something."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig" if data.startswith(b"\xef\xbb\xbf") else "utf-8")
    except OSError as problem:
        raise Refusal(f"cannot read {path}: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        place = problem.start + 3 * data.startswith(b"\xef\xbb\xbf")
        raise Refusal(f"{path} is not UTF-8: byte 0x{data[place]:02x} at offset {place}") from None
    if not text.strip():
        raise Refusal(f"{path} is empty")
    return text


def split(names: Iterable[str] | None) -> list[str] | None:
    """Names given in one option with commas, in several options, or both."""
    if names is None:
        return None
    found = [name.strip() for group in names for name in group.split(",") if name.strip()]
    if not found:
        raise Refusal("an option that takes names was given none")
    return found
