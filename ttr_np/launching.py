"""A step of a ``Stream`` on a GPU: launches whose arguments were packed once.

A token that lies in memory as the held one does is read where it is, and an answer is written where it is wanted: then
a step is its launches and nothing else. It asks the device for no memory and never waits for it, so that CUDA graphs
can record it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .calling import on_device

__all__ = ["Launches"]


class Form(NamedTuple):
    """What an array has in common with those that may stand in its place in a launch."""

    kind: type
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    replaced: bool  # whether others may stand there at all: kernels know complex numbers as two arrays

    def fits(self, x: Any) -> bool:
        """Whether an array may."""
        return (
            type(x) is self.kind
            and x.dtype == self.dtype
            and x.shape == self.shape
            and x.strides == self.strides
            and self.replaced
        )


def form_of(held: Any, launched: bool) -> Form:
    """The form of a held array."""
    return Form(type(held), held.dtype, held.shape, held.strides, launched and held.dtype.kind != "c")


class Launches:
    """What a stream on a GPU does over and over.

    Parameters
    ----------
    launches
        Packed by the backend on the held arrays.
    tokens
        The held arrays of a token by name.
    answer
        Where the launches write.
    state, after
        The memory as they read it, and as they leave it: fields that are not the same array are copied back.
    """

    def __init__(self, launches: Sequence[Any], tokens: Mapping[str, Any], answer: Any, state: Any, after: Any) -> None:
        self.launches, self.tokens, self.answer, self.state = launches, tokens, answer, state
        held = {**tokens, "out": answer}
        self.places = {name: [launch.places(x) for launch in launches] for name, x in held.items()}
        self.forms = {name: form_of(x, any(self.places[name])) for name, x in held.items()}
        self.moved = [(old, new) for old, new in zip(state, after, strict=True) if new is not old]

    @property
    def reads_all(self) -> bool:
        """Whether the launches read the held tokens, and no copies of them that were made to be launched with."""
        return all(any(self.places[name]) for name, x in self.tokens.items() if x.size)

    def serves(self, name: str, x: Any) -> bool:
        """Whether an array of a token can be read where it is."""
        return self.forms[name].fits(x)

    def apart(self, x: Any, others: Iterable[Any]) -> bool:
        """Whether an array that fits shares no memory with others that fit: each lies in one piece."""
        address = self.launches[0].machine.address
        begin = address(x)
        return begin is None or all(
            (other := address(y)) is None or other + y.nbytes <= begin or begin + x.nbytes <= other for y in others
        )

    def __call__(self, token: Mapping[str, Any], out: Any = None) -> Any:
        """One step: what is in the token takes the place of what is held; the answer, in ``out`` if it fits."""
        others = dict(token)
        if out is not None and self.serves("out", out) and self.apart(out, token.values()):
            others["out"] = out
        for i, launch in enumerate(self.launches):
            launch({place: x for name, x in others.items() for place in self.places[name][i]})
        for old, new in self.moved:
            np.copyto(old, new)
        return others.get("out", self.answer)


def send(x: np.ndarray, into: Any) -> None:
    """Copy an array into a held one of the same shape, wherever they are.

    Raises
    ------
    TypeError
        If it would have to leave the GPU unasked.
    """
    if type(x) is type(into) or on_device(into) == on_device(x):
        into[...] = x
    elif on_device(x):
        raise TypeError("the token is on the GPU, this stream keeps its arrays on the CPU")
    else:
        into.set(np.asarray(x, into.dtype, order="C"))
