"""Files of memories: an .npz archive of arrays with a header in JSON.

    header.json     what it is, which version wrote it, the layer, and the tree that the arrays hang on
    0.npy, 1.npy    the arrays, as NumPy writes them: ``np.load`` opens such a file too

A file is written beside its place, flushed to the disk and then moved there in one step: whoever is interrupted leaves
the old file whole. Reading runs no code of the file: JSON, and arrays without objects.
"""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .merging import GramDecay, LogDecay, Product
from .notation import STATES
from .routes import Carried

__all__ = ["read", "write"]

FORMAT, VERSION = "ttr_np memory", 1
HEADER = "header.json"
TYPES: dict[str, Any] = {kind.__name__: kind for kind in [*STATES.values(), Carried, LogDecay, GramDecay, Product]}


def hang(x: Any, arrays: list[np.ndarray]) -> Any:
    """A tree of tuples, lists, dicts and arrays as JSON; an array is its place in ``arrays``.

    Raises
    ------
    TypeError
        If something in it is no array.
    """
    if x is None or isinstance(x, (str, bool, int)):
        return x
    if isinstance(x, dict):
        return {name: hang(part, arrays) for name, part in x.items()}
    if isinstance(x, list):
        return [hang(part, arrays) for part in x]
    if isinstance(x, tuple):
        return {"type": type(x).__name__, "parts": [hang(part, arrays) for part in x]}
    x = np.asarray(x)
    if x.dtype.hasobject or x.dtype.kind == "V":
        raise TypeError(f"a {x.dtype} array cannot be written to a file of a memory")
    arrays.append(x)
    return {"array": len(arrays) - 1}


def pick(x: Any, arrays: dict[int, np.ndarray]) -> Any:
    """The tree that ``hang`` made JSON of."""
    if isinstance(x, list):
        return [pick(part, arrays) for part in x]
    if not isinstance(x, dict):
        return x
    if x.keys() == {"array"}:
        return arrays[x["array"]]
    if x.keys() == {"type", "parts"}:
        parts = [pick(part, arrays) for part in x["parts"]]
        return tuple(parts) if x["type"] == "tuple" else TYPES[x["type"]](*parts)
    return {name: pick(part, arrays) for name, part in x.items()}


def write(path: Any, content: dict[str, Any]) -> None:
    """Write a tree to a file, all of it or nothing."""
    arrays: list[np.ndarray] = []
    tree = hang(content, arrays)
    header = {"format": FORMAT, "version": VERSION, "written by": f"ttr_np {__version__}", "content": tree}
    place = Path(os.path.realpath(path))
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}.part")
    try:
        with open(draft, "xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(HEADER, json.dumps(header, indent=1))
                for i, x in enumerate(arrays):
                    with archive.open(f"{i}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, x, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, place)
    finally:
        draft.unlink(missing_ok=True)
    flush_folder(place.parent)


def flush_folder(folder: Path) -> None:
    """Ask the disk to keep a renamed file, where folders can be flushed (not on Windows)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read(path: Any) -> dict[str, Any]:
    """The tree in a file.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be read.
    ValueError
        If it is no file of a memory, is damaged, or was written by a later version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(archive.read(HEADER))
            check_header(path, header)
            names = [name for name in archive.namelist() if name != HEADER]
            arrays = {int(name.removesuffix(".npy")): read_array(archive, name) for name in names}
            return pick(header["content"], arrays)
    except OSError:
        raise
    except Exception as problem:  # a damaged archive fails in as many ways as it has bytes
        if isinstance(problem, ValueError) and str(path) in str(problem):
            raise
        reason = f"no {HEADER} in it" if isinstance(problem, KeyError) and HEADER in str(problem) else problem
        raise ValueError(f"{path} is no file of a memory, or it is damaged: {reason}") from problem


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; the archive checks its sum at the end."""
    with archive.open(name) as member:
        x = np.lib.format.read_array(member, allow_pickle=False)
        member.read()
    return x


def check_header(path: Any, header: Any) -> None:
    """Refuse what another program, or a later version, wrote."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of a memory: its {HEADER} has another format")
    if header["version"] != VERSION:
        raise ValueError(
            f"{path} has version {header['version']} of the format, this ttr_np reads {VERSION}; "
            f"it was written by {header.get('written by')}"
        )
