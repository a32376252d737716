"""One token per call: what a stream of measurements, or a model that writes, asks of a memory.

    step = Stream("delta_rule", q=(64,), k=(64,), v=(64,), beta=())
    o = step(q_t, k_t, v_t, beta_t)

An operator called with one token spends its time on questions that have the same answer every time: which backend,
which shapes, where to write. A stream asks them once. It then holds its arguments, its state and its answer in arrays
of its own, and a step copies the token in, does the work and copies the answer out: the same numbers, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from . import operators
from .backends import BACKENDS, ON_GPU, call, chosen, home_of, resolve
from .calling import as_array, as_numpy, on_device, own
from .launching import Launches, send
from .notation import ARRAYS, GATES, OPERATORS

__all__ = ["Stream"]

# What a gate usually is. A token outside is legal for one operator and an error for another: the operator itself says.
USUAL = {
    "log_decay": (-1e30, 0.0),
    "beta": (0.0, 1e30),
    "delta": (0.0, 1e30),
    "step_size": (0.0, 1e30),
    "momentum": (0.0, 1.0),
    "weight_decay": (0.0, 1.0),
}
# Operators whose step on a GPU is launches and nothing else.
LAUNCHED = frozenset({"linear_attention", "delta_rule", "dplr", "diagonal_scan", "selective_scan", "short_convolution"})


class Loop(NamedTuple):
    """A step on the CPU as work that is done over and over: it reads the token, moves the state, leaves its answer."""

    works: list[Callable[[], None]]
    checks: list[Callable[[], bool]]
    state: Any
    answer: np.ndarray

    def __call__(self) -> np.ndarray | None:
        """One step; None, and nothing done, if a gate is not what it usually is."""
        for usual in self.checks:
            if not usual():
                return None
        for work in self.works:
            work()
        return self.answer


class Stream:
    """An operator that takes one token per call and remembers the tokens before.

    Parameters
    ----------
    operator : str
        Name of an operator: ``delta_rule``, ``recursive_least_squares``, ...
    dtype : dtype, default float64
        Of tokens and answers. Sums and states are never kept below float32.
    initial_state : state, optional
        Where the memory starts, as for the operator. Never modified.
    state : state, optional
        Instead of ``initial_state``, the memory itself: arrays of yours, of its full shape and dtype and in C order,
        which every step moves in place.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``; resolved here, once.
    **given
        For every array of the operator that has an axis t, the shape of one token: the array's shape without that
        axis, ``q=(..., k)``, ``beta=(...)``. Leading axes are free and broadcast: many series, or heads, side by side.
        Every other argument of the operator as itself: ``A``, ``weight``, ``ridge``, ``scale``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        What the operator raises for such arguments, before the first token.

    Notes
    -----
    Memory is that of one token and the state; nothing grows. Exceptions are the operators that keep their pairs
    (``softmax_attention``, ``local_polynomial``, ``kernel_ridge`` and their kin): their memory is their past, unless
    ``window`` bounds it, in arrays with room for half as much again. They and the backend ``numpy`` take the operator's
    own way at each step, which costs some hundred microseconds more. A stream belongs to one thread at a time.

    With a GPU backend, token, state and answer stay on the GPU (in CuPy's arrays, which ``numba-cuda`` needs too), and
    a step is one launch. CuPy's arrays of the stream's dtype in C order are read where they are, and ``out`` is written
    where it is: such a step asks for no memory and waits for nothing, and after one that was not recorded a CUDA graph
    can record it, which must not outlive the stream. Gates that come on the GPU are not looked at; NumPy's arrays are,
    and get a NumPy answer.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> step = ttr_np.Stream("delta_rule", q=(2,), k=(2,), v=(1,), beta=())
    >>> step([1.0, 0.0], [1.0, 0.0], [3.0], 1.0)
    array([3.])
    >>> step([1.0, 1.0], [0.0, 1.0], [4.0], 1.0)
    array([7.])
    >>> step.state.S
    array([[3.],
           [4.]])
    """

    def __init__(
        self,
        operator: str,
        *,
        dtype: Any = np.float64,
        initial_state: Any = None,
        state: Any = None,
        backend: Any = None,
        **given: Any,
    ) -> None:
        if not isinstance(operator, str):
            raise TypeError(f"operator is {type(operator).__name__}; a stream needs the name of an operator")
        if operator not in OPERATORS:
            refuse_layer(operator)
            raise ValueError(f"unknown operator {operator!r}; the operators are {', '.join(OPERATORS)}")
        self.operator, self.dtype = operator, checked_dtype(dtype)
        self.names, shapes, fixed = declared(operator, given)
        self._made_of = {"dtype": self.dtype, "backend": backend} | shapes | fixed
        begin = self._own = None if state is None else fields_of(state)
        begin = initial_state if begin is None else begin
        tokens = {name: harmless(name, shape, self._compute) for name, shape in shapes.items()}
        axes = {name: time_axis(name, x, tokens) for name, x in tokens.items()}
        long = {name: np.expand_dims(x, axes[name]) for name, x in tokens.items()}
        self._backend = resolve(operator, chosen(backend), device_of(fixed, begin), long | fixed)
        self._on_gpu = self._backend in ON_GPU and not self._grows  # where token, state and answer are kept
        hold = self._holder()
        self._tokens = {name: hold(x.astype(self._format(name), copy=False)) for name, x in tokens.items()}
        self._long = {name: np.expand_dims(x, axes[name]) for name, x in self._tokens.items()}
        self._options = {name: hold(x) if name in ARRAYS and np.ndim(x) else x for name, x in fixed.items()}
        self._state = held_state(begin, hold)
        o, _ = self._whole(self._long)  # refuses what is wrong before the first token, and compiles
        self._shape, self._output = o[..., 0, :].shape, self.dtype if o.dtype == self._compute else o.dtype
        self._loop = self._kept()
        if self._loop is not None:
            self._state = self._loop.state
        elif state is not None:
            raise NotImplementedError(f"backend {self._backend!r} moves no state of {operator} in place")
        else:
            none = {name: x[(..., slice(0), *[slice(None)] * (-1 - axes[name]))] for name, x in self._long.items()}
            self._state = self._whole(none)[1]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew around a copy of the state: arrays of another stream are not theirs."""
        return again, (self.operator, self._made_of | {"initial_state": self.state})

    def __repr__(self) -> str:
        token = ", ".join(f"{name}={self._made_of[name]}" for name in self.names)
        return f"Stream({self.operator!r}, {token}, {self.dtype}, backend={self._backend!r})"

    @property
    def _compute(self) -> np.dtype:
        """The dtype of sums."""
        return self.dtype if self.dtype.kind == "c" else np.result_type(np.float32, self.dtype)

    @property
    def _grows(self) -> bool:
        """Whether the memory is the past itself, or a step on the GPU more than launches: then nothing is kept."""
        if self._backend in ON_GPU and self.operator not in LAUNCHED:
            return True
        return any(axes.startswith("n") for axes in OPERATORS[self.operator].state.values())

    def _format(self, name: str) -> np.dtype:
        """The dtype in which an array of a token is held: halves only where kernels read them."""
        halves = self._backend == "cupy" and self._on_gpu and name not in GATES
        return self.dtype if halves else harmless(name, (), self._compute).dtype

    def _holder(self) -> Callable[[Any], Any]:
        """What copies an array to where the stream keeps its own."""
        if not self._on_gpu:
            return lambda x: x
        machine = import_module(f"{BACKENDS[self._backend]}._launch").machine
        return lambda x: machine.hold(x if on_device(x) else np.asarray(x))

    def _whole(self, sequence: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Any]:
        """The operator itself, on the token as a sequence of length one, or on none."""
        door = getattr(operators, self.operator)
        common = {"initial_state": self._state, "output_final_state": True, "backend": self._backend}
        return door(**sequence, **self._options, **common)

    def _kept(self) -> Loop | Launches | None:
        """The work of a step, if the backend can keep it: that of a state of fixed size, all of it in place."""
        if self._backend == "numpy" or self._grows:
            return None
        fixed = {name: x for name, x in self._options.items() if name in ARRAYS}
        options = {name: x for name, x in self._options.items() if name not in ARRAYS}
        given = {"initial_state": self._state, "hold": True}
        held = call(self.operator, self._backend, self._long | fixed, **options, **given)
        if not all(np.shares_memory(x, held.arguments[key]) for key, x in self._long.items() if x.size):
            return None
        state = held.state if self._own is None else whole_state(self._own, held.state)
        if self._backend in ON_GPU:
            with import_module(f"{BACKENDS[self._backend]}._launch").keeping() as launches:
                o, after = held.core(**held.arguments, state=state)
            kept = Launches(launches, self._tokens, o[..., 0, :], state, after)
            return kept if kept.reads_all else None
        threads = import_module(f"{BACKENDS[self._backend]}._threads")
        with threads.keeping() as works:
            o, after = held.core(**held.arguments, state=state)
        steps = [work.again() for work in works]
        steps += [copier(old, new) for old, new in zip(state, after, strict=True) if new is not old]
        gates = [(x.reshape(-1), *USUAL[name]) for name, x in self._tokens.items() if name in USUAL]
        return Loop(steps, [partial(threads.within, *gate) for gate in gates], state, o[..., 0, :])

    def __call__(self, *token: Any, out: np.ndarray | None = None, **named: Any) -> np.ndarray:
        """Memorise one token and answer its query.

        Parameters
        ----------
        *token, **named
            The arrays that were declared, in the operator's order or by name, of the declared shapes.
        out : (..., v), optional
            Where to write the answer.

        Returns
        -------
        o : (..., v)
            The answer, a new array or ``out``.

        Raises
        ------
        ValueError, TypeError
            If a shape, a dtype or a number is wrong; the memory is then as it was.
        """
        plain = len(token) == len(self.names) and not named
        given = zip(self.names, token, strict=True) if plain else self._named(token, named)
        if out is not None:
            check_out(out, self._shape, self._output)
        if self._on_gpu:
            return self._launched(dict(given), out)
        for name, x in given:
            take(name, self._tokens[name], x)
        answer = None if self._loop is None else self._loop()
        return self._given(self._slowly() if answer is None else answer, out)

    def _launched(self, token: Mapping[str, Any], out: Any) -> Any:
        """A step on the GPU: arrays of the token that cannot be read where they are, are copied."""
        loop = self._loop
        there = {} if loop is None else {name: x for name, x in token.items() if loop.serves(name, x)}
        for name in token.keys() - there.keys():
            take(name, self._tokens[name], token[name])
        if loop and all(usual(name, x) for name, x in token.items() if name in USUAL and not on_device(x)):
            answer = loop(there, out)
        else:
            for name, x in there.items():
                take(name, self._tokens[name], x)
            answer = self._slowly()
        if answer is out:
            return out
        answer = answer if any(map(on_device, token.values())) or on_device(out) else as_numpy(answer)
        return self._given(answer, out)

    def _given(self, answer: Any, out: Any) -> Any:
        """The answer as the caller wants it."""
        if out is None:
            return answer.astype(self._output)
        np.copyto(out, answer, casting="same_kind")
        return out

    def _named(self, token: tuple[Any, ...], named: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
        """The arrays of a token some of which are given by name."""
        given = dict(zip(self.names, token, strict=False))
        if len(token) > len(self.names) or given.keys() & named.keys() or given.keys() | named.keys() != {*self.names}:
            found = " and ".join([f"{len(token)} arrays", *named])
            raise TypeError(f"a token of this stream is {', '.join(self.names)}; got {found}")
        return (given | dict(named)).items()

    def _slowly(self) -> np.ndarray:
        """A step by the operator itself, which looks at every number."""
        o, state = self._whole(self._long)
        if self._loop is None:
            self._state = state
        else:
            for old, new in zip(self._state, state, strict=True):
                copier(old, new)()
        return o[..., 0, :]

    @property
    def state(self) -> Any:
        """A copy of the memory, as the operator would return it."""
        return type(self._state)(*(None if x is None else x.copy() for x in self._state))


def refuse_layer(name: str) -> None:
    """A ValueError that says what to do with a layer, where there is one of that name."""
    from .layers import layers

    if name in layers:
        operator = layers[name].operator
        how = f": its own is {operator!r}, and Memory({name!r}).step takes tokens one by one" if operator else ""
        raise ValueError(f"{name!r} is a layer; a stream runs operators{how}")


def has_time(name: str) -> bool:
    """Whether an array has one number, or one row, per token."""
    return ARRAYS[name].axes.startswith("t")


def again(operator: str, made_of: Mapping[str, Any]) -> Stream:
    """A stream like another."""
    return Stream(operator, **made_of)


def checked_dtype(dtype: Any) -> np.dtype:
    """The dtype of a stream: floats of this machine, real or complex; integers become float64."""
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        return np.dtype(np.float64)
    if dtype.kind not in "fc" and dtype.name != "bfloat16" or not dtype.isnative:
        raise TypeError(f"dtype is {dtype}; a stream needs floats in the byte order of this machine")
    return dtype


def declared(operator: str, given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Names of a token's arrays in their order, the shape of each, and all other arguments.

    Raises
    ------
    TypeError
        If an array that the operator needs is missing, or for a keyword that makes no sense for one token.
    """
    for name in ("mask", "cu_seqlens", "output_final_state"):
        if name in given:
            raise TypeError(f"a stream takes no {name}: it is one sequence, every token of it memorised")
    signature = OPERATORS[operator]
    names = [name for name in signature.arrays + signature.optional if has_time(name) and given.get(name) is not None]
    for name in signature.arrays:
        if given.get(name) is None:
            what = "the shape of one token" if has_time(name) else "the array itself"
            raise TypeError(f"{name} is missing: a stream of {operator} needs {what}")
    others = {name: own(x) for name, x in given.items() if name not in names and not (name in ARRAYS and x is None)}
    return names, {name: given[name] for name in names}, others


def fields_of(state: Any) -> tuple[Any, ...]:
    """The arrays of a state: of one field, the bare array will do."""
    return tuple(state) if isinstance(state, tuple) else (state,)


def device_of(fixed: Mapping[str, Any], state: Any) -> str:
    """Where the memory is, or else the arrays with which a stream begins: a memory on the GPU takes them there."""
    fields = {} if state is None else {f"state {i}": x for i, x in enumerate(fields_of(state))}
    if any(map(on_device, fields.values())):
        return home_of(fields).device
    return home_of({name: x for name, x in fixed.items() if name in ARRAYS} | fields).device


def held_state(state: Any, hold: Callable[[Any], Any]) -> Any:
    """A state where the stream keeps its arrays."""
    return None if state is None else tuple(None if x is None else hold(x) for x in fields_of(state))


def whole_state(own: tuple[Any, ...], wanted: Any) -> Any:
    """The caller's arrays as the memory.

    Raises
    ------
    ValueError
        If one is not of the shape and dtype needed, not in C order, or read-only.
    """
    own += (None,) * (len(wanted) - len(own))
    for name, x, held in zip(wanted._fields, own, wanted, strict=True):
        if held is None:
            continue
        if type(x) is not type(held) and hasattr(x, "dtype"):
            has, keeps = (type(array).__module__.split(".")[0] for array in (x, held))
            raise ValueError(f"state field {name} is an array of {has}; this stream keeps its memory in {keeps}'s")
        if type(x) is not type(held) or (x.shape, x.dtype) != (held.shape, held.dtype):
            has = f"{getattr(x, 'dtype', type(x).__name__)} of shape {np.shape(x)}"
            needs = f"to be moved in place it must be {held.dtype} of {held.shape}"
            raise ValueError(f"state field {name} is {has}; {needs}")
        if not x.flags.c_contiguous:
            raise ValueError(f"state field {name} has strides {x.strides}; to be moved in place it must be in C order")
        if isinstance(x, np.ndarray) and not x.flags.writeable:
            raise ValueError(f"state field {name} is read-only")
    return type(wanted)(*own)


def is_size(n: Any) -> bool:
    """Whether something is the length of an axis."""
    return isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 0


def harmless(name: str, shape: Any, dtype: np.dtype) -> np.ndarray:
    """A token that every operator takes."""
    if not isinstance(shape, (tuple, list)) or not all(is_size(n) for n in shape):
        raise TypeError(f"{name} is {shape!r}; a stream needs the shape of one token, a tuple of sizes: (), (64,) ...")
    return np.full(tuple(shape), 0.0 if name == "log_decay" else 1.0, np.finfo(dtype).dtype if name != "x" else dtype)


def time_axis(name: str, x: np.ndarray, tokens: Mapping[str, np.ndarray]) -> int:
    """Where the axis t of an array stands, seen from its end; gates per channel have as many axes as queries."""
    rows = len(ARRAYS[name].axes.split("|")[0].split()) > 1
    if name == "log_decay":
        rows = "x" in tokens or x.ndim == tokens["q"].ndim
    return -2 if rows else -1


def take(name: str, into: np.ndarray, x: Any) -> None:
    """Copy one array of a token in."""
    if type(x) is not np.ndarray or x.dtype != into.dtype:
        was = getattr(x, "dtype", None)
        x = as_array(name, x)
        if not np.can_cast(x.dtype, into.dtype, "same_kind" if was is None or name in GATES else "safe"):
            raise TypeError(f"{name} has dtype {was}; this stream was made for {into.dtype}")
    if x.shape != into.shape:
        raise ValueError(f"{name} has shape {x.shape}; a token of this stream needs {into.shape}")
    send(x, into)


def usual(name: str, x: Any) -> bool:
    """Whether gates on the host are what they usually are."""
    low, high = USUAL[name]
    x = np.asarray(x, np.float64)
    return bool(np.all((x >= low) & (x <= high)))


def check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An array that can take the answer."""
    if not (isinstance(out, np.ndarray) or on_device(out)):
        raise TypeError(f"out is a {type(out).__name__}; it needs an array")
    if out.shape != shape:
        raise ValueError(f"out has shape {np.shape(out)}; the answer has {shape}")
    if not np.can_cast(dtype, out.dtype, "same_kind"):
        raise TypeError(f"out has dtype {out.dtype}; the answer has {dtype}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if any(stride == 0 and n > 1 for stride, n in zip(out.strides, out.shape, strict=True)):
        raise ValueError(f"out has strides {out.strides}: several numbers of the answer would have one place")


def copier(old: np.ndarray | None, new: np.ndarray | None) -> Callable[[], None]:
    """Work that copies a field of a state to where it is read."""
    return (lambda: None) if old is None or new is None else (lambda: np.copyto(old, new))
