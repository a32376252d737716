"""What every operator does before and after its recurrence, whatever the backend.

    arrays in -> one dtype -> shapes checked -> masked tokens made neutral -> one core call per sequence -> arrays out

A backend's operator is then its core: a function of clean arrays and a start state that returns ``(o, state)``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from importlib import import_module
from inspect import Parameter, signature
from math import inf, isfinite
from operator import index, is_
from typing import Any, NamedTuple

import numpy as np

from .notation import ARRAYS, GATES, OPERATORS, STATES, axes_of, broadcast_leading, check
from .recording import is_recording, sent

__all__ = [
    "LIMITS",
    "Held",
    "as_array",
    "as_numpy",
    "check_arguments",
    "check_gates",
    "check_mask",
    "check_number",
    "on_device",
    "own",
    "promises",
    "run",
    "through_dlpack",
]

HALF = ("float16", "bfloat16")
HOST = (1, 3)  # DLPack's numbers for plain and for pinned memory of the host
FACTORING = frozenset(
    {"affine_projection", "kalman_filter", "kernel_ridge", "local_polynomial", "mesa", "recursive_least_squares"}
)
MAY_BE_INFINITE = frozenset({"bandwidth"})  # a kernel of infinite width weighs all pairs alike
LIMITS = {  # what gates promise: decays shrink, steps lead forward, shares are shares
    "log_decay": (-inf, 0.0),
    "A": (-inf, 0.0),
    "delta": (0.0, inf),
    "rate": (0.0, inf),
    "step_size": (0.0, inf),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
}


def check_arguments(door: Callable[..., Any], given: dict[str, Any]) -> None:
    """Refuse what an operator's signature rules out: a required argument that is None, a number or a flag that is none.

    Parameters
    ----------
    door
        The operator as the user calls it; options annotated as ``int`` or ``float`` are numbers, with ``| None``
        perhaps left out, and those annotated as ``bool`` are True or False.
    given
        All arguments of one call by name; whole numbers become Python's, of any size.

    Raises
    ------
    TypeError, ValueError
        Naming the argument and its value.
    """
    for name, (required, kind) in promises(door).items():
        if required and given[name] is None:
            raise TypeError(f"{name} is None; {door.__name__} needs it")
        if kind == "bool":
            check_flag(name, given[name])
        elif kind and (given[name] is not None or not kind.endswith("None")):
            check_number(name, given[name], kind)
            if kind.startswith("int"):
                given[name] = index(given[name])


@cache
def promises(door: Callable[..., Any]) -> dict[str, tuple[bool, str]]:
    """Of each argument, whether it must be given, and its annotation if that is a number or a flag."""
    every, plain = signature(door).parameters.items(), ("int", "float", "bool")
    kinds = {name: str(p.annotation) if str(p.annotation).startswith(plain) else "" for name, p in every}
    return {name: (p.default is Parameter.empty, kinds[name]) for name, p in every}


def check_flag(name: str, x: Any) -> None:
    """True or False, of Python or NumPy, or 1 or 0."""
    if x is not True and x is not False and not (np.ndim(x) == 0 and not isinstance(x, str) and x in (0, 1)):
        raise TypeError(f"{name} is {x!r}; it needs True or False")


def check_number(name: str, x: Any, kind: str) -> None:
    """One finite number, or one integer."""
    if type(x) is float and isfinite(x) and kind.startswith("float"):
        return
    dtype = np.asarray(x).dtype.kind if np.ndim(x) == 0 else ""
    if dtype not in (("i", "u") if kind.startswith("int") else ("i", "u", "f")):
        value = f"an array of shape {np.shape(x)}" if np.ndim(x) else repr(x)
        raise TypeError(f"{name} is {value}; it needs {'an integer' if kind.startswith('int') else 'a number'}")
    if not np.isfinite(x) and (np.isnan(x) or name not in MAY_BE_INFINITE):
        raise ValueError(f"{name} must be a finite number, got {x}")


def on_device(x: Any) -> bool:
    """Whether an array lives on a GPU in a library that speaks NumPy's protocols (CuPy): it is used where it is."""
    return type(x) is not np.ndarray and is_on_device(type(x))


@lru_cache(maxsize=256)
def is_on_device(kind: type) -> bool:
    """The class says it: to make what the array itself would say takes microseconds."""
    return hasattr(kind, "__cuda_array_interface__") and hasattr(kind, "__array_function__")


def as_numpy(x: Any) -> np.ndarray:
    """Any array or list as a NumPy array."""
    x = through_dlpack(x)
    return x.get() if on_device(x) else np.asarray(x)


def own(x: Any) -> Any:
    """A copy of an array or a list, which the caller may overwrite; anything else as it is."""
    return x.copy() if hasattr(x, "copy") else x


def at_home(x: Any) -> Any:
    """An array on a GPU as it is, anything else as a NumPy array."""
    x = through_dlpack(x)
    return x if on_device(x) else np.asarray(x)


def through_dlpack(x: Any) -> Any:
    """The same memory as an array of NumPy where DLPack is the only way to one, of CuPy where it is on a GPU."""
    if not hasattr(x, "__dlpack__") or isinstance(x, np.ndarray) or on_device(x):
        return x
    if int(x.__dlpack_device__()[0]) not in HOST:
        return import_module("cupy").from_dlpack(x)
    if str(getattr(x, "dtype", "")) == "torch.bfloat16" and not x.requires_grad:
        return brain_floats(x)
    return x if hasattr(x, "__array__") else np.from_dlpack(x)


def brain_floats(x: Any) -> np.ndarray:
    """The same memory of torch in bfloat16, which NumPy takes from nobody, as bits that ml_dtypes reads."""
    bits = np.from_dlpack(x.view(sys.modules["torch"].int16))
    return bits.view(import_module("ml_dtypes").bfloat16)


def as_array(name: str, x: Any) -> np.ndarray:
    """One argument as a NumPy array of real or complex floats, without a copy where the memory can be shared.

    Raises
    ------
    TypeError
        For masked, structured, object, boolean, string or byte-swapped arrays.
    """
    if not on_device(x):
        if isinstance(x, np.ma.MaskedArray):
            words = f"pass its data, and mask=~{name}.mask for the tokens to leave out"
            raise TypeError(f"{name} is a masked array: {words}")
        x = shared(name, x)
    if is_usable(x.dtype):
        return x
    if x.dtype.kind in "iu":
        return x.astype(np.float64)
    if x.dtype.kind in "fc":
        raise TypeError(f"{name} has the byte order of another machine ({x.dtype.str}): convert it with astype")
    raise TypeError(f"{name} has dtype {x.dtype}; it needs real numbers")


def shared(name: str, x: Any) -> Any:
    """An argument as an array, of NumPy if it is not on a GPU."""
    if isinstance(x, np.ndarray):
        return x
    try:
        x = through_dlpack(x)
        if on_device(x) or isinstance(x, np.ndarray):
            return x
        takes = str(getattr(x, "dtype", "")) != "bfloat16"  # NumPy does not by DLPack
        return np.from_dlpack(x) if takes and hasattr(x, "__dlpack__") and not np.isscalar(x) else np.asarray(x)
    except ValueError as problem:  # rows of different lengths
        raise ValueError(f"{name} is no array of numbers: {problem}") from None
    except (BufferError, RuntimeError) as problem:  # a dtype of its own, or a tensor that keeps its gradient
        raise TypeError(f"{name} cannot be shared with NumPy: {problem}") from problem


@lru_cache(maxsize=64)
def is_usable(dtype: np.dtype) -> bool:
    """Whether numbers are real or complex floats in the byte order of this machine."""
    return dtype.isnative and (dtype.kind in "fc" or dtype.name == "bfloat16")


def dtypes_of(arrays: Mapping[str, np.ndarray]) -> tuple[np.dtype, np.dtype]:
    """Dtype of the output (that of the data, gates left out) and of the sums (never below float32)."""
    dtypes = {x.dtype for name, x in arrays.items() if name not in GATES}
    try:
        output = dtypes.pop() if len(dtypes) == 1 else np.result_type(*dtypes)
    except TypeError:
        found = ", ".join(f"{name} is {x.dtype}" for name, x in arrays.items() if name not in GATES)
        raise TypeError(f"dtypes that have none in common: {found}") from None
    compute = np.dtype(np.float32) if output.name in HALF else output
    return output, compute


def refuse_complex(operator: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Complex data are meaningful only in a scan with a phase."""
    for name, x in arrays.items():
        if x.dtype.kind == "c" and not (operator == "diagonal_scan" and name == "x" and "phase" in arrays):
            raise TypeError(f"{name} is complex ({x.dtype}); {operator} takes real numbers")


def refuse_extended(operator: str, dtype: np.dtype) -> None:
    """Operators that factor matrices have no more than double precision: LAPACK has none."""
    if dtype in (np.longdouble, np.clongdouble) and dtype.itemsize > 8 and operator in FACTORING:
        raise TypeError(f"{operator} computes in float64 at most: data of {dtype} have to be rounded first")


def check_gates(gates: Mapping[str, np.ndarray]) -> Callable[[], None]:
    """Refuse gates outside their limits; for run, which asks for a verdict, there is none left to wait for."""
    for name, x in gates.items():
        if np.any(outside(name, x)):
            refuse_gate(name, x)
    return no_verdict


def no_verdict() -> None:
    """Everything has been looked at."""


def outside(name: str, x: Any) -> Any:
    """Where a gate is outside its limits; a NaN is nowhere outside."""
    low, high = LIMITS[name]
    if low == -inf:
        return x > high
    return x < low if high == inf else (x < low) | (x > high)


def refuse_gate(name: str, x: Any) -> None:
    """A ValueError that names the first number outside the limits, with its place."""
    (low, high), place = LIMITS[name], tuple(int(i) for i in np.argwhere(outside(name, x))[0])
    words = f"be {'<=' if low == -inf else '>='} 0" if inf in (-low, high) else "lie in [0, 1]"
    raise ValueError(f"{name} must {words} everywhere; it is {x[place]} at {place}")


def recording(arrays: Mapping[str, Any]) -> bool:
    """Whether arrays on a GPU are worked on while a CUDA graph is recorded: numbers cannot be looked at."""
    return any(map(on_device, arrays.values())) and is_recording()


def check_mask(mask: Any) -> np.ndarray:
    """A mask is boolean: True where the token is memorised."""
    mask = at_home(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; it needs bool, True where the token is memorised")
    return mask


def check_boundaries(cu_seqlens: Any, t: int) -> np.ndarray:
    """Boundaries of packed sequences: integers from 0 to t that never decrease."""
    bounds = as_numpy(cu_seqlens)
    if bounds.ndim != 1 or bounds.dtype.kind not in "iu" or len(bounds) == 0:
        raise ValueError(f"cu_seqlens must be a 1-d array of integers, got {bounds.dtype} of shape {bounds.shape}")
    if bounds[0] != 0 or bounds[-1] != t:
        raise ValueError(f"cu_seqlens must run from 0 to t = {t}, it runs from {bounds[0]} to {bounds[-1]}")
    if np.any(bounds[1:].astype(np.int64) < bounds[:-1].astype(np.int64)):
        i = int(np.argmax(bounds[1:].astype(np.int64) < bounds[:-1].astype(np.int64)))
        raise ValueError(f"cu_seqlens must not decrease: {bounds[i + 1]} follows {bounds[i]} at {i + 1}")
    return bounds.astype(np.int64)


class Kind(NamedTuple):
    """What can be said of an array without its numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


class Ready(NamedTuple):
    """How one array is made ready for a core: cast, repeated if it is a number, masked, and given leading axes."""

    dtype: np.dtype
    repeated: tuple[int, ...] | None
    masked: int | None  # axes of its own after that of time, or None where masked tokens need no zeros
    shape: tuple[int, ...]

    def __call__(self, x: Any, mask: Any) -> Any:
        """The array that the core sees."""
        if x.dtype != self.dtype:
            x = x.astype(self.dtype)
        if self.repeated is not None:
            x = np.broadcast_to(x, self.repeated)
        if self.masked is not None:
            x = np.where(mask.reshape(mask.shape + (1,) * self.masked), x, x.dtype.type(0))
        x = in_rows(x)
        return x if x.shape == self.shape else x.reshape(self.shape)


def in_rows(x: Any) -> Any:
    """An array whose last axis is adjacent in memory, copied if not: products round alike in most layouts then."""
    if on_device(x) or x.ndim == 0:
        return x
    adjacent = x.shape[-1] < 2 or x.strides[-1] in (0, x.itemsize)
    return x if adjacent and x.flags.aligned and min(x.strides) >= 0 else np.ascontiguousarray(x)


class Plan(NamedTuple):
    """Everything about a call that follows from its shapes and dtypes, and so is found once for all calls like it."""

    sizes: dict[str, int]
    output: np.dtype
    compute: np.dtype  # of sums and states
    arrays: dict[str, Ready]
    lead: tuple[int, ...]  # leading shape of the state: that of what is memorised, not of what only reads
    gates: tuple[str, ...]  # names of those with limits


@lru_cache(maxsize=1024)
def plan_of(operator: str, kinds: tuple[tuple[str, Kind], ...], mask: tuple[int, ...] | None, halves: bool) -> Plan:
    """The plan of a call.

    Parameters
    ----------
    operator
        Its name.
    kinds
        Of the arrays given, by name.
    mask
        Shape of the mask.
    halves
        Whether data of 16 bits stay as they are.

    Raises
    ------
    ValueError, TypeError
        If the arrays do not fit together.
    """
    given = dict(kinds)
    refuse_complex(operator, given)
    sizes = check(**given, **({} if mask is None else {"mask": Kind(mask, np.dtype(np.bool_))}))
    output, compute = dtypes_of(given)
    refuse_extended(operator, output)
    axes = {name: axes_of(name, x, given) for name, x in given.items()}
    shapes, arrays = {}, {}
    for name, x in given.items():
        narrow = halves and output.name in HALF and name not in GATES
        dtype = compute if x.dtype.kind == "c" else output if narrow else np.finfo(compute).dtype
        repeated = (1,) * spare_axes(name, given) + tuple(sizes[axis] for axis in axes[name]) if x.ndim == 0 else None
        masked = len(axes[name]) - 1 if mask is not None and name in OPERATORS[operator].frozen else None
        shape = x.shape if repeated is None else repeated
        shapes[name] = shape if masked is None else np.broadcast_shapes(mask + (1,) * masked, shape)
        arrays[name] = Ready(dtype, repeated, masked, shapes[name])
    align_queries(shapes, axes)
    arrays = {name: ready._replace(shape=shapes[name]) for name, ready in arrays.items()}
    lead = memory_lead(operator, shapes, axes, mask)
    if operator == "diagonal_scan" and "phase" in given:
        output = np.result_type(output, np.complex64)
    gates = tuple(name for name in LIMITS if name in given)
    return Plan(sizes, output, np.result_type(np.float32, output), arrays, lead, gates)


def prepare(
    operator: str, arrays: Mapping[str, Any], mask: Any, halves: bool = False
) -> tuple[dict[str, np.ndarray], Plan]:
    """Named arrays in one dtype, masked tokens neutral, and the plan of the call."""
    given = {name: as_array(name, x) for name, x in arrays.items() if x is not None}
    if mask is not None:
        mask = moved(given, check_mask(mask))
    kinds = tuple([(name, Kind(x.shape, x.dtype)) for name, x in given.items()])
    plan = plan_of(operator, kinds, None if mask is None else mask.shape, halves)
    for name, x in given.items():
        given[name] = plan.arrays[name](x, mask)
    if mask is not None and OPERATORS[operator].sees_mask:
        given["mask"] = mask
    return given, plan


def spare_axes(name: str, arrays: Mapping[str, Any]) -> int:
    """Leading axes that a number needs in place of an array: as ``log_decay`` it is one gate per step."""
    return arrays["q"].ndim - 2 if name == "log_decay" and "q" in arrays else 0


def align_queries(shapes: dict[str, tuple[int, ...]], axes: Mapping[str, tuple[str, ...]]) -> None:
    """Give queries all leading axes, so that ``log_decay`` with as many axes as they have is one gate per channel."""
    if "q" not in shapes:
        return
    most = max(len(shape) - len(axes[name]) for name, shape in shapes.items())
    for name in ("q", "log_decay"):
        if name in shapes:
            shapes[name] = (1,) * (most + len(axes[name]) - len(shapes[name])) + shapes[name]


def memory_lead(
    operator: str, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple[str, ...]], mask: Any
) -> tuple[int, ...]:
    """Leading shape of the state: that of the arrays that are memorised, not of those that only read."""
    writing = {
        name: shape[: len(shape) - len(axes[name])]
        for name, shape in shapes.items()
        if name not in OPERATORS[operator].reads
    }
    return broadcast_leading(writing | ({} if mask is None else {"mask": mask[:-1]}))


def zeros(operator: str, lead: tuple[int, ...], sizes: Mapping[str, int], dtype: Any) -> Any:
    """An empty memory: every field of the state zero."""
    fields = OPERATORS[operator].state.items()
    return STATES[operator](
        **{name: np.zeros(lead + tuple(sizes[axis] for axis in axes.split()), dtype) for name, axes in fields}
    )


def moved(arrays: Mapping[str, Any], x: Any) -> Any:
    """An array where the arrays are: on their GPU, or as a NumPy array."""
    device = next(filter(on_device, arrays.values()), None)
    if device is None:
        return as_numpy(x)
    return x if on_device(x) else sent(as_numpy(x), device)


def beside(arrays: Mapping[str, Any], state: Any) -> Any:
    """A state where the arrays are.

    Raises
    ------
    TypeError
        If it would have to leave the GPU unasked.
    """
    if not any(map(on_device, arrays.values())):
        if any(map(on_device, state)):
            raise TypeError("initial_state is on the GPU, the arrays are on the CPU")
        return state
    fields = [None if field is None else moved(arrays, field) for field in state]
    if all(map(is_, fields, state)):
        return state
    if is_recording():  # what is sent once begins every launch of the graph, which may overwrite it
        fields = [x if x is field else x.copy() for x, field in zip(fields, state, strict=True)]
    return type(state)(*fields)


class Field(NamedTuple):
    """A field of the state of empty memories: zeros, or what each memory begins with."""

    shape: tuple[int, ...]
    dtype: np.dtype
    one: np.ndarray | None

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)


def vacant(
    start: Callable[..., Any], operator: str, arrays: Mapping[str, Any], lead: tuple[int, ...], sizes: Any, dtype: Any
) -> Any:
    """The state of empty memories. For arrays on a GPU it is described, to be made by ``made_there``."""
    if not any(map(on_device, arrays.values())):
        return start(operator, lead, sizes, dtype)
    function, fixed = (start.func, start.args) if isinstance(start, partial) else (start, ())
    plain = all(isinstance(x, (bool, int, float)) for x in fixed)
    describe = described if plain else described.__wrapped__  # others may be arrays, or hold some
    return describe(function, fixed, operator, lead, tuple(sizes.items()), dtype)


@lru_cache(maxsize=64)
def described(
    start: Callable[..., Any], fixed: tuple[Any, ...], operator: str, lead: tuple[int, ...], sizes: Any, dtype: Any
) -> Any:
    """The state of empty memories by its fields, from that of one memory."""
    one, fields = start(*fixed, operator, (), dict(sizes), dtype), []
    for name, x in zip(one._fields, one, strict=True):
        if x is None:
            fields.append(None)
            continue
        own = x.ndim - len(OPERATORS[operator].state[name].split())
        shape = np.broadcast_shapes(lead, x.shape[:own]) + x.shape[own:]
        fields.append(Field(shape, x.dtype, x if np.any(x) else None))
    return type(one)(*fields)


def made_there(arrays: Mapping[str, Any], state: Any) -> Any:
    """What ``vacant`` said, made on the GPU: zeros come from nowhere, of other fields one memory is sent."""
    device = next(filter(on_device, arrays.values()), None)
    if device is None:
        return state
    return type(state)(*[None if x is None else repeated(arrays, device, x) for x in state])


def repeated(arrays: Mapping[str, Any], device: Any, field: Field) -> Any:
    """A field in full on a GPU."""
    if field.one is None:
        made = np.zeros_like(device, shape=field.shape or (1,), dtype=field.dtype, order="C")
        return made if field.shape else made[0]  # CuPy takes an empty shape for none
    return np.broadcast_to(moved(arrays, field.one), field.shape).astype(field.dtype, order="C", copy=True)


def adopt(operator: str, given: Any, start: Any, copy: bool = True) -> Any:
    """The caller's state in the shape and dtype of an empty one: a copy if it is asked for, but of a cache of pairs.

    Raises
    ------
    ValueError
        If a field is missing or its shape does not broadcast to the one needed.
    """
    if not isinstance(given, tuple):
        given = (given,)
    if len(given) > len(start) or len(given) == 1 < sum(field is not None for field in start):
        raise ValueError(f"initial_state needs the fields {', '.join(start._fields)}, got {len(given)}")
    fields = []
    for name, x, empty in zip(start._fields, tuple(given) + (None,) * (len(start) - len(given)), start, strict=True):
        if (x is None) != (empty is None):
            raise ValueError(f"initial_state field {name} is {'missing' if x is None else 'given but not used here'}")
        fields.append(None if x is None else adopt_field(operator, name, x, empty, copy))
    check_slots(operator, type(start)(*fields))
    return type(start)(*fields)


def check_slots(operator: str, state: Any) -> None:
    """The fields of a cache hold the same number of pairs."""
    axes = {name: own.split() for name, own in OPERATORS[operator].state.items() if own.startswith("n")}
    slots = {name: getattr(state, name).shape[-len(own)] for name, own in axes.items()}
    if len(set(slots.values())) > 1:
        raise ValueError(f"initial_state fields hold different numbers of pairs: {slots}")


def adopt_field(operator: str, name: str, x: Any, empty: np.ndarray, copy: bool) -> np.ndarray:
    """One field of a state: leading axes broadcast, its own must fit; a cache has any number n of slots.

    A core that works in place needs a copy; but the pairs of a cache only grow, and are read where they are.

    Raises
    ------
    TypeError
        If it is complex and the memory is real.
    ValueError
        If its shape does not fit.
    """
    x = numbers_of(f"initial_state field {name}", x, empty.dtype)
    if x.dtype.kind == "c" and empty.dtype.kind != "c":
        raise TypeError(f"initial_state field {name} is complex ({x.dtype}), this memory holds {empty.dtype}")
    axes = OPERATORS[operator].state[name].split()
    own = len(axes)
    inner = empty.shape[empty.ndim - own :]
    if axes[:1] == ["n"] and x.ndim >= own:
        inner = (x.shape[x.ndim - own], *inner[1:])
    if x.ndim < own or x.shape[x.ndim - own :] != inner:
        raise ValueError(f"initial_state field {name} has shape {x.shape}, needs (..., {', '.join(map(str, inner))})")
    try:
        lead = np.broadcast_shapes(x.shape[: x.ndim - own], empty.shape[: empty.ndim - own])
    except ValueError:
        raise ValueError(
            f"initial_state field {name} has shape {x.shape}, which does not broadcast to {empty.shape}"
        ) from None
    if axes[:1] == ["n"]:
        x = x if x.shape == lead + inner else np.broadcast_to(x, lead + inner)
        return x if x.dtype == empty.dtype else x.astype(empty.dtype)
    return np.broadcast_to(x, lead + inner).astype(empty.dtype, order="C", copy=copy)


def numbers_of(name: str, x: Any, dtype: np.dtype) -> Any:
    """A field of a state as numbers that its dtype can hold.

    Raises
    ------
    TypeError
        For a masked array, what holds no real numbers, and fractions where pairs are counted.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: pass its data")
    x = at_home(x)
    if not (x.dtype.kind in "iu" or dtype.kind not in "iu" and is_usable(x.dtype)):
        raise TypeError(f"{name} has dtype {x.dtype}; it needs {'integers' if dtype.kind in 'iu' else 'real numbers'}")
    return x


class Held(NamedTuple):
    """A call of an operator's core that has not been made: ``core(**arguments, state=state)``."""

    core: Callable[..., tuple[Any, Any]]
    arguments: dict[str, Any]
    state: Any


def run(
    core: Callable[..., tuple[Any, Any]],
    operator: str,
    arrays: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    start: Callable[..., Any] = zeros,
    halves: bool = False,
    initial_state: Any = None,
    output_final_state: bool = False,
    cu_seqlens: Any = None,
    mask: Any = None,
    hold: bool = False,
    apart: Callable[..., tuple[Any, Any]] | None = None,
    look: Callable[[Mapping[str, Any]], Callable[[], None]] = check_gates,
) -> Any:
    """Call an operator's core with everything a caller may ask of any operator.

    Parameters
    ----------
    core
        ``core(**arrays, **options, state=state) -> (o, state)`` on clean arrays of one floating dtype; arrays that the
        caller left out arrive as None. The core may overwrite ``state``, but no cache of pairs, and never the arrays.
    operator
        Its name in ``notation.OPERATORS``.
    arrays, options
        The caller's arrays, and his other choices.
    start
        ``start(operator, lead, sizes, dtype)`` gives the state of an empty memory.
    halves
        Whether the core takes data of 16 bits as they are; gates and states are wider all the same.
    initial_state, output_final_state, cu_seqlens, mask
        The common keywords of all operators.
    hold
        For ``ttr_np.Stream``: do everything but the call of the core.
    apart
        The core of a call whose memories begin somewhere: it leaves the state that it is given as it is, and returns
        another. Without one the state is copied before ``core`` may overwrite it.
    look
        Looks at the gates that have limits, and returns what gives the verdict: a GPU may be busy with the answers
        before it has told of the gates. While a graph is recorded nobody looks.

    Returns
    -------
    o, or (o, state) with ``output_final_state``; or with ``hold`` the call that is left to be made.
    """
    given, plan = prepare(operator, arrays, mask, halves)
    gates = {name: given[name] for name in plan.gates}
    verdict = look(gates) if gates and not recording(given) else no_verdict
    try:
        apart = None if hold or not plan.sizes["t"] else apart
        called = begun(core, operator, given, options, plan, start, initial_state, cu_seqlens, apart)
        if hold:
            return called
        o, state = called.core(**called.arguments, state=called.state)
    finally:
        verdict()
    o = o if o.dtype == plan.output else o.astype(plan.output)
    return (o, state) if output_final_state else o


def begun(
    core: Callable[..., tuple[Any, Any]],
    operator: str,
    given: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    plan: Plan,
    start: Callable[..., Any],
    initial_state: Any,
    cu_seqlens: Any,
    apart: Callable[..., tuple[Any, Any]] | None,
) -> Held:
    """The call of a core, with all it needs."""
    empty = vacant(start, operator, given, plan.lead, plan.sizes, plan.compute)
    every = {name: given.get(name) for name in OPERATORS[operator].arrays + OPERATORS[operator].optional}
    if OPERATORS[operator].sees_mask:
        every["mask"] = given.get("mask")
    every |= options or {}
    if apart is not None and initial_state is not None and cu_seqlens is None:
        core = apart
    copy = core is not apart
    if asks_nobody(operator, given, empty):
        core = partial(unasked, core, operator)
    if cu_seqlens is not None:
        bounds = check_boundaries(cu_seqlens, plan.sizes["t"])
        core = partial(run_packed, core, operator, given, bounds, initial_state)
        return Held(core, every, made_there(given, empty))
    if initial_state is None:
        return Held(core, every, made_there(given, empty))
    return Held(core, every, beside(given, adopt(operator, initial_state, empty, copy)))


@cache
def questions(operator: str) -> tuple[str, ...]:
    """The arrays with a time axis that only question the memory."""
    return tuple(name for name in OPERATORS[operator].reads if ARRAYS[name].axes.startswith("t"))


def asks_nobody(operator: str, given: Mapping[str, Any], empty: Any) -> bool:
    """Whether memories exist, but a leading axis of their queries is empty; caches do not mind."""
    if "position" in OPERATORS[operator].state or all(0 not in given[x].shape[:-2] for x in questions(operator)):
        return False
    own = len(next(iter(OPERATORS[operator].state.values())).split())
    return 0 not in empty[0].shape[: empty[0].ndim - own]


def unasked(core: Callable[..., tuple[Any, Any]], operator: str, *, state: Any, **every: Any) -> tuple[Any, Any]:
    """The core with zeros in the place of no queries: its state is that of all pairs, its answers are none."""
    asked = {name: every[name] for name in questions(operator)}
    blank = {
        name: np.zeros([max(n, 1) for n in x.shape[:-2]] + list(x.shape[-2:]), x.dtype, like=x)
        for name, x in asked.items()
    }
    o, state = core(**every | blank, state=state)
    lead = np.broadcast_shapes(o.shape[:-2], *(x.shape[:-2] for x in asked.values()))
    return np.zeros(lead + o.shape[-2:], o.dtype, like=o), state


def run_packed(
    core: Any, operator: str, given: Any, bounds: np.ndarray, initial_state: Any, *, state: Any, **every: Any
) -> Any:
    """Each packed sequence by itself, from its own state; states are stacked on an axis before their own axes."""
    outputs, states = [], []
    for i, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        piece = {name: cut(name, x, given, low, high) for name, x in every.items()}
        begin = state if initial_state is None else select(operator, initial_state, i, len(bounds) - 1)
        o, end = core(**piece, state=beside(given, adopt(operator, begin, state)))
        outputs.append(o)
        states.append(end)
    if not outputs:
        o, end = core(**every, state=state)
        return o, none_of(operator, stack(operator, [end]))
    time = -2 if outputs[0].ndim > 1 else -1
    return np.concatenate(outputs, axis=time), stack(operator, states)


def cut(name: str, x: Any, given: Mapping[str, Any], low: int, high: int) -> Any:
    """The steps from low to high of an array that has a time axis; anything else as it is."""
    if name not in ARRAYS or x is None or name not in given:
        return x
    axes = ("t",) if name == "mask" else axes_of(name, x, given)
    return x[(..., slice(low, high)) + (slice(None),) * (len(axes) - 1)] if axes[0] == "t" else x


def select(operator: str, state: Any, i: int, n: int) -> Any:
    """State of packed sequence i."""
    fields = []
    state = state if isinstance(state, tuple) else (state,)
    for field, (name, axes) in zip(state, OPERATORS[operator].state.items(), strict=False):
        x = None if field is None else at_home(field)
        axis = -1 - len(axes.split())
        if x is not None and (np.ndim(x) < -axis or np.shape(x)[axis] != n):
            raise ValueError(
                f"initial_state field {name} has shape {np.shape(x)}; "
                f"with cu_seqlens its axis {axis} counts the {n} sequences"
            )
        fields.append(None if x is None else np.take(x, i, axis=axis))
    return tuple(fields)


def none_of(operator: str, state: Any) -> Any:
    """The state of no packed sequence at all."""
    axes = [-1 - len(own.split()) for own in OPERATORS[operator].state.values()]
    fields = zip(state, axes, strict=True)
    return type(state)(*(None if x is None else np.take(x, range(0), axis=axis) for x, axis in fields))


def stack(operator: str, states: list[Any]) -> Any:
    """States of packed sequences as one; caches of different lengths get empty slots in front."""
    fields = []
    for name, axes in OPERATORS[operator].state.items():
        own = len(axes.split())
        values = [getattr(state, name) for state in states]
        if values[0] is not None and axes.split()[:1] == ["n"]:
            longest = max(x.shape[-own] for x in values)
            values = [pad(x, longest, own, {"log_weight": -np.inf, "position": -1}.get(name, 0)) for x in values]
        fields.append(None if values[0] is None else np.stack(values, axis=-1 - own))
    return type(states[0])(*fields)


def pad(x: np.ndarray, length: int, own: int, fill: float) -> np.ndarray:
    """x with empty slots in front, up to a length."""
    widths = [(0, 0)] * x.ndim
    widths[x.ndim - own] = (length - x.shape[x.ndim - own], 0)
    return np.pad(x, widths, constant_values=fill)
