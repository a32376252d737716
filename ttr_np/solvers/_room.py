"""Room for pairs to come: to append a pair to a long cache costs that pair, not the cache.

The pairs of a cache are slots of longer arrays, which the caches that it grows into share. No slot is written twice:
only a cache that ends where the arrays are filled to may grow in place, and every other one begins new arrays with a
copy. So all caches stay what they are, however many are grown from one. What is left of each pair changes with every
gate, and is not shared: one number beside a key and a value.
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
    """Arrays of keys, values and positions, filled up to some slot.

    Parameters
    ----------
    state
        The cache that they begin with.
    slots
        How many pairs they can hold.
    """

    def __init__(self, state: CacheState, slots: int) -> None:
        self.k, self.v = spacious(state.k, slots, 2), spacious(state.v, slots, 2)
        self.position = spacious(state.position, slots, 1)
        self.slots, self.filled, self.lock = slots, state.k.shape[-2], Lock()
        self.in_order = bool(np.all(state.position[..., 1:] - state.position[..., :-1] == 1))  # without a gap

    def claims(self, end: int, pairs: int) -> bool:
        """Whether a cache that ends there may grow by so many pairs; if so, their slots are now its own."""
        with self.lock:
            if end != self.filled or end + pairs > self.slots:
                return False
            self.filled = end + pairs
        return True

    def write(self, at: int, new: CacheState) -> None:
        """Put pairs in slots that were claimed."""
        here = slice(at, at + new.k.shape[-2])
        self.k[..., here, :], self.v[..., here, :], self.position[..., here] = new.k, new.v, new.position

    def view(self, begin: int, end: int) -> tuple[Any, Any, Any]:
        """Keys, values and positions in some slots; NumPy lets nobody write what other caches hold too."""
        views = self.k[..., begin:end, :], self.v[..., begin:end, :], self.position[..., begin:end]
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


def spacious(x: Any, slots: int, own: int) -> Any:
    """An array whose own axes begin with that of the pairs, and room behind them."""
    lead, (n, *rest) = x.shape[: x.ndim - own], x.shape[x.ndim - own :]
    wide = np.empty_like(x, shape=(*lead, slots, *rest), order="C")
    wide[(..., slice(n), *[slice(None)] * (own - 1))] = x
    return wide


def claimed(state: CacheState, new: int) -> tuple[Room, int] | None:
    """A room where a cache ends and so many slots behind it are its own; None if it has empty slots."""
    pairs, place = state.k.shape[-2], places.get(id(state.k))
    known = place and place.k() is state.k and place.v() is state.v
    if known and place.room.claims(place.end, new):
        return place.room, place.end
    if not np.all(state.position >= 0):
        return None
    room = Room(state, (pairs + new) * 3 // 2 + 16)
    room.claims(pairs, new)
    return room, pairs


def grown(state: CacheState, new: CacheState, window: int | None) -> CacheState | None:
    """A cache with new pairs behind its own, only the last ones if there is a window.

    None where it must be copied: an empty cache, with which nobody may ever go on; where slots are empty, or a window
    looks at positions with gaps; and while a CUDA graph is recorded, as every launch would write the same slots.
    """
    pairs, more = state.k.shape[-2], new.k.shape[-2]
    found = None if not pairs or recording({"": state.k}) else claimed(state, more)
    if found is None or window is not None and not found[0].in_order:
        return None
    room, end = found
    room.write(end, new)
    begin = end - pairs if window is None else max(end - pairs, end + more - window)
    k, v, position = room.view(begin, end + more)
    log_weight = spacious(state.log_weight, room.slots, 1)  # strides as those of the others
    log_weight[..., pairs : pairs + more] = new.log_weight
    return CacheState(k, v, log_weight[..., pairs + more - k.shape[-2] : pairs + more], position)
