"""Memories that learn at test time as compiled kernels see them: the library's own, their parts as numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..memories import MLP, Huber, L2Retention, Linear, PNorm, Squared

__all__ = ["ACTIVATIONS", "EACH", "HUBER", "POWER", "SQUARED", "loss_of", "memory_refusal"]

ACTIVATIONS = ("", "gelu", "silu", "relu", "tanh")
SQUARED, HUBER, EACH, POWER = range(4)


def memory_refusal(backend: str, memory: Any, k: Any = None, v: Any = None) -> str | None:
    """Why a backend cannot compile a memory, or None: no kernel calls Python, or has a layer norm per query."""
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
            return f"backend {backend!r} cannot compile the {name} {type(part).__name__}: it has {names}"
    return None


def loss_of(loss: Any) -> tuple[int, float]:
    """A loss as a number for its kind and its parameter."""
    if isinstance(loss, Huber):
        return (EACH if loss.coordinatewise else HUBER), float(loss.delta)
    return (POWER, float(loss.p)) if isinstance(loss, PNorm) else (SQUARED, 0.0)
