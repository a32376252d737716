"""NVRTC without a GPU: machine code of a real architecture, and what it needs of a multiprocessor."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

OPTIONS = (b"-std=c++17", b"-ftz=true")  # CuPy adds the second
# Attributes of .nv.info that hold a number per kernel, as the ELF of a cubin numbers them.
REGISTERS, FRAME = 0x2F, 0x11


class Needs(NamedTuple):
    """Of one kernel."""

    registers: int
    stack: int  # bytes: what does not fit in registers is spilled there
    shared: int  # bytes
    code: int  # bytes of instructions, which take about as long to compile


class Section(NamedTuple):
    """One section of an ELF file."""

    name: str
    offset: int
    size: int
    link: int


def missing() -> str:
    """Why nothing can be compiled here; empty where it can."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception as problem:  # a package or a library is not there, each says so in its own way
        return f"NVRTC cannot be used: {problem}"
    return ""


def machine_code(text: str, architecture: str) -> bytes:
    """A text as a cubin.

    Raises
    ------
    RuntimeError
        With the compiler's words.
    """
    return machine_code_and_words(text, architecture)[0]


def machine_code_and_words(text: str, architecture: str) -> tuple[bytes, str]:
    """The same, and what the compiler has to say of it."""
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], [])
    options = (*OPTIONS, f"--gpu-architecture={architecture}".encode())
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), list(options))
    words = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    nvrtc.nvrtcGetProgramLog(program, words)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(words.decode())
    code = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(code), words.decode()


def needs(cubin: bytes) -> Needs:
    """What the one kernel of a cubin needs."""
    sections = {section.name: section for section in sections_of(cubin)}
    (kernel,) = (name[6:] for name in sections if name.startswith(".text."))
    names = symbols(cubin, sections)
    found = {key: value for key, symbol, value in attributes(cubin, sections[".nv.info"]) if names[symbol] == kernel}
    shared = sections.get(f".nv.shared.{kernel}")
    return Needs(found[REGISTERS], found[FRAME], shared.size if shared else 0, sections[f".text.{kernel}"].size)


def word(cubin: bytes, start: int) -> str:
    """The string that begins at a place."""
    return cubin[start : cubin.index(b"\0", start)].decode()


def sections_of(cubin: bytes) -> list[Section]:
    """All sections."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    return [Section(word(cubin, headers[names][4] + header[0]), *header[4:7]) for header in headers]


def symbols(cubin: bytes, sections: dict[str, Section]) -> list[str]:
    """Names of the symbols, in order."""
    table, names = sections[".symtab"], sections[".strtab"]
    starts = (struct.unpack_from("<I", cubin, table.offset + i)[0] for i in range(0, table.size, 24))
    return [word(cubin, names.offset + start) for start in starts]


def attributes(cubin: bytes, section: Section) -> Iterator[tuple[int, int, int]]:
    """Those of ``.nv.info`` that pair a symbol with a number: (attribute, symbol, number)."""
    at = section.offset
    while at < section.offset + section.size:
        kind, key, size = struct.unpack_from("<BBH", cubin, at)
        if kind == 4:  # a length and so many bytes; the other kinds hold two bytes
            if size >= 8:
                yield (key, *struct.unpack_from("<II", cubin, at + 4))
            at += size
        at += 4
