"""Room for pairs to come: to append a pair to a long cache costs that pair, not the cache.

The keys and values of a cache are slots of longer arrays, which the caches that it grows into share. No slot is written
twice: only a cache that ends where the arrays are filled to may grow in place, and every other one begins new arrays
with a copy. So all caches stay what they are, however many are grown from one.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

from ..calling import recording
from ..notation import CacheState

__all__ = ["grown"]


class Room:
    """Arrays of keys and values, filled up to some slot.

    Parameters
    ----------
    state
        The cache that they begin with.
    slots
        How many pairs they can hold.
    """

    def __init__(self, state: CacheState, slots: int) -> None:
        self.k, self.v = spacious(state.k, slots), spacious(state.v, slots)
        self.slots, self.filled, self.lock = slots, state.k.shape[-2], Lock()
        self.in_order = bool(np.all(state.position[..., 1:] - state.position[..., :-1] == 1))  # without a gap

    def claims(self, end: int, pairs: int) -> bool:
        """Whether a cache that ends there may grow by so many pairs; if so, their slots are now its own."""
        with self.lock:
            if end != self.filled or end + pairs > self.slots:
                return False
            self.filled = end + pairs
        return True

    def view(self, begin: int, end: int) -> tuple[Any, Any]:
        """Keys and values of some slots; NumPy lets nobody write what other caches hold too."""
        views = self.k[..., begin:end, :], self.v[..., begin:end, :]
        for x in views:
            if isinstance(x, np.ndarray):
                x.flags.writeable = False
        places[id(views[0])] = Place(self, end, ref(views[1]), ref(views[0], left(id(views[0]))))
        return views


class Place(NamedTuple):
    """Where a cache ends in its room, while its arrays live."""

    room: Room
    end: int
    v: ref[Any]
    k: ref[Any]


places: dict[int, Place] = {}  # by the identity of the keys


def left(key: int) -> Any:
    """What is done when keys are no more."""
    return lambda _: places.pop(key, None)


def spacious(x: Any, slots: int) -> Any:
    """The rows of an array, and room behind them."""
    wide = np.empty_like(x, shape=x.shape[:-2] + (slots, x.shape[-1]), order="C")
    wide[..., : x.shape[-2], :] = x
    return wide


def claimed(state: CacheState, new: int) -> tuple[Room, int] | None:
    """A room where a cache ends and so many slots behind it are its own; None if it has empty slots."""
    pairs, place = state.k.shape[-2], places.get(id(state.k))
    if place and place.v() is state.v and place.room.claims(place.end, new):
        return place.room, place.end
    if not np.all(state.position >= 0):
        return None
    room = Room(state, (pairs + new) * 3 // 2 + 16)
    room.claims(pairs, new)
    return room, pairs


def grown(state: CacheState, k: Any, v: Any, window: int | None) -> tuple[Any, Any] | None:
    """Keys and values of a cache with those of new pairs behind them, only the last ones if there is a window.

    None where they must be copied: behind an empty cache, with which nobody may ever go on; where slots are empty, or a
    window looks at positions with gaps; and while a CUDA graph is recorded, as every launch would write the same slots.
    """
    pairs, new = state.k.shape[-2], k.shape[-2]
    found = None if not pairs or recording({"": state.k}) else claimed(state, new)
    if found is None or window is not None and not found[0].in_order:
        return None
    room, end = found
    room.k[..., end : end + new, :], room.v[..., end : end + new, :] = k, v
    return room.view(end - pairs if window is None else max(end - pairs, end + new - window), end + new)
