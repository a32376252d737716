"""A layer as an object that remembers: memorise pairs, ask for values, in pieces of any length.

    memory = Memory("gated_deltanet", log_decay=-0.01)
    memory.memorize(k, v)        m = the fit to all pairs so far
    o = memory.recall(q)         o = m(q), nothing changes
    o = memory.step(q, k, v)     both, token by token

However a sequence is cut, the answers are those of one pass. What is kept is the layer's state: of a fixed size for all
layers but those that keep their pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from . import memory_file, merging
from .backends import home, home_of, validated
from .calling import as_array, as_numpy, check_mask, on_device, own
from .layers import Layer, layers
from .notation import OPERATORS

__all__ = ["Memory"]


class Shape(NamedTuple):
    """What all pieces of a memory share: leading axes, the size of each kind of row, the dtype."""

    lead: tuple[int, ...]
    sizes: dict[str, int]
    dtype: np.dtype


class Memory:
    """A layer of the table that keeps its state.

    Parameters
    ----------
    layer : str or Layer
        A line of the table, ``ttr_np.layers``, by name or itself.
    backend : str or tuple of str, optional
        See ``ttr_np.backends``.
    mergeable : bool, default False
        Keep, beside the state, what the pairs leave of a memory before them, so that this memory can be merged behind
        another. Costs next to nothing for decaying sums; for the delta rules the k x k transition, about as much again
        as the memory itself.
    **gates
        Gates of the layer that hold for all pieces: numbers, or arrays without a time axis. Those left out have the
        table's defaults; a call may give its own, per token.

    Raises
    ------
    KeyError
        If there is no such layer.
    TypeError
        If the layer is none, or has no such gate.
    ValueError
        If there is no such backend.
    NotImplementedError
        If the layer has no state (it runs by its definition, or not at all), or ``mergeable`` and it does not merge;
        the message says why.

    Notes
    -----
    The first piece decides leading axes, sizes and dtype of all; lists take that dtype. A call that raises leaves the
    memory as it was. A memory is where its arrays are: NumPy's (and anything else that speaks DLPack) on the CPU, and
    CuPy's on their GPU.

    Memory and time per token do not grow, but for the layers that keep their pairs (softmax attention, local
    regression, kernel ridge and their kin): those keep what they can still see, all of the past or a ``window``.

    References
    ----------
    Wang, Shi, Fox (2025), arXiv:2501.12352.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> memory = ttr_np.Memory("delta_rule", beta=1.0)
    >>> memory.memorize(np.eye(2), [[3.0], [4.0]])
    Memory('delta_rule', lead=(), k=2, v=1, float64, 16 bytes on cpu)
    >>> memory.recall([[1.0, 0.0], [1.0, 1.0]])
    array([[3.],
           [7.]])
    """

    def __init__(self, layer: str | Layer, *, backend: Any = None, mergeable: bool = False, **gates: Any) -> None:
        self.layer = layers[layer] if isinstance(layer, str) else layer
        if not isinstance(self.layer, Layer):
            raise TypeError(f"layer is {layer!r}; it needs a line of the table, by name or itself")
        if self.layer.operator is None:
            raise NotImplementedError(f"{self.layer.name} has no state to keep: {self.layer.reason}")
        if mergeable and merging.why_not(self.layer):
            raise NotImplementedError(f"memories of {self.layer.name} do not merge: {merging.why_not(self.layer)}")
        check_gates(self.layer, gates)
        self.backend = None if backend is None else validated(backend)
        self.mergeable, self.gates = bool(mergeable), {name: own(x) for name, x in gates.items()}
        self.reset()

    def reset(self) -> Memory:
        """Forget everything, the sizes too.

        Returns
        -------
        Memory
            Itself.
        """
        self._state: Any = None
        self._shape: Shape | None = None
        self._transitions: list[Any] = []
        return self

    @property
    def state(self) -> Any:
        """A copy of the state as the layer would return it; None before the first piece."""
        return each(lambda x: x.copy(), self._state)

    @property
    def nbytes(self) -> int:
        """Bytes of the state, and of the transitions of a mergeable memory."""
        return sum(x.nbytes for x in arrays_in((self._state, tuple(self._transitions))))

    @property
    def device(self) -> str:
        """``cpu``, or ``gpu`` and its number."""
        return next((place.device for x in arrays_in(self._state) if (place := home(x))), "cpu")

    def memorize(self, *pairs: Any, mask: Any = None, **gates: Any) -> Memory:
        """Memorise a piece of any length.

        Parameters
        ----------
        *pairs : (..., t, size)
            The layer's inputs without the query: ``k, v`` for most, ``k`` for Hopfield memories, ``x`` for scans.
        mask : (..., t) bool, optional
            True where the token is memorised; elsewhere nothing is stored and nothing decays.
        **gates
            Gates of this piece, in place of the memory's.

        Returns
        -------
        Memory
            Itself.

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype, device or number does not fit; the memory is then as it was.

        Notes
        -----
        Cost: that of the layer, which answers a query per token; layers that keep their pairs are not asked.
        """
        names = [name for name in self.layer.data if name != "q"]
        data = self._taken(names, pairs)
        if OPERATORS[self.layer.operator].state.get("position") == "n":  # keeps its pairs, and need not be asked
            self._remember(data, mask, gates, unasked=True)
        elif "q" in self.layer.data:
            self._remember(data | {"q": np.zeros_like(data["k"])}, mask, gates)
        else:
            self._remember(data, mask, gates)
        return self

    def recall(self, *queries: Any, **gates: Any) -> Any:
        """Answer queries from what is memorised; nothing changes.

        Parameters
        ----------
        *queries : (..., t, k)
            Queries; leading axes broadcast with the memory's. For a scan, its input x.
        **gates
            Gates that the answer depends on: ``levels``, ``bonus``, ...

        Returns
        -------
        o : (..., t, v)
            Answers. What a layer adds from the token itself (a bonus, a skip) is missing: a query comes without one.

        Raises
        ------
        ValueError
            If the memory has not seen a piece yet (one of length 0 will do): the size of values is then unknown.
        """
        if self._shape is None:
            raise ValueError(f"this memory of {self.layer.name} has seen nothing yet: its answers have no size")
        names = [name for name in self.layer.data if name in ("q", "x")]
        data = self._taken(names, queries)
        lead, sizes, dtype = self._shape
        t, like = data[names[0]].shape[-2], here(data[names[0]])
        lead = (1,) * (data[names[0]].ndim - 2 - len(lead)) + lead  # per channel or per step: gates are told by axes
        for name in self.layer.data:
            if name not in data:
                fill = self.layer.blank if name == "k" else 0.0
                data[name] = np.full((*lead, t, sizes[name]), fill, dtype, like=like)
        return self._run(data, np.zeros(t, bool), gates)[0]

    def step(self, *tokens: Any, mask: Any = None, **gates: Any) -> Any:
        """Memorise a piece token by token, answering each token's query once the token is memorised.

        Parameters
        ----------
        *tokens : (..., t, size)
            The layer's inputs: ``q, k, v`` for most, ``q, k`` for Hopfield memories, ``x`` for scans.
        mask : (..., t) bool, optional
            As for ``memorize``; the query of a masked token is still answered.
        **gates
            Gates of this piece, in place of the memory's.

        Returns
        -------
        o : (..., t, v)
            Answers.

        Raises
        ------
        ValueError, TypeError
            If a shape, dtype, device or number does not fit; the memory is then as it was.
        """
        return self._remember(self._taken(self.layer.data, tokens), mask, gates)

    def _taken(self, names: Any, given: tuple[Any, ...]) -> dict[str, Any]:
        """A call's data under their names, checked against the pieces before."""
        if len(given) != len(names):
            raise TypeError(f"{self.layer.name} takes {', '.join(names)} here: {len(names)} arrays, got {len(given)}")
        place = home_of(dict(zip(names, given, strict=True)))
        if arrays_in(self._state) and place.device != self.device:
            raise TypeError(f"this memory is on {self.device}, the arrays are on {place.device}: move it with .to()")
        if self._shape is not None:  # lists take the dtype of the memory
            given = tuple(x if hasattr(x, "dtype") else np.asarray(x, self._shape.dtype) for x in given)
        data = {name: as_array(name, x) for name, x in zip(names, given, strict=True)}
        for name, x in data.items():
            if x.ndim < 2:
                raise ValueError(f"{name} needs axes (..., t, size), got shape {x.shape}")
        if self._shape is None:
            return data
        check_rows(self._shape, data)
        return {name: x.astype(self._shape.dtype, copy=False) for name, x in data.items()}

    def _run(self, data: dict[str, Any], mask: Any, gates: dict[str, Any]) -> tuple[Any, Any]:
        """The layer from the present state: answers and the state after."""
        check_gates(self.layer, gates)
        given = [data[name] for name in self.layer.data]
        common = {"initial_state": self._state, "output_final_state": True, "mask": mask, "backend": self.backend}
        return self.layer(*given, **common, **self.gates | gates)

    def _remember(self, data: dict[str, Any], mask: Any, gates: dict[str, Any], unasked: bool = False) -> Any:
        """Run the layer and keep its state, everything or nothing."""
        mask = None if mask is None else check_mask(mask)
        shape = shape_of(self.layer, data, mask, self.gates | gates)
        if self._shape is not None:
            check_lead(self._shape.lead, shape.lead)
        o, state = (self._store if unasked else self._run)(data, mask, gates)
        if self.mergeable:
            given = tuple(data[name] for name in self.layer.data)
            known = (self._transitions, given, mask, self.gates | gates)
            self._transitions = merging.advance(self.layer, *known, self.backend)
        self._state, self._shape = state, self._shape or shape
        return o

    def _store(self, data: dict[str, Any], mask: Any, gates: dict[str, Any]) -> tuple[None, Any]:
        """The state after more pairs, no query asked: queries get an empty leading axis, and everything else one."""
        k = data["k"][None]
        longer = {name: x[None] for name, x in data.items()} | {"q": np.zeros((0, *k.shape[1:]), k.dtype, like=here(k))}
        return None, each(lambda x: x[0], self._run(longer, mask, gates)[1])

    def copy(self) -> Memory:
        """Another memory that knows the same.

        Returns
        -------
        Memory
            A new one; what either learns from here on is its own.
        """
        other = Memory(self.layer, backend=self.backend, mergeable=self.mergeable, **self.gates)
        other._state, other._shape, other._transitions = self._state, self._shape, self._transitions
        return other

    def to(self, device: str) -> Memory:
        """Move the memory to another device.

        Parameters
        ----------
        device : str
            ``cpu``, ``gpu`` or ``gpu 1``: NumPy's arrays or CuPy's, those given as gates too.

        Returns
        -------
        Memory
            Itself.

        Raises
        ------
        ValueError
            If the device has another name.
        ImportError
            If CuPy is not installed.
        """
        move = mover(device)
        state, transitions = each(move, self._state), [each(move, x) for x in self._transitions]
        gates = {name: move(x) if np.ndim(x) else x for name, x in self.gates.items()}
        self._state, self._transitions, self.gates = state, transitions, gates
        return self

    def merge(self, other: Memory) -> Memory:
        """The memory of this one's pairs followed by the other's.

        Parameters
        ----------
        other : Memory
            Of the same layer and gates, made with ``mergeable=True`` and started empty.

        Returns
        -------
        Memory
            A new one, mergeable if this one is; both stay as they are.

        Raises
        ------
        NotImplementedError
            If memories of this layer do not merge; the message says why.
        ValueError
            If the other is of another layer or shape, or not mergeable.

        Examples
        --------
        >>> import numpy as np, ttr_np
        >>> first = ttr_np.Memory("delta_rule", beta=1.0).memorize([[1.0, 0.0]], [[1.0]])
        >>> second = ttr_np.Memory("delta_rule", beta=1.0, mergeable=True).memorize([[1.0, 0.0]], [[7.0]])
        >>> first.merge(second).recall([[1.0, 0.0]])
        array([[7.]])
        """
        check_mergeable(self, other)
        if self._state is None or other._state is None:
            merged = (other if self._state is None else self).copy()
        else:
            merged = self.copy()
            merged._state = merging.merge(self._state, other._state, other._transitions)
        merged.mergeable = self.mergeable
        merged._transitions = merging.compose(self._transitions, other._transitions) if self.mergeable else []
        return merged

    def save(self, path: Any) -> None:
        """Write the memory to a file, all of it or nothing: an .npz archive with a header in JSON.

        Parameters
        ----------
        path : path
            Where to; a file that is there is replaced in one step, at the end.

        Raises
        ------
        TypeError
            If the layer is no line of the table (a file holds names, not code), or a gate is neither number nor array.
        """
        memory_file.write(path, self._content())

    def _content(self) -> dict[str, Any]:
        """What a file holds."""
        if layers.lines.get(self.layer.name) is not self.layer:
            raise TypeError(f"layer {self.layer.name!r} is no line of the table: a file holds its name, not its code")
        shape = self._shape and {"lead": self._shape.lead, "sizes": self._shape.sizes, "dtype": self._shape.dtype.name}
        return {
            "layer": self.layer.name,
            "gates": {name: as_numpy(x) for name, x in self.gates.items() if x is not None},
            "mergeable": self.mergeable,
            "shape": shape,
            "state": each(as_numpy, self._state),
            "transitions": [each(as_numpy, x) for x in self._transitions],
        }

    @classmethod
    def load(cls, path: Any, *, backend: Any = None) -> Memory:
        """Read a memory from a file.

        Parameters
        ----------
        path : path
            A file that ``save`` wrote, on whatever device.
        backend : str or tuple of str, optional
            Of the memory that is returned, which is on the CPU.

        Returns
        -------
        Memory

        Raises
        ------
        OSError
            If there is no such file, or it cannot be read.
        ValueError
            If it is no file of a memory, is damaged, or was written by a later version.
        """
        content = memory_file.read(path)
        try:
            return restored(content, backend)
        except Exception as problem:  # a file may say anything
            raise ValueError(f"{path} does not hold a memory that fits this ttr_np: {problem}") from problem

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> Memory:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        return restored, (self._content(), self.backend)

    def __repr__(self) -> str:
        if self._shape is None:
            return f"Memory({self.layer.name!r}, empty)"
        sizes = ", ".join(f"{name}={size}" for name, size in self._shape.sizes.items())
        where = f"{self._shape.dtype}, {self.nbytes} bytes on {self.device}"
        return f"Memory({self.layer.name!r}, lead={self._shape.lead}, {sizes}, {where})"


def each(work: Callable[[Any], Any], state: Any) -> Any:
    """A state with every array replaced by what ``work`` makes of it."""
    if state is None:
        return None
    if isinstance(state, tuple):
        parts = [each(work, x) for x in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return work(state)


def arrays_in(state: Any) -> list[Any]:
    """All arrays of a state."""

    def walk(x: Any) -> Iterator[Any]:
        if isinstance(x, tuple):
            for part in x:
                yield from walk(part)
        elif x is not None:
            yield x

    return list(walk(state))


def check_gates(layer: Layer, gates: dict[str, Any]) -> None:
    """A TypeError for a gate that the layer does not have."""
    for name in gates:
        if name not in layer.gates:
            raise TypeError(f"{layer.name} has no gate {name!r}; it has {', '.join(layer.gates) or 'none'}")


def here(x: Any) -> Any:
    """What makes NumPy's constructors build where an array is; None on the CPU."""
    return x if on_device(x) else None


def check_rows(shape: Shape, data: dict[str, Any]) -> None:
    """Rows like those before.

    Raises
    ------
    ValueError
        If a row has another size.
    TypeError
        If it would have to be rounded to the dtype of the memory.
    """
    for name, x in data.items():
        size = shape.sizes["k" if name == "q" else name]
        if x.shape[-1] != size:
            raise ValueError(f"{name} has rows of {x.shape[-1]} numbers; this memory holds {size}")
        if not np.can_cast(x.dtype, shape.dtype):
            raise TypeError(f"{name} has dtype {x.dtype}; this memory is {shape.dtype}: convert it with astype")


def check_lead(lead: tuple[int, ...], new: tuple[int, ...]) -> None:
    """A ValueError unless a piece has the memory's leading axes, or broadcasts to them."""
    try:
        fits = np.broadcast_shapes(lead, new) == lead
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"the piece has leading axes {new}; this memory holds {lead}")


def shape_of(layer: Layer, data: dict[str, Any], mask: Any, gates: dict[str, Any]) -> Shape:
    """What a piece, its mask and its gates fix for all later ones."""
    written = {name: x for name, x in data.items() if name != "q"}
    leads = [x.shape[:-2] for x in written.values()] + [np.shape(mask)[:-1]]
    for name, x in gates.items():
        own = len(layer.gates[name].axes.split()) if name in layer.gates else 0
        if own and layer.gates[name].axes[0] in "ts" and np.ndim(x) > own:
            leads.append(np.shape(x)[:-own])
    sizes = {name: x.shape[-1] for name, x in written.items()}
    return Shape(np.broadcast_shapes(*leads), sizes, np.result_type(*(x.dtype for x in written.values())))


def mover(device: str) -> Callable[[Any], Any]:
    """What moves an array to a device."""
    if device == "cpu":
        return as_numpy
    kind, _, number = str(device).partition(" ")
    if kind != "gpu" or (number and not number.isdigit()):
        raise ValueError(f"device is {device!r}; it is one of 'cpu', 'gpu', 'gpu 1', ...")
    import cupy

    def move(x: Any) -> Any:
        with cupy.cuda.Device(int(number or 0)):
            return cupy.asarray(x)

    return move


def check_mergeable(first: Memory, second: Memory) -> None:
    """Refuse what does not merge."""
    if merging.why_not(first.layer):
        raise NotImplementedError(f"memories of {first.layer.name} do not merge: {merging.why_not(first.layer)}")
    if not isinstance(second, Memory) or second.layer is not first.layer:
        raise ValueError(f"{second!r} is no memory of {first.layer.name}")
    if not second.mergeable:
        raise ValueError("the other does not know what its pairs leave of a memory: make it with mergeable=True")
    if None not in (first._shape, second._shape) and first._shape != second._shape:
        raise ValueError(f"memories of different shapes do not merge: {first!r}, {second!r}")


def restored(content: dict[str, Any], backend: Any) -> Memory:
    """The memory that a file, or a pickle, holds; its state is tried on a piece of length zero."""
    gates = {name: x.item() if np.ndim(x) == 0 else x for name, x in content["gates"].items()}
    memory = Memory(content["layer"], backend=backend, mergeable=content["mergeable"], **gates)
    if content["shape"] is not None:
        lead, sizes, dtype = (content["shape"][name] for name in ("lead", "sizes", "dtype"))
        memory._shape = Shape(tuple(int(n) for n in lead), {name: int(n) for name, n in sizes.items()}, dtype_of(dtype))
        memory._state, memory._transitions = content["state"], content["transitions"]
        if memory._state is None:
            raise ValueError("its state is missing")
        memory.recall(np.zeros((*lead, 0, sizes.get("k", sizes.get("x"))), memory._shape.dtype))
    return memory


def dtype_of(name: str) -> np.dtype:
    """A dtype by its name; bfloat16 is not NumPy's own."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
