"""What both GPU backends ask of a memory that learns at test time."""

from __future__ import annotations

from typing import Any

from ._calls import placed

__all__ = ["fixed", "hidden_layers"]


def hidden_layers(memory: Any, k: int) -> tuple[int, int]:
    """How many layers a memory has, and the size of all but the last."""
    hidden = memory.hidden_widths(k)
    return len(hidden) + 1, hidden[0] if hidden else 0


def fixed(memory: Any, like: Any) -> tuple[Any, Any]:
    """Scale and offset of the layer norm beside an array, in its dtype; None where they are 1 and 0."""
    given = (memory.scale, memory.offset) if memory.layer_norm else (None, None)
    return tuple(None if x is None else placed(x, like.dtype, like) for x in given)
