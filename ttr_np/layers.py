"""The table: every architecture is a choice of weights, regressor and optimizer.

One line is one claim, and the tests prove it: the operator that runs the line equals the definition read off its three
choices. A line whose triple no operator serves runs through the definition, ``ttr_np.recall``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import features, operators, routes
from .backends import chosen, frames_of_package
from .calling import (
    HALF,
    as_array,
    as_numpy,
    check_boundaries,
    check_gates,
    check_mask,
    check_number,
    moved,
    on_device,
    promises,
)
from .framework import recall
from .memories import MLP, EntropyRetention, Huber, LqRetention, PNorm
from .memories import Linear as LinearMemory
from .notation import GATES, check
from .optimizers import (
    Corrected,
    Exact,
    GradientDescent,
    Oja,
    Omega,
    Online,
    Projection,
    TestTimeTraining,
    flow_step,
    implicit_step,
    normalized_step,
)
from .recording import lasting
from .regressors import (
    RKHS,
    ComplexLinear,
    Constant,
    Linear,
    LocalPolynomial,
    Network,
    Prototypes,
    Ratio,
    Shrunk,
    Slope,
)
from .weights import (
    Convolution,
    CosinePosition,
    Decaying,
    DotProduct,
    Fading,
    Kernel,
    Levels,
    Rotating,
    Selective,
    Sparse,
    StickBreaking,
    Transported,
    Trapezoid,
    Turning,
    Uniform,
    Weighted,
    Window,
    WithBonus,
)

__all__ = ["Gate", "Layer", "Table", "layers"]


PRECISE = GATES | {"input_gate", "log_input", "mix", "nu", "theta", "readout"}  # never rounded to the dtype of the data
OPTION_LIMITS = {  # of options that only layers know
    "lower_bound": (0, 1),
    "steps": (1, np.inf),
    "window": (1, np.inf),
    "modes": (0, np.inf),
    "seed": (0, np.inf),
    "step_length": (0, np.inf),
    "share": (0, np.inf),
}


class Gate(NamedTuple):
    """One more input of a layer: where it comes from in a trained model, and what it is if the caller says nothing.

    Parameters
    ----------
    default : float or callable
        A number, or a function of the layer's problem (inputs and gates under their names).
    text : str
        How a trained model makes it of the token x.
    axes : str, default "t"
        Its axes in the notation; empty for a plain option.

    Examples
    --------
    >>> import ttr_np
    >>> ttr_np.layers["gated_deltanet"].gates["beta"]
    Gate(default=0.9, text='beta = sigmoid(W x)', axes='t')
    """

    default: Any
    text: str
    axes: str = "t"


@dataclass(frozen=True)
class Layer:
    """A sequence layer as an associative memory.

    Parameters
    ----------
    name : str
        Its name in the table.
    weights, regressor, optimizer : Weights, regressor and optimizer
        The three choices; see the modules of those names.
    operator : str or None
        Name of the operator that runs it, or None: it then runs through the definition.
    paper : str
        Where it is from.
    gates : dict of str to Gate, optional
        Further inputs by name, each with a default, so that ``layer(q, k, v)`` always runs.
    data : tuple of str, default ("q", "k", "v")
        Names of the inputs: ``q, k, v`` for most, ``x`` for pure scans.
    options : dict, optional
        Fixed options of the operator.
    route : callable, default ttr_np.routes.direct
        How inputs and gates become the operator's arguments.
    pose, answer : callable, optional
        What comes before and after the regression, in the definition too: ``pose(problem) -> problem``, and
        ``answer(o, problem) -> o``.
    reason : str, default ""
        Why no operator serves it; empty if one does.
    carries : bool, default False
        Whether its state holds more than operators' states.
    blank : float, default 0.0
        The number of which a key is made that adds nothing to the answer of its own token.

    Examples
    --------
    >>> import numpy as np, ttr_np
    >>> layer = ttr_np.layers["delta_rule"]
    >>> print(layer.weights, "|", layer.regressor, "|", layer.optimizer)
    uniform | linear | online
    >>> layer(np.eye(2), np.eye(2), [[1.0], [2.0]], beta=1.0)
    array([[1.],
           [2.]])
    """

    name: str
    weights: Any
    regressor: Any
    optimizer: Any
    operator: str | None
    paper: str
    gates: dict[str, Gate] = field(default_factory=dict)
    data: tuple[str, ...] = ("q", "k", "v")
    options: dict[str, Any] = field(default_factory=dict)
    route: Callable[..., Any] = routes.direct
    pose: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    answer: Callable[[Any, dict[str, Any]], Any] = lambda o, problem: o
    reason: str = ""
    carries: bool = False
    blank: float = 0.0

    def problem(self, *data: Any, **gates: Any) -> dict[str, Any]:
        """Inputs and gates under their names, defaults filled in: what all three choices look at.

        Parameters
        ----------
        *data, **gates
            As in a call.

        Returns
        -------
        dict
            Arrays, and plain options, by name.

        Raises
        ------
        TypeError
            If an input is missing or no array of real numbers, or a gate unknown.
        ValueError
            If the sizes of inputs do not fit.
        """
        if len(data) != len(self.data):
            raise TypeError(f"{self.name} takes {', '.join(self.data)}: {len(self.data)} inputs, got {len(data)}")
        for name in gates:
            if name not in self.gates:
                raise TypeError(f"{self.name} has no gate {name!r}; it has {', '.join(self.gates) or 'none'}")
        p = {name: at_least_single(as_array(name, x)) for name, x in zip(self.data, data, strict=True)}
        check_data(self, p)
        dtype = np.result_type(*(x.dtype for x in p.values()))
        for name, gate in self.gates.items():
            x = expand(self, name, gates[name] if gates.get(name) is not None else gate.default, p)
            p[name] = x if name in PRECISE or not gate.axes else x.astype(dtype, copy=False)
        return p if self.pose is None else self.pose(p)

    def __call__(
        self,
        *data: Any,
        initial_state: Any = None,
        output_final_state: bool = False,
        cu_seqlens: Any = None,
        mask: Any = None,
        backend: Any = None,
        **gates: Any,
    ) -> Any:
        """Run the layer.

        Parameters
        ----------
        *data : (..., t, size)
            The inputs that ``data`` names: q, k and v for most.
        initial_state, output_final_state, cu_seqlens, mask, backend
            Common to all operators: see ``ttr_np.operators``. The state is that of the operator, or a tuple that
            holds it where the layer remembers more.
        **gates
            Gates of the layer; those left out take the table's defaults.

        Returns
        -------
        o : (..., t, v)
            Answers, in the dtype of the data; or ``(o, state)``.

        Raises
        ------
        TypeError
            If an input is missing or no array of real numbers, or a gate unknown.
        ValueError
            If an array, or a gate, does not fit.
        NotImplementedError
            If the layer cannot run: not yet, or not with a state or mask; the message says why.
        """
        if self.operator is None:
            return self.by_definition(data, gates, initial_state, output_final_state, cu_seqlens, mask, backend)
        with lasting() if any(map(on_device, data)) else nullcontext():
            p = self.problem(*data, **gates)
            p |= tokens_of(self, p, mask, cu_seqlens)
            if self.carries and cu_seqlens is not None:
                rest = p["cu_seqlens"], p["mask"], initial_state, output_final_state, backend
                return self.by_sequence(data, gates, *rest)
            o, state = self.route(self, partial(self.run, p, backend), p, initial_state)
            o = self.answer(o, p).astype(np.result_type(*(as_float(x).dtype for x in data)), copy=False)
            return (o, state) if output_final_state else o

    def by_sequence(self, data: Any, gates: Any, bounds: Any, mask: Any, states: Any, final: bool, backend: Any) -> Any:
        """Packed sequences one by one, for layers that keep more than operators' states; states are then a list."""
        if states is not None and len(states) != len(bounds) - 1:
            raise ValueError(f"initial_state needs a state for each of {len(bounds) - 1} sequences, got {len(states)}")
        outputs, after = [], []
        for i, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            o, state = self(
                *(x[..., low:high, :] for x in map(as_float, data)),
                **{name: self.piece(name, x, low, high) for name, x in gates.items()},
                initial_state=None if states is None else states[i],
                output_final_state=True,
                mask=None if mask is None else mask[..., low:high],
                backend=backend,
            )
            outputs.append(o)
            after.append(state)
        o = np.concatenate(outputs, axis=-2) if outputs else self(*data, mask=mask, backend=backend, **gates)
        return (o, after) if final else o

    def piece(self, name: str, x: Any, low: int, high: int) -> Any:
        """The steps low to high of a gate that has a time axis."""
        axes = self.gates[name].axes.split() if name in self.gates else []
        if axes[:1] not in (["t"], ["s"]) or not as_numpy(x).ndim:
            return x
        return as_numpy(x)[(..., slice(low, high)) + (slice(None),) * (len(axes) - 1)]

    @staticmethod
    def run(p: dict[str, Any], backend: Any, operator: str, state: Any, **arguments: Any) -> Any:
        """One operator call with the caller's mask, packing and backend."""
        common = {"mask": p["mask"], "cu_seqlens": p["cu_seqlens"]} | arguments
        return getattr(operators, operator)(**common, initial_state=state, output_final_state=True, backend=backend)

    def by_definition(
        self, data: Any, gates: Any, state: Any, final: bool, cu_seqlens: Any, mask: Any, backend: Any
    ) -> Any:
        """Refit at every step of every sequence; only without states and masks.

        Raises
        ------
        NotImplementedError
            If there is not even a definition, or if a state, a mask or packing is asked for.
        """
        if self.optimizer is None:
            raise NotImplementedError(f"{self.name} cannot run yet: {self.reason}")
        if state is not None or final or cu_seqlens is not None or mask is not None:
            raise NotImplementedError(f"{self.name} runs by its definition, without states or masks: {self.reason}")
        refuse_compiled(self, backend)
        self.problem(*data, **gates)  # refuses what does not fit
        data = [as_float(x) for x in data]
        lead = np.broadcast_shapes(*(x.shape[:-2] for x in data))
        data = [np.broadcast_to(x, lead + x.shape[-2:]) for x in data]
        answers = [recall(self, *(x[i] for x in data), **self.gates_of(gates, lead, i)) for i in np.ndindex(lead)]
        o = np.array(answers).reshape((*lead, data[0].shape[-2], data[-1].shape[-1]))
        return o.astype(np.result_type(*(x.dtype for x in data)), copy=False)

    def gates_of(self, gates: Mapping[str, Any], lead: tuple[int, ...], i: tuple[int, ...]) -> dict[str, Any]:
        """The gates of one sequence of many: what has leading axes broadcasts to theirs."""
        own = {name: len(gate.axes.split()) for name, gate in self.gates.items()}
        many = {name: x for name, x in gates.items() if 0 < own.get(name, 0) < np.ndim(x)}
        return gates | {name: np.broadcast_to(x, lead + np.shape(x)[-own[name] :])[i] for name, x in many.items()}

    def __str__(self) -> str:
        return self.name


def refuse_compiled(layer: Layer, backend: Any) -> None:
    """A definition is NumPy: an error for a backend that is another, or a warning if NumPy may take its place."""
    choice = chosen(backend)
    if choice in ("auto", "numpy") or choice[0] == "numpy":
        return
    words = f"{layer.name} runs by its definition, on backend 'numpy'; backend is {choice!r}"
    if "numpy" not in choice:
        raise NotImplementedError(words)
    warnings.warn(words, RuntimeWarning, stacklevel=frames_of_package())


def check_data(layer: Layer, data: dict[str, Any]) -> None:
    """Refuse complex queries, keys and values, and sizes that do not fit; feature maps would hide both.

    Raises
    ------
    TypeError, ValueError
        Naming the input, and the axis.
    """
    for name, x in data.items():
        if x.dtype.kind == "c" and name != "x":
            raise TypeError(f"{name} is complex ({x.dtype}); {layer.name} takes real numbers")
        if name in ("q", "k") and x.shape[-1:] == (0,):  # no scale, no feature map
            raise ValueError(f"axis 'k' is 0 in {name}; {layer.name} needs keys of size 1 or more")
    if "steps" in layer.gates:  # several pairs per token
        check(q=data["q"])
        check(**{name: x for name, x in data.items() if name != "q"})
    else:
        check(**data)


def tokens_of(layer: Layer, p: Mapping[str, Any], mask: Any, cu_seqlens: Any) -> dict[str, Any]:
    """Mask and boundaries that are such and fit the inputs; what a route does with them would hide both."""
    if mask is not None:
        mask = check_mask(mask)
        check(**{name: p[name] for name in layer.data if name == "q" or "steps" not in layer.gates}, mask=mask)
        mask = moved(p, mask)
    if cu_seqlens is not None:
        cu_seqlens = check_boundaries(cu_seqlens, p[layer.data[0]].shape[-2])
    return {"mask": mask, "cu_seqlens": cu_seqlens}


def as_float(x: Any) -> Any:
    """An array as it is, integers and lists as float64."""
    x = x if hasattr(x, "dtype") and hasattr(x, "__array_function__") else as_numpy(x)
    return x.astype(np.float64) if x.dtype.kind in "iu" else x


def at_least_single(x: Any) -> Any:
    """16-bit data as float32: what a layer does before and after its operator is never rounded below that."""
    return x.astype(np.float32) if x.dtype.name in HALF else x


def expand(layer: Layer, name: str, value: Any, p: dict[str, Any]) -> Any:
    """A gate with all its axes: a number holds everywhere, an array broadcasts (``(h, 1)`` is one number per head).

    Raises
    ------
    TypeError, ValueError
        If a gate or an option is no real number where it has to be, or an array does not broadcast to the gate's axes.
    """
    if callable(value):
        value = value(p)
        value = moved(p, value) if np.ndim(value) else value
    axes = tuple(layer.gates[name].axes.split())
    if not axes:
        check_option(layer, name, value, p)
        return value
    value = as_array(name, value)
    if value.dtype.kind == "c" and name != "readout":
        raise TypeError(f"{name} is complex ({value.dtype}); {layer.name} takes real numbers")
    sizes = sizes_of(value, axes, p)
    full = tuple(sizes.get(axis, 1) for axis in axes)
    lead = (p["k"] if "k" in p else p["x"]).shape[:-2] if axes[0] in "ts" else ()
    if value.ndim == 0:
        return moved(p, np.full(lead + full, value))
    if axes[0] != "t":
        check_fixed(layer, name, value, full, p)
        return value
    if any(axis not in sizes for axis in axes):
        return value
    check_broadcasts(name, value, lead, axes, full)
    check_leading(layer, name, value, axes, p)
    return np.broadcast_to(value, np.broadcast_shapes(value.shape, lead + full))


def sizes_of(value: Any, axes: tuple[str, ...], p: Mapping[str, Any]) -> dict[str, int]:
    """Sizes of the axes that a gate may have, as far as the problem, or the gate itself, knows them."""
    like, asked = (p[x] for x in (("k", "q") if "k" in p else ("x", "x")))
    sizes = {"t": asked.shape[-2], "s": like.shape[-2], "k": like.shape[-1], "d": like.shape[-1]}
    sizes["p"] = (like.shape[-1] + 1) // 2  # pairs of channels
    sizes["v"] = p["v"].shape[-1] if "v" in p else like.shape[-1]
    if axes == ("m", "k"):
        sizes["m"] = value.shape[0] if value.ndim else 1  # landmarks: any number
    else:
        sizes["m"] = value.shape[-1] if value.ndim and value.shape[-1] > 1 else like.shape[-1]  # slots: any number
    return sizes | ({"n": p["modes"]} if "modes" in p else {})


def check_broadcasts(name: str, value: Any, lead: tuple[int, ...], axes: tuple[str, ...], full: Any) -> None:
    """A gate broadcasts to its axes; what comes before them is its own affair."""
    try:
        shape = np.broadcast_shapes(value.shape, lead + full)
    except ValueError:
        shape = ()
    if shape[-len(full) :] != full:
        words = f"which does not broadcast to (..., {' '.join(axes)}) = {lead + full}"
        raise ValueError(f"{name} has shape {value.shape}, {words}")


def check_leading(layer: Layer, name: str, value: Any, axes: tuple[str, ...], p: Mapping[str, Any]) -> None:
    """A definition knows one sequence, and decays are told apart by their number of axes: no gate brings more."""
    most = max(p[x].ndim - 2 for x in layer.data) + len(axes)
    if value.ndim > most and (layer.operator is None or name == "log_decay" and "q" in p):
        raise ValueError(f"{name} has {value.ndim} axes; beside {', '.join(layer.data)} it has at most {most}")


def check_fixed(layer: Layer, name: str, value: Any, full: tuple[int, ...], p: Mapping[str, Any]) -> None:
    """A gate without a time axis fits; one that the operator takes under its name is refused there."""
    if layer.operator is not None and name in promises(getattr(operators, layer.operator)):
        return
    axes = tuple(layer.gates[name].axes.split())
    if axes in (("n",), ("m", "k")):
        if value.shape != full:
            raise ValueError(f"{name} has shape {value.shape}, needs ({' '.join(axes)}) = {full}")
    else:
        lead = np.broadcast_shapes(*(p[x].shape[:-2] for x in layer.data))
        check_broadcasts(name, value, lead, ("1", *axes), (1, *full))


def check_option(layer: Layer, name: str, value: Any, p: Mapping[str, Any]) -> None:
    """An option is one number, in its range if only the layer knows it; one that may be an array the operator refuses.

    Raises
    ------
    TypeError, ValueError
        Naming the option and its value.
    """
    known = {} if layer.operator is None else promises(getattr(operators, layer.operator))
    if name in known and not known[name][1]:
        return
    if name == "lower_bound" and np.ndim(value):  # may also be one number per channel
        value = as_array(name, value)
        check_broadcasts(name, value, (), ("t", "k"), p["k"].shape)
    else:
        check_number(name, value, "int" if type(layer.gates[name].default) is int else "float")
    low, high = (-np.inf, np.inf) if name in known else OPTION_LIMITS.get(name, (-np.inf, np.inf))
    if not np.all((value >= low) & (value <= high)):
        words = f"be at least {low}" if high == np.inf else f"lie in [{low}, {high}]"
        raise ValueError(f"{name} must {words}; it is {value}")


# ---- gates that many lines share -------------------------------------------------------------------------------------

DECAY = Gate(np.log(0.99), "log_decay = log sigmoid(W x)")
CHANNEL_DECAY = Gate(np.log(0.99), "log_decay = log sigmoid(W x) / 16, per key channel", "t k")
STEP = Gate(0.9, "beta = sigmoid(W x)")
DT_DECAY = Gate(np.log(0.99), "log_decay = -exp(A) softplus(W x + dt)")
DT_CHANNEL_DECAY = Gate(np.log(0.99), "log_decay = -exp(A) softplus(W x + dt), per key channel", "t k")
SCALE = Gate(lambda p: p["q"].shape[-1] ** -0.5, "fixed, 1 / sqrt(d)", "")
GAIN = Gate(lambda p: 2.5 * p["q"].shape[-1] ** 0.5, "learned gain, here 2.5 sqrt(d)", "")
RIDGE = Gate(1.0, "fixed or learned, > 0", "")
BANDWIDTH = Gate(1.0, "fixed or learned, > 0", "")
BATCH = Gate(16, "fixed", "")
INNER_STEP = Gate(0.1, "step_size = eta sigmoid(W x) / d")
SMALL_STEP = Gate(0.02, "step_size = eta sigmoid(W x)")  # deep memories diverge at the step a linear one likes
UNIFORM, LINEAR, CONSTANT, ONE_STEP = Uniform(), Linear(), LocalPolynomial(0), GradientDescent(1)


def exponential(q: Any, keys: Any, p: Mapping[str, Any]) -> Any:
    """exp(scale q . k), up to a factor that all keys share."""
    scores = p["scale"] * (keys @ q)
    return np.exp(scores - scores.max())


def distance_kernel(shape: Callable[[Any], Any], text: str) -> Kernel:
    """A kernel of u^2 = |q - k|^2 / bandwidth^2."""
    return Kernel(lambda q, keys, p: shape(np.sum((keys - q) ** 2, axis=-1) / p["bandwidth"] ** 2), text)


EXPONENTIAL = Kernel(exponential, "kernel exp(q.k)")
EPANECHNIKOV = distance_kernel(lambda u: np.maximum(1 - u, 0), "kernel (1 - u^2)+")
BIWEIGHT = distance_kernel(lambda u: np.maximum(1 - u, 0) ** 2, "kernel (1 - u^2)+^2")
BOXCAR = distance_kernel(lambda u: (u <= 1).astype(float), "kernel 1[u <= 1]")
GAUSSIAN = distance_kernel(lambda u: np.exp(-u / 2), "kernel exp(-u^2/2)")


def changed(p: dict[str, Any], **new: Any) -> dict[str, Any]:
    """The problem with some arrays replaced or added."""
    return {**p, **new}


def unit_keys(p: dict[str, Any]) -> dict[str, Any]:
    """Queries and keys of length one."""
    return changed(p, q=features.normalize_l2(p["q"]), k=features.normalize_l2(p["k"]))


def unit_values(p: dict[str, Any]) -> dict[str, Any]:
    """Values of length one."""
    return changed(p, v=features.normalize_l2(p["v"]))


def key_scaled(p: dict[str, Any]) -> dict[str, Any]:
    """Keys over sqrt(d)."""
    return changed(p, k=p["k"] * p["k"].shape[-1] ** -0.5)


def query_scaled(p: dict[str, Any]) -> dict[str, Any]:
    """Queries over sqrt(d)."""
    return changed(p, q=p["q"] * p["q"].shape[-1] ** -0.5)


def tied_gate(p: dict[str, Any]) -> dict[str, Any]:
    """HGRN2: the key is what the forget gate lets go; k holds the gate before its sigmoid."""
    log_decay = np.log(p["lower_bound"] + (1 - p["lower_bound"]) * features.sigmoid(p["k"]))
    return changed(p, log_decay=log_decay, k=-np.expm1(log_decay).astype(p["k"].dtype))


def complement(p: dict[str, Any]) -> dict[str, Any]:
    """The input gate is what the decay lets go."""
    return changed(p, input_gate=-np.expm1(p["log_decay"]))


def recall_corrected(p: dict[str, Any]) -> dict[str, Any]:
    """Comba: the erased key is a share of the key, and the query gives up a share of that."""
    erase_key = p["k"] * np.asarray(p["erase"][..., None], p["k"].dtype)
    return changed(p, erase_key=erase_key, q=p["q"] - np.asarray(p["correction"][..., None], p["q"].dtype) * erase_key)


def gated_sides(p: dict[str, Any]) -> dict[str, Any]:
    """GDN-2: a gate per channel on the erased key, another on the written value."""
    erase_key = p["k"] * np.asarray(p["erase"], p["k"].dtype)
    return changed(
        p, erase_key=erase_key, v=p["v"] * np.asarray(p["write"], p["v"].dtype), beta=np.ones(p["k"].shape[:-1])
    )


def in_context(p: dict[str, Any]) -> dict[str, Any]:
    """RWKV-7: the removed key is normalised, the stored key weakened where little is removed."""
    rate = np.asarray(p["rate"], p["k"].dtype)
    stored = p["k"] * (1 + (rate - 1) * np.asarray(p["replacement"], p["k"].dtype))
    return changed(p, rate=rate, removal_key=features.normalize_l2(p["k"] * p["removal"]), stored_key=stored)


def repeated_steps(p: dict[str, Any]) -> dict[str, Any]:
    """Pairs of all steps in a row; one pair per token is stepped on several times, and so is one step size."""
    n, long = p["steps"], p["steps"] * p["q"].shape[-2]
    k, v = (p[x] if p[x].shape[-2] == long else np.repeat(p[x], n, axis=-2) for x in ("k", "v"))
    beta = p["beta"] if p["beta"].shape[-1] == long else np.repeat(p["beta"], n, axis=-1)
    return changed(p, k=k, v=v, beta=beta)


def discretized(p: dict[str, Any]) -> dict[str, Any]:
    """Mamba-2 and Mamba-3: the step length is how long the memory decays."""
    if not any(on_device(p[name]) for name in ("delta", "rate")):  # a GPU is not waited for: the operator looks
        check_gates({name: p[name] for name in ("delta", "rate")})
    return changed(p, log_decay=-p["delta"] * p["rate"])


def second_order(p: dict[str, Any]) -> dict[str, Any]:
    """HLA: a value is stored under what its query recalls of the keys so far, sum_{i <= t} (q_t . k_i) k_i."""
    return changed(p, k=np.tril(p["q"] @ np.swapaxes(p["k"], -1, -2)) @ p["k"])


def own_memory(p: dict[str, Any]) -> dict[str, Any]:
    """A pattern is stored under itself."""
    return changed(p, v=p["k"])


def as_values(p: dict[str, Any]) -> dict[str, Any]:
    """A scan as a memory with one key: the input is the value."""
    one = np.ones_like(p["x"][..., :1])
    return changed(p, q=one, k=one, v=p["x"])


def hgrn_input(p: dict[str, Any]) -> dict[str, Any]:
    """What the forget gate lets go is filled with the input."""
    p = as_values(p)
    return changed(p, v=p["v"] * -np.expm1(p["log_decay"]).astype(p["v"].dtype))


def rg_lru_input(p: dict[str, Any]) -> dict[str, Any]:
    """The input is scaled so that a stationary input keeps its variance."""
    p = as_values(p)
    gain = np.sqrt(-np.expm1(2 * p["log_decay"])) * p["input_gate"]
    return changed(p, v=p["v"] * gain.astype(p["v"].dtype))


def lru_input(p: dict[str, Any]) -> dict[str, Any]:
    """Decay exp(-exp(nu)), angle exp(theta), input scaled by sqrt(1 - |lambda|^2)."""
    p = as_values(p)
    log_decay = -np.exp(p["nu"]) + np.zeros(p["x"].shape)
    gain = np.sqrt(-np.expm1(2 * log_decay)).astype(p["v"].dtype)
    return changed(p, v=p["v"] * gain, log_decay=log_decay, phase=np.exp(p["theta"]) + np.zeros(p["x"].shape))


def s4d_modes(p: dict[str, Any]) -> dict[str, Any]:
    """S4D-Lin: modes -1/2 + i pi n, discretised by a zero-order hold."""
    p = as_values(p)
    A = -0.5 + 1j * np.pi * np.arange(p["modes"])
    rates = A * p["step_length"]
    return changed(p, modes=rates, drive=np.expm1(rates) / A)


def s4d_kernel(p: Mapping[str, Any], ages: np.ndarray) -> np.ndarray:
    """The long convolution that the modes sum to."""
    kernel = 2 * (np.exp(ages[:, None] * p["modes"]) @ (p["drive"] * p["readout"])).real
    return np.broadcast_to(kernel[:, None], (len(ages), p["v"].shape[-1]))


def s5_modes(p: dict[str, Any]) -> dict[str, Any]:
    """S5: all channels drive one complex diagonal system through fixed maps in and out."""
    d, n = p["x"].shape[-1], p["modes"]
    rng = np.random.default_rng(p["seed"])
    maps = rng.standard_normal((2, n, d)) + 1j * rng.standard_normal((2, n, d))
    rates = (-0.5 + 1j * np.pi * np.arange(n)) * p["step_length"]
    p = as_values(p)
    single = np.complex64 if p["x"].dtype.itemsize < 8 else np.complex128
    v = (p["x"] @ (maps[0] / np.sqrt(2 * d)).T).astype(single)
    return changed(p, v=v, log_decay=rates.real, phase=rates.imag, readout=maps[1] / np.sqrt(2 * n))


def s5_weights(p: Mapping[str, Any], ages: np.ndarray) -> np.ndarray:
    """exp(rate * age) of every mode."""
    return np.exp(ages[:, None] * (p["log_decay"] + 1j * p["phase"]))


def s5_answer(o: Any, p: Mapping[str, Any]) -> Any:
    """The real part of the readout."""
    return (o @ p["readout"]).real.astype(p["x"].dtype)


def nystrom(p: dict[str, Any]) -> dict[str, Any]:
    """Features in which a Gaussian kernel is an inner product, exact at the landmarks: kappa(x, L) kappa(L, L)^-1/2."""
    landmarks = np.asarray(p["landmarks"], np.float64)
    if not np.all(np.isfinite(landmarks)):
        raise ValueError(f"landmarks must be finite; they hold {landmarks[~np.isfinite(landmarks)][0]}")
    if not p["bandwidth"] > 0:
        raise ValueError(f"bandwidth must be positive, got {p['bandwidth']}")
    values, vectors = np.linalg.eigh(gaussian(landmarks, landmarks, p["bandwidth"]))
    keep = values > 1e-10 * values.max()
    root = vectors[:, keep] / np.sqrt(values[keep])
    q, k = ((gaussian(p[x], landmarks, p["bandwidth"]) @ root).astype(p[x].dtype) for x in ("q", "k"))
    return changed(p, q=q, k=k)


def gaussian(x: Any, y: Any, bandwidth: float) -> Any:
    """exp(-|x - y|^2 / (2 bandwidth^2)) between all rows."""
    square = np.sum(x * x, -1)[..., :, None] + np.sum(y * y, -1)[..., None, :] - 2 * x @ np.swapaxes(y, -1, -2)
    return np.exp(-np.maximum(square, 0) / (2 * bandwidth**2))


def landmarks(p: dict[str, Any]) -> np.ndarray:
    """32 random unit vectors."""
    return features.normalize_l2(np.random.default_rng(0).standard_normal((32, p["q"].shape[-1])))


def one_per_level(p: dict[str, Any]) -> np.ndarray:
    """Weights of dyadic ages that fall slowly: 1, 0.9, 0.81, ...; the last holds for everything older."""
    return np.broadcast_to(0.9 ** np.arange(17.0), p["q"].shape[:-1] + (17,)).astype(p["q"].dtype)


def receptance(o: Any, p: Mapping[str, Any]) -> Any:
    """RWKV-4's output gate: the query only opens and closes channels."""
    return features.sigmoid(p["q"]) * o


def skip(o: Any, p: Mapping[str, Any]) -> Any:
    """The input's direct path."""
    return o + p["skip"] * p["v"]


def gaussian_space(p: Any, x: Any, i: Any, y: Any, j: Any) -> Any:
    """The Gaussian kernel."""
    return gaussian(x, y, p["bandwidth"])


def exponential_space(p: Any, x: Any, i: Any, y: Any, j: Any) -> Any:
    """exp(x . y / bandwidth^2)."""
    return np.exp(x @ y.T / p["bandwidth"] ** 2)


def drifting_space(p: Any, x: Any, i: Any, y: Any, j: Any) -> Any:
    """Covariance of linear maps that drift as a random walk: x . y (1 / ridge + noise * min(i, j))."""
    elapsed = np.minimum(i[:, None], j[None, :]) + 1
    return (x @ y.T) * (1 / p["ridge"] + p["process_noise"] * elapsed)


def slot_decays(p: dict[str, Any]) -> np.ndarray:
    """GSA with as many slots as key channels, each forgetting at its own pace."""
    return np.broadcast_to(np.log(0.5 + 0.49 * np.linspace(0, 1, p["k"].shape[-1])), p["k"].shape)


def slot_shares(p: dict[str, Any]) -> np.ndarray:
    """ABC with as many slots as key channels, each written with a share of every token."""
    return features.softmax(4 * p["k"])


def sum_one_dpfp(x: np.ndarray) -> np.ndarray:
    """DPFP features over their sum, as the layer uses them."""
    phi = features.dpfp(x, 1)
    total = phi.sum(axis=-1, keepdims=True)
    return np.divide(phi, total, out=np.zeros_like(phi), where=total != 0)


def normalised_map(name: str, paper: str, phi: Callable[[Any], Any], text: str, **more: Any) -> Layer:
    """Linear attention in a feature map, divided by its total weight: a local constant with kernel phi(q) . phi(k)."""
    weights = DotProduct(phi, f"kernel {text}")
    return Layer(name, weights, CONSTANT, Exact(), "linear_attention", paper, options={"normalize": True}, **more)


def distance_attention(name: str, weights: Kernel, kernel: str, paper: str) -> Layer:
    """A local constant with a kernel of the distance."""
    options = {"kernel": kernel, "degree": 0}
    return Layer(name, weights, CONSTANT, Exact(), "local_polynomial", paper, {"bandwidth": BANDWIDTH}, options=options)


def delta(name: str, optimizer: Online, paper: str, gates: dict[str, Gate], **more: Any) -> Layer:
    """A line of the delta-rule family."""
    return Layer(name, UNIFORM, LINEAR, optimizer, "delta_rule", paper, gates, **more)


def trained(name: str, memory: Callable[..., Any], text: str, optimizer: str, paper: str, **gates: Gate) -> Layer:
    """A line of the test-time training family."""
    regressor = Network(memory, text)
    gates = {"step_size": INNER_STEP, "batch_size": BATCH} | gates
    return Layer(
        name, UNIFORM, regressor, TestTimeTraining(optimizer), "test_time_training", paper, gates, route=routes.trained
    )


def impossible(name: str, paper: str, reason: str) -> Layer:
    """A line that cannot be expressed yet."""
    return Layer(name, None, None, None, None, paper, reason=reason)


MOMENTUM = Gate(0.5, "momentum = sigmoid(W x)")
FORGET = Gate(0.01, "weight_decay = sigmoid(W x)")
ONLINE_DECAY = Online(decay="log_decay", text="online, weight decay")
PRECONDITIONED = "online, preconditioned keys"


def second_moment(p: Mapping[str, Any], i: int) -> Any:
    """The key over its running second moment, as preconditioned DeltaNet writes it."""
    decay = p["log_decay"] if p["log_decay"].ndim == 2 else p["log_decay"][:, None]
    moment = sum(np.exp(decay[j + 1 : i + 1].sum(axis=0)) * p["beta"][j] * p["k"][j] ** 2 for j in range(i + 1))
    return p["k"][i] * routes.precondition(moment)


PRECONDITIONED_STEP = Online(decay="log_decay", write=second_moment, text=PRECONDITIONED)


def norm_ridge(p: Mapping[str, Any], weights: np.ndarray, t: int) -> float:
    """Gated KalmaNet: the ridge is a share of the Frobenius norm of the Gram matrix."""
    keys = p["k"][: t + 1]
    return p["share"] * np.linalg.norm((keys * weights[:, 0, :]).T @ keys)


# ---- the lines -------------------------------------------------------------------------------------------------------

LINES: list[Layer] = [
    # linear attention and its feature maps
    Layer(
        "linear_attention", UNIFORM, LINEAR, ONE_STEP, "linear_attention", "Katharopoulos et al. 2020, arXiv:2006.16236"
    ),
    normalised_map(
        "elu_linear_attention", "Katharopoulos et al. 2020, arXiv:2006.16236", features.elu_plus_one, "elu+1"
    ),
    normalised_map("performer", "Choromanski et al. 2021, arXiv:2009.14794", features.favor_features, "FAVOR+"),
    normalised_map(
        "rfa", "Peng et al. 2021, arXiv:2103.02143", features.random_fourier_features, "random Fourier", pose=unit_keys
    ),
    Layer(
        "gated_rfa",
        Decaying() * Weighted("input_gate") * DotProduct(features.random_fourier_features, "kernel random Fourier"),
        CONSTANT,
        Exact(),
        "linear_attention",
        "Peng et al. 2021, arXiv:2103.02143",
        {"log_decay": Gate(np.log(0.99), "log_decay = log sigmoid(W x); input gate 1 - exp(log_decay)")},
        options={"normalize": True},
        route=routes.input_gated,
        pose=lambda p: complement(unit_keys(p)),
    ),
    Layer(
        "cosformer",
        CosinePosition() * DotProduct(features.relu, "kernel relu"),
        CONSTANT,
        Exact(),
        "linear_attention",
        "Qin et al. 2022, arXiv:2202.08791",
        {"length": Gate(65536.0, "fixed, at least the length of the longest sequence", "")},
        route=routes.cosine_positions,
        carries=True,
    ),
    Layer(
        "dpfp",
        UNIFORM,
        Linear(sum_one_dpfp, "linear in DPFP"),
        ONE_STEP,
        "linear_attention",
        "Schlag et al. 2021, arXiv:2102.11174",
    ),
    normalised_map("based", "Arora et al. 2024, arXiv:2402.18668", features.taylor_features, "1 + s + s^2/2"),
    normalised_map("rebased", "Aksenov et al. 2024, arXiv:2402.10644", features.rebased_features, "(LN q . LN k)^2"),
    normalised_map("hedgehog", "Zhang et al. 2024, arXiv:2402.04347", features.hedgehog_features, "softmax(Wx)"),
    normalised_map("t2r", "Kasai et al. 2021, arXiv:2103.13076", features.relu, "relu"),
    Layer(
        "hla",
        UNIFORM,
        Linear(text="linear in what queries recall of keys"),
        ONE_STEP,
        None,
        "Zhang et al. 2025, arXiv:2510.27258",
        pose=second_order,
        reason="it memorises its queries with the pairs, and a memory that only stores is given none",
    ),
    normalised_map("symmetric_power", "Gelada et al. 2025, arXiv:2507.04239", features.symmetric_power, "(q.k)^2"),
    Layer(
        "polysketchformer",
        DotProduct(features.polynomial_sketch, "kernel sketched (q.k)^4"),
        Shrunk(),
        Exact(1.0),
        "linear_attention",
        "Kacham et al. 2023, arXiv:2310.01655",
        route=routes.shrunk,
    ),
    # decaying weights
    Layer(
        "retnet",
        Decaying(),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Sun et al. 2023, arXiv:2307.08621",
        {"log_decay": Gate(np.log(1 - 2.0**-6), "fixed per head, log(1 - 2^(-5-h))")},
        pose=query_scaled,
    ),
    Layer(
        "lightning",
        Decaying(),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Qin et al. 2024, arXiv:2401.04658",
        {"log_decay": Gate(-0.02, "fixed per head and depth, -(8h/H)(1 - l/L)")},
    ),
    Layer(
        "gla",
        Decaying(),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Yang et al. 2023, arXiv:2312.06635",
        {"log_decay": CHANNEL_DECAY},
    ),
    Layer(
        "hgrn2",
        Decaying(),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Qin et al. 2024, arXiv:2404.07904",
        {"lower_bound": Gate(0.9, "learned per layer, in [0, 1); k holds W x, f = lb + (1 - lb) sigmoid(k)", "")},
        pose=tied_gate,
        route=lambda layer, run, p, state: run(
            layer.operator, state, q=p["q"], k=p["k"], v=p["v"], log_decay=p["log_decay"]
        ),
    ),
    Layer(
        "gateloop",
        Decaying() * Rotating(),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Katsch 2023, arXiv:2311.01927",
        {"log_decay": CHANNEL_DECAY, "phase": Gate(0.01, "phase = W x, per key channel", "t k")},
        route=routes.rotating,
        carries=True,
    ),
    Layer(
        "mamba1",
        Selective(),
        LINEAR,
        ONE_STEP,
        "selective_scan",
        "Gu, Dao 2023, arXiv:2312.00752",
        {
            "delta": Gate(0.05, "delta = softplus(W x + dt), per value channel", "t v"),
            "A": Gate(-1.0, "A = -exp(A_log), per entry", "v k"),
            "skip": Gate(0.0, "D, per value channel", "v"),
        },
        route=routes.selective,
        answer=skip,
    ),
    Layer(
        "mamba2",
        Decaying() * Weighted("delta"),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Dao, Gu 2024, arXiv:2405.21060",
        {
            "delta": Gate(0.05, "delta = softplus(W x + dt)"),
            "rate": Gate(0.2, "exp(A_log) per head; log_decay = -delta rate"),
            "skip": Gate(0.0, "D, per value channel", "v"),
        },
        pose=discretized,
        route=routes.stepped,
        answer=skip,
    ),
    Layer(
        "mamba3",
        Decaying() * Turning() * Trapezoid(),
        ComplexLinear(),
        ONE_STEP,
        "linear_attention",
        "Lahoti et al. 2026, arXiv:2603.15569",
        {
            "delta": Gate(0.05, "delta = softplus(W x + dt)"),
            "rate": Gate(0.2, "softplus(W x); log_decay = -delta rate"),
            "mix": Gate(0.5, "lambda = sigmoid(W x): share of its own step that a pair counts"),
            "phase": Gate(0.01, "phase = delta pi tanh(W x), per pair of key channels", "t p"),
            "skip": Gate(0.0, "D, per value channel", "v"),
        },
        pose=discretized,
        route=routes.trapezoid,
        answer=skip,
        carries=True,
    ),
    Layer(
        "mlstm",
        Decaying() * Weighted("log_input", np.exp),
        Ratio(),
        ONE_STEP,
        "linear_attention",
        "Beck et al. 2024, arXiv:2405.04517",
        {"log_decay": DECAY, "log_input": Gate(0.0, "input gate exp(W x): log_input = W x")},
        pose=key_scaled,
        route=routes.mlstm,
        carries=True,
    ),
    Layer(
        "rwkv4",
        WithBonus(np.exp, "v") * Weighted("k", np.exp, text="exp(key)"),
        CONSTANT,
        Exact(),
        "diagonal_scan",
        "Peng et al. 2023, arXiv:2305.13048",
        {
            "log_decay": Gate(-0.05, "fixed per channel, -exp(w)", "t k"),
            "bonus": Gate(0.5, "learned per channel: u", "k"),
        },
        route=routes.rwkv4,
        answer=receptance,
        carries=True,
        blank=-np.inf,
    ),
    Layer(
        "rwkv5",
        WithBonus(),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Peng et al. 2024, arXiv:2404.05892",
        {
            "log_decay": Gate(-0.02, "fixed per key channel, -exp(w)", "t k"),
            "bonus": Gate(0.5, "learned per key channel: u", "k"),
        },
    ),
    Layer(
        "rwkv6",
        WithBonus(),
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Peng et al. 2024, arXiv:2404.05892",
        {
            "log_decay": Gate(-0.02, "-exp(w + lora(x)), per key channel", "t k"),
            "bonus": Gate(0.5, "learned per key channel: u", "k"),
        },
    ),
    Layer(
        "gsa",
        Decaying() * Weighted("write", axis="k", text="1 - decay"),
        Prototypes(),
        ONE_STEP,
        "linear_attention",
        "Zhang et al. 2024, arXiv:2409.07146",
        {"log_decay": Gate(slot_decays, "log_decay = log sigmoid(W x) / 8, per slot", "t m"), "scale": SCALE},
        pose=lambda p: changed(p, write=-np.expm1(p["log_decay"])),
        route=routes.slots,
    ),
    Layer(
        "abc",
        Weighted("write", axis="k", text="slot gates"),
        Prototypes(),
        ONE_STEP,
        "linear_attention",
        "Peng et al. 2022, arXiv:2110.02488",
        {"write": Gate(slot_shares, "softmax(W x), per slot", "t m"), "scale": SCALE},
        route=routes.slots,
    ),
    Layer(
        "log_linear_attention",
        Levels() * Decaying(),
        LINEAR,
        ONE_STEP,
        "log_linear_attention",
        "Guo et al. 2025, arXiv:2506.04761",
        {
            "levels": Gate(one_per_level, "levels = softplus(W x), per dyadic age", "t l"),
            "log_decay": Gate(0.0, "log_decay = log sigmoid(W x), or 0"),
        },
    ),
    # scans of channels
    Layer(
        "hgrn",
        Decaying(axis="v"),
        LINEAR,
        ONE_STEP,
        "diagonal_scan",
        "Qin et al. 2023, arXiv:2311.04823",
        {"log_decay": Gate(np.log(0.9), "log(lb + (1 - lb) sigmoid(W x)), per channel", "t d")},
        data=("x",),
        pose=hgrn_input,
        route=routes.scan,
    ),
    Layer(
        "s4d",
        Convolution(s4d_kernel),
        LINEAR,
        ONE_STEP,
        "diagonal_scan",
        "Gu et al. 2022, arXiv:2206.11893",
        {
            "step_length": Gate(0.1, "exp(W), fixed", ""),
            "modes": Gate(16, "number of modes", ""),
            "readout": Gate(lambda p: np.ones(p["modes"]), "C, learned, complex, per mode", "n"),
            "skip": Gate(0.0, "D, per channel", "d"),
        },
        data=("x",),
        pose=s4d_modes,
        route=routes.diagonal_system,
        answer=skip,
    ),
    Layer(
        "s5",
        Convolution(s5_weights),
        LINEAR,
        ONE_STEP,
        "diagonal_scan",
        "Smith et al. 2023, arXiv:2208.04933",
        {
            "step_length": Gate(0.1, "exp(W), fixed", ""),
            "modes": Gate(16, "number of modes", ""),
            "seed": Gate(0, "of the maps in and out", ""),
        },
        data=("x",),
        pose=s5_modes,
        route=routes.scan,
        answer=s5_answer,
    ),
    Layer(
        "lru",
        Decaying(axis="v") * Rotating("v"),
        LINEAR,
        ONE_STEP,
        "diagonal_scan",
        "Orvieto et al. 2023, arXiv:2303.06349",
        {
            "nu": Gate(-3.0, "decay exp(-exp(nu)), per channel", "d"),
            "theta": Gate(-1.0, "angle exp(theta), per channel", "d"),
        },
        data=("x",),
        pose=lru_input,
        route=routes.real_scan,
    ),
    Layer(
        "rg_lru",
        Decaying(axis="v"),
        LINEAR,
        ONE_STEP,
        "diagonal_scan",
        "De et al. 2024, arXiv:2402.19427",
        {
            "log_decay": Gate(-0.1, "-8 softplus(L) sigmoid(W x), per channel", "t d"),
            "input_gate": Gate(0.5, "sigmoid(W x), per channel", "t d"),
        },
        data=("x",),
        pose=rg_lru_input,
        route=routes.scan,
    ),
    # online gradient descent
    delta(
        "delta_rule",
        Online(),
        "Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2406.06484",
        {"beta": STEP},
    ),
    delta(
        "delta_rule_negative",
        Online(text="online, reflecting"),
        "Grazzi et al. 2024, arXiv:2411.12537",
        {"beta": Gate(1.2, "beta = 2 sigmoid(W x)")},
    ),
    delta("gated_deltanet", ONLINE_DECAY, "Yang et al. 2024, arXiv:2412.06464", {"beta": STEP, "log_decay": DT_DECAY}),
    delta("kda", ONLINE_DECAY, "Kimi team 2025, arXiv:2510.26692", {"beta": STEP, "log_decay": DT_CHANNEL_DECAY}),
    delta(
        "deltaproduct",
        Online(decay="log_decay", steps="steps", text="online, several steps"),
        "Siems et al. 2025, arXiv:2502.10297",
        {
            "beta": Gate(0.5, "beta = 2 sigmoid(W x), one per step", "s"),
            "log_decay": Gate(0.0, "as Gated DeltaNet, or 0"),
            "steps": Gate(2, "fixed; k and v hold this many pairs per token", ""),
        },
        pose=repeated_steps,
        route=routes.several_steps,
    ),
    delta(
        "comba",
        Online(decay="log_decay", read=lambda p, i: p["erase_key"][i], text="online, weight decay, share erased"),
        "Hu et al. 2025, arXiv:2506.02475",
        {
            "beta": STEP,
            "log_decay": DT_DECAY,
            "erase": Gate(0.9, "d = sigmoid(w)"),
            "correction": Gate(0.02, "D, learned per head"),
        },
        pose=recall_corrected,
        route=routes.erased,
    ),
    delta(
        "gdn2",
        Online(decay="log_decay", read=lambda p, i: p["erase_key"][i], text="online, weight decay, gated erasing"),
        "Hatamizadeh et al. 2026, arXiv:2605.22791",
        {
            "log_decay": DT_CHANNEL_DECAY,
            "erase": Gate(0.9, "sigmoid(W x), per key channel", "t k"),
            "write": Gate(0.9, "sigmoid(W x), per value channel", "t v"),
        },
        pose=gated_sides,
        route=routes.erased,
    ),
    Layer(
        "rwkv7",
        UNIFORM,
        LINEAR,
        Online(
            step=lambda p, i: 1.0,
            decay="log_decay",
            text="online, weight decay, rate per channel",
            undecayed=True,
            read=lambda p, i: p["removal_key"][i],
            write=lambda p, i: p["rate"][i] * p["removal_key"][i],
            stored=lambda p, i: p["stored_key"][i],
        ),
        "dplr",
        "Peng et al. 2025, arXiv:2503.14456",
        {
            "log_decay": Gate(-0.02, "-exp(-1/2) sigmoid(W x), per key channel", "t k"),
            "rate": Gate(0.9, "sigmoid(W x), per key channel", "t k"),
            "removal": Gate(1.0, "xi, learned per key channel", "k"),
            "replacement": Gate(0.5, "alpha, learned per key channel", "k"),
        },
        pose=in_context,
        route=routes.in_context_rate,
    ),
    delta(
        "longhorn",
        Online(implicit_step, text="online, implicit step"),
        "Liu et al. 2024, arXiv:2407.14207",
        {"beta": Gate(4.0, "beta = sigmoid(W x) or any positive number")},
        route=routes.adaptive(routes.implicit),
    ),
    delta(
        "efla",
        Online(flow_step, text="online, gradient flow"),
        "Lei et al. 2025, arXiv:2512.12602",
        {"beta": Gate(2.0, "beta = sigmoid(W x) or any positive number")},
        route=routes.adaptive(routes.flow),
    ),
    delta(
        "preconditioned_deltanet",
        PRECONDITIONED_STEP,
        "Tumma et al. 2026, arXiv:2604.21100",
        {"beta": STEP, "log_decay": Gate(0.0, "0")},
        route=routes.preconditioned,
    ),
    delta(
        "preconditioned_gdn",
        PRECONDITIONED_STEP,
        "Tumma et al. 2026, arXiv:2604.21100",
        {"beta": STEP, "log_decay": DT_DECAY},
        route=routes.preconditioned,
    ),
    delta(
        "preconditioned_kda",
        PRECONDITIONED_STEP,
        "Tumma et al. 2026, arXiv:2604.21100",
        {"beta": STEP, "log_decay": DT_CHANNEL_DECAY},
        route=routes.preconditioned,
    ),
    Layer(
        "gated_oja",
        UNIFORM,
        LINEAR,
        Oja(),
        "delta_rule",
        "Oja 1982; flash-linear-attention",
        {
            "beta": STEP,
            "log_decay": Gate(np.log(0.99), "log_decay = log sigmoid(W x), per channel of the unit values", "t v"),
        },
        pose=unit_values,
        route=routes.oja,
    ),
    delta("lms", Online(), "Widrow, Hoff 1960", {"beta": Gate(0.5, "fixed: mu")}),
    delta(
        "nlms",
        Online(normalized_step, text="online, normalised step"),
        "Nagumo, Noda 1967",
        {"beta": Gate(0.9, "fixed: mu, in (0, 2)"), "eps": Gate(1e-6, "fixed", "")},
        route=routes.adaptive(routes.normalized),
    ),
    delta(
        "leaky_lms",
        ONLINE_DECAY,
        "Mayyas, Aboulnasr 1997",
        {"beta": Gate(0.5, "fixed: mu"), "log_decay": Gate(-0.005, "fixed: log(1 - mu leak)")},
    ),
    Layer(
        "affine_projection",
        UNIFORM,
        LINEAR,
        Projection(),
        "affine_projection",
        "Ozeki, Umeda 1984",
        {"beta": Gate(0.9, "fixed: mu, in (0, 2)"), "order": Gate(2, "fixed", ""), "ridge": Gate(1e-3, "fixed", "")},
    ),
    # test-time training
    trained(
        "ttt_linear",
        lambda p: LinearMemory(bias=True, layer_norm=True, residual=True),
        "linear, layer norm, residual",
        "mini-batches",
        "Sun et al. 2024, arXiv:2407.04620",
    ),
    trained(
        "ttt_mlp",
        lambda p: MLP(None, bias=True, layer_norm=True, residual=True),
        "MLP, layer norm, residual",
        "mini-batches",
        "Sun et al. 2024, arXiv:2407.04620",
    ),
    trained(
        "titans",
        lambda p: MLP(None),
        "MLP",
        "mini-batches, momentum, weight decay",
        "Behrouz et al. 2025, arXiv:2501.00663",
        step_size=SMALL_STEP,
        momentum=MOMENTUM,
        weight_decay=FORGET,
    ),
    trained(
        "titans_linear",
        lambda p: LinearMemory(),
        "linear",
        "mini-batches, momentum, weight decay",
        "Behrouz et al. 2025, arXiv:2501.00663",
        momentum=MOMENTUM,
        weight_decay=FORGET,
    ),
    trained(
        "moneta",
        lambda p: MLP(None, loss=PNorm(3), retention=LqRetention(4)),
        "MLP, l4 retention",
        "mini-batches, l3 loss",
        "Behrouz et al. 2025, arXiv:2504.13173",
        step_size=SMALL_STEP,
        weight_decay=Gate(0.0, "1 - sigmoid(W x); its retention makes small weights large, so forget slowly"),
    ),
    trained(
        "yaad",
        lambda p: MLP(None, loss=Huber(1.0)),
        "MLP",
        "mini-batches, Huber loss, weight decay",
        "Behrouz et al. 2025, arXiv:2504.13173",
        weight_decay=FORGET,
    ),
    trained(
        "memora",
        lambda p: MLP(None, retention=EntropyRetention(1.0)),
        "MLP, entropy retention",
        "mini-batches",
        "Behrouz et al. 2025, arXiv:2504.13173",
        step_size=SMALL_STEP,
        weight_decay=FORGET,
    ),
    trained(
        "sign_lms",
        lambda p: LinearMemory(loss=PNorm(1)),
        "linear",
        "online, l1 loss",
        "Gersho 1984",
        batch_size=Gate(1, "1", ""),
        step_size=Gate(0.02, "fixed: mu"),
    ),
    trained(
        "momentum_lms",
        lambda p: LinearMemory(),
        "linear",
        "online, momentum",
        "Proakis 1974",
        batch_size=Gate(1, "1", ""),
        step_size=Gate(0.2, "fixed: mu"),
        momentum=Gate(0.5, "fixed"),
    ),
    trained("block_lms", lambda p: LinearMemory(), "linear", "mini-batches", "Clark et al. 1981"),
    Layer(
        "omeganet",
        UNIFORM,
        LINEAR,
        Omega(),
        None,
        "Behrouz et al. 2025, arXiv:2505.23735",
        {
            "beta": Gate(0.2, "sigmoid(W x)"),
            "log_decay": DECAY,
            "momentum": Gate(0.0, "0"),
            "window": Gate(4, "fixed", ""),
        },
        reason="the loss over a window of pairs has no operator; it runs by its definition",
    ),
    Layer(
        "atlas",
        UNIFORM,
        LINEAR,
        Omega(orthogonal=True),
        None,
        "Behrouz et al. 2025, arXiv:2505.23735",
        {
            "beta": Gate(0.2, "sigmoid(W x)"),
            "log_decay": DECAY,
            "momentum": MOMENTUM,
            "window": Gate(4, "fixed", ""),
        },
        reason="steps made orthogonal are not linear in the memory; it runs by its definition",
    ),
    # exact least squares
    Layer(
        "recursive_least_squares",
        Decaying() * Weighted("beta", text="weighted"),
        LINEAR,
        Exact("ridge", decaying=True),
        "recursive_least_squares",
        "Plackett 1950",
        {
            "log_decay": Gate(np.log(0.998), "fixed: log of the forgetting factor"),
            "beta": Gate(1.0, "1"),
            "ridge": RIDGE,
        },
    ),
    Layer(
        "kalman",
        UNIFORM,
        RKHS(drifting_space, "linear, drifting"),
        Exact("measurement_noise"),
        "kalman_filter",
        "Kalman 1960",
        {
            "process_noise": Gate(1e-3, "variance of the drift per step", ""),
            "measurement_noise": Gate(1.0, "variance of the values", ""),
            "ridge": RIDGE,
        },
    ),
    Layer(
        "mesa_layer",
        Decaying(),
        LINEAR,
        Exact("ridge", decaying=True),
        "recursive_least_squares",
        "von Oswald et al. 2023, arXiv:2309.05858",
        {"log_decay": Gate(np.log(0.998), "log sigmoid(W x)"), "ridge": RIDGE},
    ),
    Layer(
        "mesanet",
        Decaying() * Weighted("beta"),
        LINEAR,
        Exact("ridge"),
        "mesa",
        "von Oswald et al. 2025, arXiv:2506.05233",
        {
            "log_decay": Gate(np.log(0.998), "log sigmoid(W x), bounded by beta"),
            "beta": Gate(1.0, "sigmoid(W x)"),
            "ridge": Gate(1.0, "0.25 + softplus(w), a number or per key channel", ""),
        },
    ),
    Layer(
        "gated_kalmanet",
        Decaying(),
        LINEAR,
        Exact(norm_ridge),
        None,
        "Peng et al. 2025, arXiv:2511.21016",
        {"log_decay": Gate(np.log(0.998), "log sigmoid(W x)"), "share": Gate(0.02, "fixed", "")},
        reason="its ridge is tied to the norm of the Gram matrix and changes at every step; mesa's is constant",
    ),
    Layer(
        "intention",
        UNIFORM,
        LINEAR,
        Exact("ridge"),
        "mesa",
        "Garnelo, Czarnecki 2023, arXiv:2305.10203",
        {"ridge": Gate(0.1, "fixed or learned, > 0", "")},
    ),
    Layer(
        "least_squares",
        UNIFORM,
        LINEAR,
        Exact(),
        "mesa",
        "Wang, Shi, Fox 2025, arXiv:2501.12352",
        options={"ridge": 0.0},
    ),
    # nonparametric
    Layer(
        "softmax",
        EXPONENTIAL,
        CONSTANT,
        Exact(),
        "softmax_attention",
        "Vaswani et al. 2017, arXiv:1706.03762",
        {"scale": SCALE},
    ),
    Layer(
        "qknorm",
        EXPONENTIAL,
        CONSTANT,
        Exact(),
        "softmax_attention",
        "Henry et al. 2020, arXiv:2010.04245",
        {"scale": GAIN},
        pose=unit_keys,
    ),
    Layer(
        "sliding_window",
        Window() * EXPONENTIAL,
        CONSTANT,
        Exact(),
        "softmax_attention",
        "Beltagy et al. 2020, arXiv:2004.05150",
        {"scale": GAIN, "window": Gate(64, "fixed", "")},
    ),
    Layer(
        "attention_sinks",
        Window(sinks="sinks") * EXPONENTIAL,
        CONSTANT,
        Exact(),
        "softmax_attention",
        "Xiao et al. 2023, arXiv:2309.17453",
        {"scale": GAIN, "window": Gate(64, "fixed", ""), "sinks": Gate(4, "fixed", "")},
    ),
    Layer(
        "alibi",
        Decaying() * EXPONENTIAL,
        CONSTANT,
        Exact(),
        "softmax_attention",
        "Press et al. 2021, arXiv:2108.12409",
        {"scale": GAIN, "log_decay": Gate(-(2.0**-8), "fixed per head, -2^(-8h/H)")},
    ),
    Layer(
        "forgetting_attention",
        Decaying() * EXPONENTIAL,
        CONSTANT,
        Exact(),
        "softmax_attention",
        "Lin et al. 2025, arXiv:2503.02130",
        {"scale": GAIN, "log_decay": DECAY},
    ),
    Layer(
        "path",
        Transported(),
        CONSTANT,
        Exact(),
        "path_attention",
        "Yang et al. 2025, arXiv:2505.16381",
        {
            "beta": Gate(0.1, "2 sigmoid(W x)"),
            "w": Gate(lambda p: features.normalize_l2(p["k"]), "normalised conv(W x)", "t k"),
            "scale": GAIN,
        },
    ),
    Layer(
        "wall_attention",
        Fading(),
        CONSTANT,
        Exact(),
        "wall_attention",
        "flash-linear-attention (Averbuch, Pai)",
        {"log_decay": CHANNEL_DECAY, "scale": GAIN},
    ),
    Layer(
        "deltaformer",
        EXPONENTIAL,
        CONSTANT,
        Corrected(),
        "delta_attention",
        "Zhong et al. 2025, arXiv:2505.19488",
        {
            "beta": Gate(1.0, "1, or W x"),
            "erase_key": Gate(lambda p: p["k"], "the key itself, or W x", "t k"),
            "scale": GAIN,
        },
    ),
    Layer(
        "stick_breaking",
        StickBreaking(),
        Constant(),
        ONE_STEP,
        "stick_breaking_attention",
        "Tan et al. 2024, arXiv:2410.17980",
        {"scale": GAIN},
    ),
    Layer(
        "sparsemax",
        Sparse(2.0),
        CONSTANT,
        Exact(),
        "sparse_attention",
        "Martins, Astudillo 2016, arXiv:1602.02068",
        {"scale": GAIN},
        options={"alpha": 2.0},
    ),
    Layer(
        "entmax",
        Sparse(1.5),
        CONSTANT,
        Exact(),
        "sparse_attention",
        "Peters et al. 2019, arXiv:1905.05702",
        {"scale": GAIN},
        options={"alpha": 1.5},
    ),
    distance_attention("gaussian_attention", GAUSSIAN, "gaussian", "Nadaraya 1964, Watson 1964"),
    distance_attention("epanechnikov", EPANECHNIKOV, "epanechnikov", "Epanechnikov 1969"),
    distance_attention("biweight", BIWEIGHT, "biweight", "Fan, Gijbels 1996"),
    distance_attention("boxcar", BOXCAR, "boxcar", "Fan, Gijbels 1996"),
    Layer(
        "hopfield",
        EXPONENTIAL,
        CONSTANT,
        Exact(),
        "softmax_attention",
        "Ramsauer et al. 2020, arXiv:2008.02217",
        {"scale": GAIN},
        data=("q", "k"),
        pose=own_memory,
        route=lambda layer, run, p, state: run(layer.operator, state, q=p["q"], k=p["k"], v=p["v"], scale=p["scale"]),
    ),
    Layer(
        "classical_hopfield",
        UNIFORM,
        LINEAR,
        ONE_STEP,
        "linear_attention",
        "Hopfield 1982",
        data=("q", "k"),
        pose=own_memory,
    ),
    Layer(
        "kernel_ridge",
        UNIFORM,
        RKHS(gaussian_space, "RKHS, Gaussian"),
        Exact("ridge"),
        "kernel_ridge",
        "Saunders et al. 1998",
        {"ridge": Gate(0.1, "fixed or learned, > 0", ""), "bandwidth": Gate(0.5, "fixed or learned, > 0", "")},
    ),
    Layer(
        "gaussian_process",
        UNIFORM,
        RKHS(gaussian_space, "RKHS, Gaussian"),
        Exact("ridge"),
        "kernel_ridge",
        "Rasmussen, Williams 2006",
        {"ridge": Gate(0.01, "variance of the noise", ""), "bandwidth": Gate(1.0, "length scale", "")},
    ),
    Layer(
        "kernel_intention",
        UNIFORM,
        RKHS(exponential_space, "RKHS, exponential"),
        Exact("ridge"),
        "kernel_ridge",
        "Garnelo, Czarnecki 2023, arXiv:2305.10203",
        {"ridge": Gate(0.1, "fixed or learned, > 0", ""), "bandwidth": Gate(0.7, "fixed or learned, > 0", "")},
        options={"kernel": "exponential"},
    ),
    Layer(
        "soft",
        UNIFORM,
        Linear(text="linear in Nystrom features"),
        ONE_STEP,
        "linear_attention",
        "Lu et al. 2021, arXiv:2110.11945",
        {"landmarks": Gate(landmarks, "m sampled tokens", "m k"), "bandwidth": BANDWIDTH},
        pose=nystrom,
        route=lambda layer, run, p, state: run(layer.operator, state, q=p["q"], k=p["k"], v=p["v"]),
    ),
    Layer(
        "skyformer",
        UNIFORM,
        Linear(text="linear in Nystrom features"),
        Exact("ridge"),
        "mesa",
        "Chen et al. 2021, arXiv:2111.00035",
        {
            "landmarks": Gate(landmarks, "m sampled tokens", "m k"),
            "bandwidth": BANDWIDTH,
            "ridge": Gate(0.1, "fixed, > 0", ""),
        },
        pose=nystrom,
        route=lambda layer, run, p, state: run(layer.operator, state, q=p["q"], k=p["k"], v=p["v"], ridge=p["ridge"]),
    ),
    Layer(
        "local_linear",
        EXPONENTIAL,
        LocalPolynomial(1),
        Exact("ridge"),
        "local_polynomial",
        "Zuo et al. 2025, arXiv:2510.01450",
        {"scale": GAIN, "ridge": Gate(1e-2, "fixed or learned, > 0", "")},
        options={"degree": 1},
    ),
    Layer(
        "local_quadratic",
        EXPONENTIAL,
        LocalPolynomial(2),
        Exact("ridge"),
        "local_polynomial",
        "Wang, Shi, Fox 2025, arXiv:2501.12352",
        {"scale": GAIN, "ridge": Gate(1e-2, "fixed or learned, > 0", "")},
        options={"degree": 2},
    ),
    Layer(
        "parallax",
        EXPONENTIAL,
        Slope(),
        Exact(),
        "softmax_attention",
        "Zuo et al. 2026, arXiv:2605.29157",
        {"scale": GAIN, "r": Gate(lambda p: -p["q"], "a second query, W x", "t k")},
        route=routes.parallax,
    ),
    # not yet
    impossible(
        "lattice",
        "Karami, Mirrokni 2025, arXiv:2504.05646",
        "slots updated orthogonally to themselves have no operator",
    ),
    impossible("swila", "2026", "several regressors per output joined by online EM have no operator"),
    impossible(
        "native_sparse_attention", "Yuan et al. 2025, arXiv:2502.11089", "its blocks are selected by learned scores"
    ),
    impossible("lact", "Zhang et al. 2025, arXiv:2505.23884", "its memory is a gated SwiGLU trained with Muon"),
]


class Table(Mapping[str, Layer]):
    """All layers by name; a wrong name gets a suggestion.

    Examples
    --------
    >>> import ttr_np
    >>> "mamba2" in ttr_np.layers
    True
    """

    def __init__(self, lines: list[Layer]) -> None:
        self.lines = {layer.name: layer for layer in lines}

    def __getitem__(self, name: str) -> Layer:
        if name not in self.lines:
            near = get_close_matches(str(name), self.lines, n=1)
            raise KeyError(f"unknown layer {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return self.lines[name]

    def __contains__(self, name: object) -> bool:
        return name in self.lines

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)


layers = Table(LINES)
