"""What both GPU backends ask of a memory that learns at test time."""

from __future__ import annotations

from typing import Any

import numpy as np

from ttr_np.memories import MLP, Huber, L2Retention, Linear, PNorm, Squared

__all__ = ["ACTIVATIONS", "fixed", "hidden_layers", "loss_of", "memory_refusal"]

ACTIVATIONS = ("", "gelu", "silu", "relu", "tanh")
SQUARED, HUBER, EACH, POWER = range(4)


def memory_refusal(backend: str, memory: Any, k: Any = None, v: Any = None) -> str | None:
    """Why a backend has no kernel for a memory, or None: no kernel calls Python, or has a layer norm per query."""
    for name in ("scale", "offset"):
        own = np.shape(getattr(memory, name, None))[:-1]
        lead = np.broadcast_shapes(np.shape(k)[:-2], np.shape(v)[:-2]) if own and k is not None else own
        if np.broadcast_shapes(own, lead) != lead:
            return f"backend {backend!r} has no memory whose {name} differs among queries: its leading axes are {own}"
    parts = {"memory": (memory, (Linear, MLP))}
    if type(memory) in (Linear, MLP):
        parts |= {"loss": (memory.loss, (Squared, Huber, PNorm)), "retention": (memory.retention, (L2Retention,))}
    for name, (part, known) in parts.items():
        if type(part) not in known:
            names = ", ".join(kind.__name__ for kind in known)
            return f"backend {backend!r} has no kernel for the {name} {type(part).__name__}: it has {names}"
    return None


def loss_of(loss: Any) -> tuple[int, float]:
    """A loss as a number for its kind and its parameter."""
    if isinstance(loss, Huber):
        return (EACH if loss.coordinatewise else HUBER), float(loss.delta)
    return (POWER, float(loss.p)) if isinstance(loss, PNorm) else (SQUARED, 0.0)


def hidden_layers(memory: Any, k: int) -> tuple[int, int]:
    """How many layers a memory has, and the size of all but the last."""
    hidden = memory.hidden_widths(k)
    return len(hidden) + 1, hidden[0] if hidden else 0


def fixed(memory: Any, like: Any) -> tuple[Any, Any]:
    """Scale and offset of the layer norm beside an array, in its dtype; None where they are 1 and 0."""
    given = (memory.scale, memory.offset) if memory.layer_norm else (None, None)
    return tuple(None if x is None else np.asarray(x, like.dtype, like=like) for x in given)
