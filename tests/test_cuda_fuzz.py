"""Two thousand random calls on both GPU backends against the solver: whatever a caller may combine, by the ratio rule.

A case is what its number says. When one is wrong, ``print(drawn("cupy", "delta_rule", 17))`` shows it and
``check(drawn("cupy", "delta_rule", 17))`` runs it again.
"""

from functools import partial
from typing import Any, NamedTuple

import cudaemu
import numpy as np
import pytest
from cudaemu import needed
from cudaemu.machines import PACKAGES, on_cpu
from test_operators import GATE_PER_CHANNEL, LAYOUTS, half

import ttr_np
from ttr_np.notation import GATES, OPERATORS, axes_of, draw

pytestmark = [
    needed(cudaemu.missing()),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    # OpenBLAS may load lanes behind a matrix and say so; a number that is really invalid fails the comparison.
    pytest.mark.filterwarnings("ignore:invalid value encountered in matmul"),
]

CASES = 170  # of each operator on each backend
# What a kernel is compiled for: sizes of a state column, and the number format; every line costs a second.
BUILDS = {
    "cupy": [(1, "float32"), (8, "float64"), (5, "bfloat16"), (3, "float16")],
    "numba-cuda": [(3, "float32"), (1, "float64")],
}
SCANS = ("linear_attention", "delta_rule", "dplr", "diagonal_scan", "selective_scan", "short_convolution")
GPU = [backend for backend in PACKAGES if backend == "cupy" or not cudaemu.numba_cuda()]


class Drawn(NamedTuple):
    """One call: its arrays, what else is asked, and how threads are ordered."""

    name: str
    backend: str
    operator: str
    dtype: np.dtype
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    common: dict[str, Any]
    order: str

    def __str__(self):
        words = [f"{name} {x.dtype} {x.shape} {x.strides}" for name, x in self.arrays.items()]
        common = {name: x if name == "cu_seqlens" else [np.shape(f) for f in x] for name, x in self.common.items()}
        return "\n  ".join([f"{self.name}: {self.dtype} {self.options} {common} threads {self.order}", *words])


def drawn(backend, operator, number):
    """The case of a number."""
    rng = np.random.default_rng([number, SCANS.index(operator), GPU.index(backend)])
    size, name = BUILDS[backend][rng.integers(len(BUILDS[backend]))]
    dtype = half(name) if name == "bfloat16" else np.dtype(name)
    lead = [(), (1,), (3,), (2, 3), (2, 1, 2)][rng.integers(5)]
    sizes = {"t": int(rng.choice([1, 2, 3, 7, 16, 17, 33])), "v": int(rng.choice([1, 2, 5, 31, 33, 70]))}
    if sizes["t"] >= 32:  # in chunks, whose kernels take longer to build
        sizes["v"] = 33
    sizes |= {"k": size, "n": size, "w": size, "d": int(rng.choice([1, 3, 32, 130]))}
    optional = tuple(name for name in OPERATORS[operator].optional if rng.integers(2))
    arrays = draw(operator, rng, optional=optional, lead=lead, per_channel=bool(rng.integers(2)), **sizes)
    options = options_of(operator, rng)
    if options.get("normalize"):  # a mean needs weights of one sign
        arrays |= {name: np.abs(arrays[name]) for name in {"q", "k", "bonus"} & arrays.keys()}
    awkward(operator, arrays, rng)
    gates = np.result_type(dtype, np.float32)
    arrays = {name: x.astype(gates if name in GATES else dtype) for name, x in arrays.items()}
    arrays = {name: laid_out(name, x, arrays, len(lead), rng) for name, x in arrays.items()}
    case = Drawn(f"{backend} {operator} {number}", backend, operator, dtype, arrays, options, {}, "forward")
    order = ["forward", "reverse", "random"][rng.integers(3)]
    return case._replace(common=common_of(case, lead, sizes["t"], rng), order=order)


def options_of(operator, rng):
    """The caller's other choices."""
    if operator == "short_convolution":
        return {"activation": [None, "silu"][rng.integers(2)]}
    scale = {"scale": [1.0, 0.25, -1.5][rng.integers(3)]} if operator in GATE_PER_CHANNEL else {}
    return scale | ({"normalize": True} if operator == "linear_attention" and rng.integers(3) == 0 else {})


def awkward(operator, arrays, rng):
    """Numbers that hurt: one key of unit length with steps of 0, 1 and 2, gates that forget everything or nothing."""
    if operator == "delta_rule" and rng.integers(3) == 0:
        k = arrays["k"] / np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
        arrays["k"] = np.broadcast_to(k[..., :1, :], k.shape).copy()
        arrays["beta"] = rng.choice([0.0, 1.0, 2.0], arrays["beta"].shape)
    if "log_decay" in arrays and rng.integers(3) == 0:
        x = arrays["log_decay"]
        arrays["log_decay"] = np.where(rng.random(x.shape) < 0.2, rng.choice([-np.inf, -1e30, -1e3, 0.0], x.shape), x)


def laid_out(name, x, arrays, lead, rng):
    """Some layout in memory, and perhaps one for all along leading axes, which only queries and their gates need."""
    if lead and x.ndim - len(axes_of(name, x, arrays)) == lead:
        for axis in np.flatnonzero(rng.random(lead) < 0.2):
            x = np.take(x, [0], axis)
        while name not in ("q", "log_decay") and x.ndim and x.shape[0] == 1 and lead and rng.integers(2):
            x, lead = x[0], lead - 1
    if x.ndim and rng.integers(2):
        x = LAYOUTS[rng.choice([name for name in LAYOUTS if name != "stride 0"])](x)
    return x


def common_of(case, lead, t, rng):
    """Mask, packed sequences, and where the memory starts: where the same call ends."""
    common = {}
    if rng.integers(3) == 0:
        common["mask"] = rng.random(lead * int(rng.integers(2)) + (t,)) < 0.7
    if rng.integers(4) == 0:
        common["cu_seqlens"] = np.sort(np.r_[0, rng.integers(0, t + 1, 3), t])
    if rng.integers(2):
        common["initial_state"] = solved(case._replace(common=common), np.result_type(case.dtype, np.float32))[1]
    return common


def solved(case, dtype=None):
    """The solver's answers and state; in another precision, of the same numbers."""
    arrays, common = case.arrays, dict(case.common)
    if dtype is not None:
        arrays = {name: x.astype(dtype) for name, x in arrays.items()}
        if "initial_state" in common:
            state = common["initial_state"]
            wide = [x if x is None else x.astype(np.result_type(x.dtype, dtype)) for x in state]
            common["initial_state"] = type(state)(*wide)
    run = partial(getattr(ttr_np, case.operator), **arrays, **case.options, **common, output_final_state=True)
    return run(backend="numpy")


def distance(x, y):
    return float(np.max(np.abs(np.asarray(x, y.dtype) - y), initial=0.0))


def check(case):
    """An error in words, or nothing."""
    exact, plain = solved(case, np.longdouble), solved(case)
    with on_cpu(case.backend, check=False, order=case.order):
        door = getattr(ttr_np, case.operator)
        o, state = door(**case.arrays, **case.options, **case.common, output_final_state=True, backend=case.backend)
    sums = np.finfo(np.result_type(case.dtype, np.float32)).eps
    # Answers rounded the other way of two; states of chunks of 16-bit data have 16 bits, see _tiles.SUM_TERMS.
    more = {"bfloat16": (2.0**-7, 2.0**-15), "float16": (2.0**-10, 2.0**-15)}.get(case.dtype.name, (0.0, 0.0))
    fields = [(x, *after) for x, after in ((o, state), exact, plain)]
    for name, found, wanted, other in zip(("o", *state._fields), *fields, strict=True):
        if wanted is None:
            assert found is None
            continue
        if found.shape != wanted.shape or found.dtype != other.dtype:
            return f"{name} is {found.dtype} {found.shape}, the solver's {other.dtype} {wanted.shape}"
        scale = float(np.max(np.abs(wanted), initial=1.0))
        allowed = max(2 * distance(other, wanted), (8 * sums + more[name != "o"]) * scale)
        if not distance(found, wanted) <= allowed:
            return f"{name} is off by {distance(found, wanted):.2e}, allowed {allowed:.2e}"
    return ""


@pytest.mark.parametrize("operator", SCANS)
@pytest.mark.parametrize("backend", GPU)
def test_whatever_a_caller_combines_is_as_good_as_the_solver(backend, operator):
    wrong = []
    for number in range(CASES):
        case = drawn(backend, operator, number)
        problem = check(case)
        if problem:
            wrong.append(f"{case}\n  {problem}")
    assert not wrong, f"{len(wrong)} of {CASES}; the first:\n{wrong[0]}"


def test_a_case_can_be_drawn_again():
    one, again = (drawn("cupy", "delta_rule", 5) for _ in range(2))
    assert str(one) == str(again)
    assert all(np.array_equal(x, again.arrays[name]) for name, x in one.arrays.items())
    assert len(GPU) * len(SCANS) * CASES >= 2000 or cudaemu.numba_cuda()
