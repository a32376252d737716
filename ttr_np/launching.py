"""A step of a ``Stream`` on a GPU: launches whose arguments were packed once.

A token that lies in memory as the held one does is read where it is, and an answer is written where it is wanted: then
a step is its launches and nothing else. It asks the device for no memory and never waits for it, so that CUDA graphs
can record it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .calling import on_device

__all__ = ["Launches"]


def alike(x: Any, held: Any) -> bool:
    """Whether an array may stand in another's place in a launch."""
    same = type(x) is type(held) and x.dtype == held.dtype and x.shape == held.shape and x.strides == held.strides
    return same and x.dtype.kind != "c"  # kernels know complex numbers as two arrays


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
        self.moved = [(old, new) for old, new in zip(state, after, strict=True) if new is not old]

    def serves(self, name: str, x: Any) -> bool:
        """Whether an array of a token can be read where it is."""
        return alike(x, self.tokens[name]) and any(self.places[name])

    def __call__(self, token: Mapping[str, Any], out: Any = None) -> Any:
        """One step: what is in the token takes the place of what is held; the answer, in ``out`` if it fits."""
        others = dict(token)
        if out is not None and alike(out, self.answer) and not any(np.may_share_memory(out, x) for x in token.values()):
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
    if on_device(into) and not on_device(x):
        into.set(np.asarray(x, into.dtype, order="C"))
    elif on_device(x) and not on_device(into):
        raise TypeError("the token is on the GPU, this stream keeps its arrays on the CPU")
    else:
        into[...] = x
