"""What holds for every operator on every backend, over all of them that exist and can run here."""

import inspect
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest

import ttr_np
from ttr_np import operators
from ttr_np.backends import BACKENDS, has_operator, reason
from ttr_np.calling import FACTORING, run
from ttr_np.memories import MLP, Linear
from ttr_np.notation import ARRAYS, GATES, OPERATORS, STATES, CacheState, draw

COMMON = ("initial_state", "output_final_state", "cu_seqlens", "mask", "backend")

# What an operator needs or may be asked besides its arrays. Only causal choices: these tests are about time.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "linear_attention": [{}, {"normalize": True}, {"scale": 0.3}],
    "recursive_least_squares": [{"ridge": 0.7}],
    "mesa": [{"ridge": 0.5}, {"solver": "cg", "iterations": 12}, {"solver": "chebyshev", "iterations": 12}],
    "softmax_attention": [{}, {"window": 3, "sinks": 1}, {"scale": 4.0}],
    "local_polynomial": [
        {"ridge": 0.1},
        {"degree": 0, "kernel": "epanechnikov", "bandwidth": 1.5},
        {"kernel": "gaussian", "bandwidth": 1.0, "window": 4, "ridge": 0.1},
    ],
    "affine_projection": [{}, {"order": 3, "ridge": 0.1}],
    "sparse_attention": [{}, {"alpha": 1.5, "window": 4}],
    "kernel_ridge": [{"ridge": 0.5}],
    "test_time_training": [{"memory": Linear(), "batch_size": 4}, {"memory": MLP(hidden=4), "batch_size": 1}],
    "short_convolution": [{}, {"activation": "silu"}],
}
GATE_PER_CHANNEL = {"linear_attention", "delta_rule", "dplr", "wall_attention"}
# A decay of zero leaves no memory of what came before. Not so where the old state is read before it decays (dplr,
# bonus), where the fit needs the ridge that decays too (recursive least squares), or where nothing decays.
FORGETS = {"linear_attention", "delta_rule", "diagonal_scan", "mesa", "softmax_attention", "local_polynomial"}
# A query at a masked token reads what the token before it would have read; these add a part of their own token, and so
# does a convolution.
OWN_TOKEN = {"bonus", "D"}
LEFT_OUT = {"stick_breaking_attention"}  # where a query does not see the pair of its own token


class Case(NamedTuple):
    """One operator on one backend with some of its optional arrays and options."""

    operator: str
    backend: str
    optional: tuple[str, ...]
    per_channel: bool
    options: dict[str, Any]

    def __str__(self):
        words = [self.operator, self.backend, *self.optional, "per_channel" * self.per_channel]
        return "-".join([*filter(None, words), *(f"{name}={str(x)[:12]}" for name, x in self.options.items())])

    def draw(self, seed=0, lead=(2,), dtype=np.float64, **sizes):
        """Random arguments that nobody may write to."""
        from ttr_np.notation import draw

        rng = np.random.default_rng(seed)
        arrays = draw(
            self.operator, rng, optional=self.optional, lead=lead, per_channel=self.per_channel, dtype=dtype, **sizes
        )
        if self.options.get("normalize"):  # a mean needs weights of one sign
            arrays |= {"q": np.abs(arrays["q"]), "k": np.abs(arrays["k"])}
        for x in arrays.values():
            x.flags.writeable = False
        return arrays

    def __call__(self, arrays, state=False, **common):
        door = getattr(operators, self.operator)
        return door(**arrays, **self.options, **common, output_final_state=state, backend=self.backend)

    @property
    def signature(self):
        return OPERATORS[self.operator]


def cases() -> list[Case]:
    """All operators on all CPU backends here: every option plain and with all arrays, every optional array alone."""
    found = []
    for operator, signature in OPERATORS.items():
        every = signature.optional
        options = OPTIONS.get(operator, [{}])
        alone = [(name,) for name in every] if len(every) > 1 else []
        wanted = [(each, o) for o in options for each in ((), every)] + [(each, options[0]) for each in alone]
        for backend in ("numpy", "numba"):
            if has_operator(backend, operator) and reason(backend) == "ok":
                for optional, option in wanted if every else [((), o) for o in options]:
                    found.append(Case(operator, backend, optional, False, option))
                    if "log_decay" in optional and operator in GATE_PER_CHANNEL:
                        found.append(Case(operator, backend, optional, True, option))
    return found


CASES = cases()
pytestmark = pytest.mark.filterwarnings("ignore:solver '.*' stopped after")  # few steps are enough for these sentences
every_case = pytest.mark.parametrize("case", CASES, ids=str)
TOLERANCE = 1e-12
# Iterations that have not converged, and local fits of few points, enlarge the rounding of their input.
WORSE = {"solver": 1e-9, "degree": 1e-11, "ridge": 1e-11}


def tolerance(case: Case) -> float:
    return max([TOLERANCE, *(WORSE[name] for name in case.options if name in WORSE)])


def close(actual, wanted, tol=TOLERANCE):
    """Equal up to rounding relative to the largest number, NaN where NaN."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape
    scale = max(1.0, np.max(np.abs(wanted), initial=0.0, where=np.isfinite(wanted)))
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=tol * scale, equal_nan=True)


def same_bits(actual, wanted):
    assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
    np.testing.assert_array_equal(actual, wanted)


def time_axis(case: Case, name: str, x: np.ndarray) -> int | None:
    """Where an array counts steps, from the end; None where it does not."""
    axes = ARRAYS[name].axes.split("|")[-1 if case.per_channel else 0].split()
    if name == "log_decay" and case.operator == "diagonal_scan":
        axes = ["t", "d"]
    return axes.index("t") - len(axes) if "t" in axes else None


def cut(case: Case, arrays, keep):
    """The steps of a slice, an index or a boolean array, of every array that has steps."""
    cut = {}
    for name, x in arrays.items():
        axis = time_axis(case, name, x)
        cut[name] = x if axis is None else x[(..., keep) + (slice(None),) * (-1 - axis)]
    return cut


def join(case: Case, first, second):
    """The steps of the first, then those of the second."""
    axes = {name: time_axis(case, name, x) for name, x in first.items()}
    return {n: x if axes[n] is None else np.concatenate([x, second[n]], axis=axes[n]) for n, x in first.items()}


def fields(state):
    return [x for x in state if x is not None]


def same_state(case: Case, actual, wanted, check=close):
    """Fields are equal; caches may hold empty slots in front."""
    assert type(actual) is type(wanted)
    for name, axes in case.signature.state.items():
        x, y = getattr(actual, name), getattr(wanted, name)
        assert (x is None) == (y is None)
        if x is None:
            continue
        if axes.startswith("n"):
            own = len(axes.split())
            n = min(x.shape[x.ndim - own], y.shape[y.ndim - own])
            newest = (..., slice(-n or None, None)) + (slice(None),) * (own - 1)
            empty = (..., slice(None, -n or None)) + (slice(None),) * (own - 1)
            if name == "log_weight" and n:
                assert np.all(x[empty] == -np.inf) and np.all(y[empty] == -np.inf)
            x, y = (z[newest] if n else z[(..., slice(0, 0)) + (slice(None),) * (own - 1)] for z in (x, y))
        check(x, y)


def in_pieces(case: Case, arrays, bounds):
    """Outputs and state of a run in pieces between the bounds."""
    outputs, state = [], None
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        o, state = case(cut(case, arrays, slice(low, high)), state=True, initial_state=state)
        outputs.append(o)
    return np.concatenate(outputs, axis=-2), state


def test_every_operator_has_a_door_with_one_signature():
    for name in OPERATORS:
        door = inspect.signature(getattr(operators, name)).parameters
        assert name in operators.__all__
        assert tuple(door)[-len(COMMON) :] == COMMON
        for backend in BACKENDS:
            if has_operator(backend, name) and reason(backend) == "ok":
                own = inspect.signature(getattr(import_module(f"{BACKENDS[backend]}.{name}"), name)).parameters
                own = {n: p for n, p in own.items() if p.kind is not inspect.Parameter.VAR_KEYWORD and n not in COMMON}
                assert list(own) == [n for n in door if n not in COMMON], backend
                assert {n: p.default for n, p in own.items()} == {n: door[n].default for n in own}, backend
                assert {n: p.kind for n, p in own.items()} == {n: door[n].kind for n in own}, backend


@every_case
@pytest.mark.parametrize("t", [9, 131])
def test_any_cut_of_the_sequence_changes_nothing(case, t):
    arrays = case.draw(t=t)
    o, state = case(arrays, state=True)
    cuts = range(t + 1) if t == 9 else (1, 63, 64, 65, 130)
    plans = [[0, at, t] for at in cuts] + ([[0, *range(t + 1), t]] if t == 9 else [[0, 17, 17, 64, 100, t]])
    for bounds in plans:
        pieces, after = in_pieces(case, arrays, bounds)
        close(pieces, o, tolerance(case))
        same_state(case, after, state, lambda x, y: close(x, y, tolerance(case)))


def run_recurrent(case: Case, monkeypatch):
    """Let a module that has both forms run its recurrence."""
    module = import_module(f"{BACKENDS[case.backend]}.{case.operator}")
    if not (hasattr(module, "recurrent") and hasattr(module, "chunked")):
        return

    def swapped(core, *args, **keywords):
        if isinstance(core, partial):
            return run(partial(module.recurrent, *core.args, **core.keywords), *args, **keywords)
        return run(module.recurrent, *args, **keywords)

    monkeypatch.setattr(module, "run", swapped)


@every_case
def test_recurrence_and_chunks_agree(case, monkeypatch):
    arrays = case.draw(t=131)
    o, state = case(arrays, state=True)
    run_recurrent(case, monkeypatch)
    slow, after = case(arrays, state=True)
    close(o, slow, tolerance(case))
    same_state(case, state, after, lambda x, y: close(x, y, tolerance(case)))


@every_case
def test_the_future_changes_no_bit_of_the_past(case):
    t = 131
    arrays, other = case.draw(t=t), case.draw(seed=1, t=t)
    o = case(arrays)
    for at in (1, 40, 64, 100):
        changed = join(case, cut(case, arrays, slice(0, at)), cut(case, other, slice(at, t)))
        same_bits(case(changed)[..., :at, :], o[..., :at, :])


@every_case
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_number_reaches_neither_the_past_nor_other_sequences(case, bad):
    t, at = 70, 37
    arrays = case.draw(t=t)
    o = case(arrays)
    for name, x in arrays.items():
        axis = time_axis(case, name, x)
        if axis is None or (bad == np.inf and name in GATES):
            continue
        spoilt = x.copy()
        spoilt[(0, at) + (0,) * (-1 - axis)] = bad
        try:
            with np.errstate(all="ignore"):
                found = case(arrays | {name: spoilt})
        except ValueError as refused:
            assert str(refused).startswith(name)  # a weight or a decay that is no number may be refused
            continue
        same_bits(found[1], o[1])
        same_bits(found[0, :at], o[0, :at])
        late = int(name == "log_decay" and "bonus" in arrays)  # the bonus reads the state before its decay
        late += case.operator in LEFT_OUT and name not in case.signature.reads
        # What is at infinity is far from all else, and a kernel that is cut off gives far keys no weight at all.
        if np.isnan(bad) and (case.operator, name) != ("sparse_attention", "v"):
            assert not np.all(np.isfinite(found[0, at + late])), f"the bad {name} went unnoticed"
        if name in case.signature.reads:
            close(found[0, at + 1 :], o[0, at + 1 :], tolerance(case))


@every_case
def test_a_bad_number_does_not_reach_the_past_where_another_one_came_before(case):
    arrays = case.draw(t=90)
    if "v" not in arrays:
        return
    first, second = arrays["v"].copy(), arrays["v"].copy()
    first[0, 11, 1] = second[0, 11, 1] = second[0, 76, 2] = np.nan
    o, found = case(arrays | {"v": first}), case(arrays | {"v": second})
    same_bits(found[:, :76], o[:, :76])
    same_bits(found[1], o[1])


@every_case
def test_a_masked_token_is_as_if_removed(case):
    t = 23
    arrays = case.draw(t=t)
    mask = np.random.default_rng(5).uniform(size=(2, t)) < 0.6
    mask[0, 0], mask[1, -1] = False, False
    o, state = case(arrays, state=True, mask=mask)
    for i in range(2):
        one = {name: x if time_axis(case, name, x) is None else x[i] for name, x in arrays.items()}
        kept, after = case(cut(case, one, mask[i]), state=True)
        close(o[i][mask[i]], kept, tolerance(case))
        own = type(state)(*(None if x is None else x[i] for x in state))
        same_state(case, own, after, lambda x, y: close(x, y, tolerance(case)))


@every_case
@pytest.mark.parametrize("hidden", [np.nan, np.inf, 7.0, -7.0])
def test_what_stands_under_the_mask_is_never_read(case, hidden):
    t = 70
    arrays = case.draw(t=t)
    mask = np.random.default_rng(5).uniform(size=(2, t)) < 0.6
    o, state = case(arrays, state=True, mask=mask)
    spoilt = dict(arrays)
    for name in set(arrays) - set(case.signature.reads):
        axis = time_axis(case, name, arrays[name])
        if axis is None or (name not in case.signature.frozen and not np.isnan(hidden)):
            continue
        spoilt[name] = np.where(mask.reshape(mask.shape + (1,) * (-1 - axis)), arrays[name], hidden)
    found, after = case(spoilt, state=True, mask=mask)
    same_bits(found, o)
    same_state(case, after, state, same_bits)


@every_case
def test_a_masked_query_is_still_answered(case):
    if set(case.optional) & OWN_TOKEN or case.operator in {"short_convolution", *LEFT_OUT}:
        return
    arrays = case.draw(t=9)
    for at in (3, 8):
        mask = np.arange(9) != at
        answered = case(arrays, mask=mask)[..., at, :]
        asked = dict(arrays)
        for name in case.signature.reads:
            if name in arrays and time_axis(case, name, arrays[name]) is not None:
                asked[name] = arrays[name].copy()
                asked[name][:, at - 1] = arrays[name][:, at]
        close(answered, case(asked)[..., at - 1, :], tolerance(case))
    nothing, state = case(arrays, state=True, mask=np.zeros(9, bool))
    assert np.all(np.isfinite(nothing))
    _, empty = case(cut(case, arrays, slice(0, 0)), state=True)
    same_state(case, state, empty, lambda x, y: close(x, y, 1e-15))


@every_case
@pytest.mark.parametrize("started", [False, True])
def test_packed_sequences_are_separate_calls(case, started):
    bounds = np.array([0, 5, 5, 6, 14, 23])
    arrays = case.draw(t=23)
    begin = case(case.draw(seed=3, t=23), state=True, cu_seqlens=bounds)[1] if started else None
    o, state = case(arrays, state=True, cu_seqlens=bounds, initial_state=begin)
    for i, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own = None if begin is None else nth(case, begin, i)
        alone, after = case(cut(case, arrays, slice(low, high)), state=True, initial_state=own)
        same_bits(o[..., low:high, :], alone)
        same_state(case, nth(case, state, i), after, same_bits)


def nth(case: Case, state, i):
    """State of packed sequence i."""
    taken = {}
    for name, axes in case.signature.state.items():
        x = getattr(state, name)
        taken[name] = None if x is None else np.take(x, i, axis=x.ndim - 1 - len(axes.split()))
    return type(state)(**taken)


@every_case
def test_no_packed_sequence_at_all(case):
    arrays = case.draw(t=0)
    o, state = case(arrays, state=True, cu_seqlens=[0])
    assert o.shape[-2] == 0
    for x, axes in zip(state, case.signature.state.values(), strict=True):
        assert x is None or x.shape[x.ndim - 1 - len(axes.split())] == 0


@every_case
def test_groups_of_queries_share_a_memory(case):
    arrays = case.draw(t=20, lead=(2, 3))
    reads = [n for n in case.signature.reads if n in arrays and time_axis(case, n, arrays[n]) is not None]
    if not reads:
        return
    shared = [n for n, x in arrays.items() if n not in reads and time_axis(case, n, x) is not None]
    grouped = arrays | {n: arrays[n][:, :1] for n in shared}
    repeated = arrays | {n: np.repeat(arrays[n][:, :1], 3, axis=1) for n in shared}
    o, state = case(grouped, state=True)
    close(o, case(repeated), tolerance(case))
    assert all(x.shape[:2] == (2, 1) for x in fields(state))


@every_case
def test_memories_that_nobody_asks_learn_all_the_same(case):
    arrays = case.draw(t=20, lead=(2,))
    reads = [n for n in case.signature.reads if n in arrays and time_axis(case, n, arrays[n]) is not None]
    nobody = {n: x[:, None] if time_axis(case, n, x) is not None else x for n, x in arrays.items()}
    o, state = case(nobody | {n: nobody[n][:, :0] for n in reads}, state=True)
    wanted, known = case(nobody, state=True)
    if reads:
        assert o.shape == (2, 0, *wanted.shape[2:])
    same_state(case, state, known)


@every_case
def test_leading_axes_broadcast(case):
    arrays = case.draw(t=20, lead=(2, 3))
    timed = [name for name, x in arrays.items() if time_axis(case, name, x) is not None]
    for name in timed:
        thin = arrays | {name: arrays[name][:1]}
        full = arrays | {name: np.repeat(arrays[name][:1], 2, axis=0)}
        wanted = case(full)
        close(np.broadcast_to(case(thin), wanted.shape), wanted, tolerance(case))


LAYOUTS = {
    "reversed": lambda x: x[..., ::-1].copy()[..., ::-1],
    "reversed in time": lambda x: np.flip(np.flip(x).copy()),
    "Fortran": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "heads last": lambda x: np.moveaxis(np.moveaxis(x, 0, -1).copy(), -1, 0),
    "stride 0": lambda x: np.broadcast_to(x[..., :1], x.shape),
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_memory_does_not_matter(case, layout):
    arrays = {name: LAYOUTS[layout](x) for name, x in case.draw(t=70).items()}
    plain = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    if layout == "stride 0":  # repeats are not written out, and products of them take ways of their own
        close(case(arrays), case(plain), tolerance(case))
    else:
        same_bits(case(arrays), case(plain))


@every_case
def test_nothing_of_the_caller_is_written_to(case):
    _, begin = case(case.draw(seed=2, t=9), state=True)
    kept = [x.copy() for x in fields(begin)]
    arrays = case.draw(t=9)
    before = {name: x.copy() for name, x in arrays.items()}
    _, after = case(arrays, state=True, initial_state=begin)
    for x, y in zip(fields(begin), kept, strict=True):
        same_bits(x, y)
    for name, x in arrays.items():
        same_bits(x, before[name])
    for x in fields(after):
        assert not any(np.shares_memory(x, y) for y in [*fields(begin), *arrays.values()])
    cache = STATES[case.operator] is CacheState
    shared = ("k", "v", "position") if cache else ()  # with the caches that it grows into
    assert all(x.flags.writeable for name, x in after._asdict().items() if x is not None and name not in shared)


@every_case
def test_no_time_at_all_leaves_the_state(case):
    _, begin = case(case.draw(t=5), state=True)
    o, state = case(case.draw(t=0), state=True, initial_state=begin)
    assert o.shape[:1] == (2,) and o.shape[-2] == 0
    same_state(case, state, begin, same_bits)
    assert not any(np.shares_memory(x, y) for x in fields(state) for y in fields(begin))


@every_case
@pytest.mark.parametrize("lead", [(0,), (2, 0), (), (1, 1, 1)])
@pytest.mark.parametrize("t", [0, 1, 5])
def test_empty_and_smallest_batches(case, lead, t):
    sizes = {axis: 1 for axis in "kvdnw"}
    o, state = case(case.draw(lead=lead, t=t, **sizes), state=True)
    assert o.shape == lead + (t, 1) and np.all(np.isfinite(o))
    assert all(x.shape[: len(lead)] == lead for x in fields(state))


@every_case
def test_one_sequence_alone_and_in_a_batch(case):
    arrays = case.draw(t=70, lead=(7,))
    o = case(arrays)
    for i in (0, 3, 6):
        one = {n: x if time_axis(case, n, x) is None else x[i] for n, x in arrays.items()}
        same_bits(case(one), o[i])


HALVES = ["float16", "bfloat16"]


def half(name):
    return np.dtype(np.float16) if name == "float16" else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


@every_case
def test_dtype_in_is_dtype_out(case):
    for dtype in (np.float32, np.float64):
        o, state = case(case.draw(t=9, dtype=dtype), state=True)
        assert np.finfo(o.dtype).dtype == dtype
        assert all(np.finfo(x.dtype).dtype == dtype for x in fields(state) if x.dtype.kind != "i")


@every_case
@pytest.mark.parametrize("name", HALVES)
def test_halves_are_computed_in_float32(case, name):
    dtype = half(name)
    arrays = case.draw(t=70, dtype=dtype)
    o, state = case(arrays, state=True)
    full, wanted = case({n: x.astype(np.float32) for n, x in arrays.items()}, state=True)
    if "phase" in case.optional:
        assert o.dtype == np.complex64
    else:
        assert o.dtype == dtype
    same_bits(o, full.astype(o.dtype))
    same_state(case, state, wanted, same_bits)


@every_case
@pytest.mark.parametrize("name", HALVES)
def test_gates_are_never_rounded_to_the_data(case, name):
    gates = {n: x for n, x in case.draw(t=70).items() if n in GATES}
    data = {n: x.astype(half(name)) for n, x in case.draw(t=70).items() if n not in GATES}
    wide = {n: x.astype(np.float32) for n, x in data.items()}
    o = case(data | gates)
    assert o.dtype == (np.complex64 if "phase" in case.optional else half(name))
    same_bits(o, case(wide | gates).astype(o.dtype))


@every_case
def test_integers_are_numbers(case):
    whole = {n: x if n in GATES else np.rint(4 * x).astype(np.int32) for n, x in case.draw(t=9).items()}
    if case.options.get("normalize"):
        whole["q"], whole["k"] = whole["q"] + 1, whole["k"] + 1
    same_bits(case(whole), case({n: x.astype(np.float64) for n, x in whole.items()}))


@every_case
def test_data_of_two_dtypes_are_promoted(case):
    arrays = case.draw(t=9)
    data = [n for n in arrays if n not in GATES]
    if len(data) == 1:
        return
    mixed = {n: x.astype(np.float32) if n == data[0] else x for n, x in arrays.items()}
    promoted = {n: x.astype(np.float64) for n, x in mixed.items()}
    same_bits(case(mixed), case(promoted))


@every_case
def test_lists_and_numbers_are_arrays(case):
    arrays = case.draw(t=3)
    same_bits(case({n: x.tolist() for n, x in arrays.items()}), case(arrays))
    scalars = {n: float(x.flat[0]) for n, x in arrays.items() if n in GATES and time_axis(case, n, x) is not None}
    filled = {n: np.full_like(arrays[n], x) for n, x in scalars.items()}
    if "log_decay" not in scalars or not case.per_channel:
        close(case(arrays | scalars), case(arrays | filled))


gated = pytest.mark.parametrize("case", [c for c in CASES if "log_decay" in c.draw(t=1)], ids=str)


@gated
@pytest.mark.parametrize("gate", [-np.inf, -1e30, -1e4])
def test_a_full_reset_costs_the_gates_after_it_nothing(case, gate):
    if case.operator not in FORGETS or "sinks" in case.options:
        return  # sinks count from the first token of all
    if "degree" in case.options and gate == -1e4:
        return  # a weight of exp(-1e4) is small, yet all there is where a compact kernel finds no pair since
    t, at = 70, 21
    arrays = case.draw(t=t)
    steep = arrays["log_decay"].copy()
    steep[:, at] = gate
    with np.errstate(invalid="raise"):
        o = case(arrays | {"log_decay": steep})
    fresh = case(cut(case, arrays, slice(at, t)))
    late = 1 if "bonus" in case.optional else 0  # the bonus reads the state before its own decay
    close(o[..., at + late :, :], fresh[..., late:, :], tolerance(case))
    same_bits(o[..., :at, :], case(arrays)[..., :at, :])


@gated
@pytest.mark.parametrize("gate", [-40.0, -1e4, 0.0])
def test_steep_gates_at_every_step(case, gate, monkeypatch):
    arrays = case.draw(t=70)
    arrays = arrays | {"log_decay": np.where(arrays["log_decay"] > -0.2, gate, arrays["log_decay"])}
    if case.operator == "recursive_least_squares" and gate < -1:
        return  # the ridge decays with the data: after exp(-40 t) of it nothing holds the fit
    o = case(arrays)
    assert np.all(np.isfinite(o))
    run_recurrent(case, monkeypatch)
    close(o, case(arrays), tolerance(case))


@gated
def test_gates_of_zero_are_no_gates(case):
    arrays = case.draw(t=70)
    if case.operator == "diagonal_scan":
        return
    zero = arrays | {"log_decay": np.zeros_like(arrays["log_decay"])}
    close(case(zero), case({n: x for n, x in arrays.items() if n != "log_decay"}), tolerance(case))


plain = pytest.mark.parametrize("case", [c for c in CASES if c.optional == c.signature.optional], ids=str)


@plain
def test_sizes_that_disagree_are_named(case):
    arrays = case.draw(t=5)
    for name, x in arrays.items():
        axes = ARRAYS[name].axes.split("|")[-1 if case.per_channel else 0].split()
        if name == "log_decay" and case.operator == "diagonal_scan":
            axes = ["t", "d"]
        for place, axis in enumerate(axes):
            others = [n for n in arrays if n != name and axis in ARRAYS[n].axes.split("|")[0].split()]
            if not others or (name == "weight" and axis == "w"):
                continue
            longer = np.concatenate([x, x], axis=place - len(axes))
            with pytest.raises(ValueError, match=rf"axis '{axis}' is \d+ in \w+ but \d+ in \w+") as caught:
                case(arrays | {name: longer})
            assert f" in {name}" in str(caught.value)


@plain
def test_bad_arrays_are_named(case):
    arrays = case.draw(t=5)
    for name, x in arrays.items():
        for bad, words in {
            "masked array": np.ma.masked_array(x, mask=False),
            "object": x.astype(object),
            "bool": x > 0,
            "byte order": x.astype(x.dtype.newbyteorder()),
            "complex": x.astype(complex),
            "dtype <U": x.astype(str),
        }.items():
            if bad == "complex" and name == "x" and "phase" in case.optional:
                continue
            with pytest.raises(TypeError, match=f"^{name} .*{bad}"):
                case(arrays | {name: words})
        if name not in GATES or x.ndim > 1:
            with pytest.raises(ValueError):
                case(arrays | {name: x.reshape(x.shape + (1, 1))[..., :0]})


@plain
def test_leading_axes_that_do_not_broadcast_are_named(case):
    arrays = case.draw(t=5)
    name = case.signature.arrays[1]
    if time_axis(case, name, arrays[name]) is None:
        return
    with pytest.raises(ValueError, match=r"leading axes \(\d,\) of \w+ do not broadcast with \(\d,\)"):
        case(arrays | {name: np.concatenate([arrays[name], arrays[name][:1]])})


SIGNS = {"log_decay": "<= 0", "A": "<= 0", "delta": ">= 0", "step_size": ">= 0"}


@plain
def test_gates_out_of_range_are_named_with_their_place(case):
    arrays = case.draw(t=5)
    for name in set(SIGNS) & set(arrays):
        x = arrays[name].copy()
        x[(-1,) * x.ndim] = 0.5 if SIGNS[name] == "<= 0" else -0.5
        place = ", ".join(str(n - 1) for n in x.shape)
        words = rf"{name} must be {SIGNS[name]} everywhere; it is .*0\.5.* at \({place}\)"
        with pytest.raises(ValueError, match=words):
            case(arrays | {name: x})


@plain
def test_bad_masks_are_refused(case):
    arrays = case.draw(t=5)
    with pytest.raises(TypeError, match="mask has dtype float64; it needs bool"):
        case(arrays, mask=np.ones(5))
    with pytest.raises(ValueError, match="axis 't' is"):
        case(arrays, mask=np.ones(4, bool))
    with pytest.raises(ValueError, match="mask"):
        case(arrays, mask=np.ones((3, 5), bool))


@plain
@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ([1, 5], "from 0 to t = 5, it runs from 1 to 5"),
        ([0, 4], "from 0 to t = 5, it runs from 0 to 4"),
        ([0, 3, 2, 5], "must not decrease: 2 follows 3 at 2"),
        ([0.0, 5.0], "1-d array of integers, got float64"),
        ([[0, 5]], r"1-d array of integers, got int64 of shape \(1, 2\)"),
        ([], "1-d array of integers"),
    ],
)
def test_malformed_boundaries_are_refused(case, bounds, words):
    with pytest.raises(ValueError, match=f"cu_seqlens .*{words}"):
        case(case.draw(t=5), cu_seqlens=bounds)


@plain
def test_a_state_of_another_shape_is_refused(case):
    arrays = case.draw(t=5)
    _, state = case(arrays, state=True)
    for name, axes in case.signature.state.items():
        x = getattr(state, name)
        if x is None or not axes:
            continue
        words = "fields hold different numbers of pairs" if axes == "n" else f"field {name} has shape .*, needs"
        with pytest.raises(ValueError, match=f"initial_state {words}"):
            case(arrays, initial_state=state._replace(**{name: np.concatenate([x, x], axis=-1)}))
        with pytest.raises(ValueError, match="initial_state field"):
            case(arrays, initial_state=state._replace(**{name: np.concatenate([x, x, x], axis=0)}))
    with pytest.raises(ValueError, match="initial_state"):
        case(arrays, initial_state=tuple(state) + (0.0,))
    with pytest.raises(ValueError, match="initial_state"):
        case(arrays, cu_seqlens=[0, 2, 5], initial_state=type(state)(*(None if x is None else x[:0] for x in state)))


@plain
def test_a_state_of_one_field_may_be_the_bare_array(case):
    arrays = case.draw(t=5)
    _, state = case(arrays, state=True)
    if len(fields(state)) == 1:
        same_bits(case(arrays, initial_state=fields(state)[0]), case(arrays, initial_state=state))


@plain
def test_a_word_no_one_knows_is_refused(case):
    with pytest.raises(TypeError, match="windw"):
        case(case.draw(t=5), windw=3)


def door(operator, arrays, **options):
    needed = {"memory": Linear()} if operator == "test_time_training" else {}
    return getattr(operators, operator)(**arrays, **needed | options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_required_argument_that_is_none_is_named(operator):
    arrays = drawn(operator)
    for name in arrays:
        with pytest.raises(TypeError, match=rf"^{name} is None; {operator} needs it"):
            door(operator, arrays | {name: None})
    if operator == "test_time_training":
        with pytest.raises(TypeError, match="^memory is None; test_time_training needs it"):
            door(operator, arrays, memory=None)


def drawn(operator):
    from ttr_np.notation import draw

    return draw(operator, np.random.default_rng(0), per_channel=False)


NUMBERS = [
    (operator, name, parameter)
    for operator in OPERATORS
    for name, parameter in inspect.signature(getattr(operators, operator)).parameters.items()
    if str(parameter.annotation).startswith(("int", "float"))
]


def test_the_numeric_options_are_found():
    found = {(operator, name) for operator, name, _ in NUMBERS}
    assert {("linear_attention", "scale"), ("local_polynomial", "ridge"), ("test_time_training", "batch_size")} < found
    assert len(found) >= 20


@pytest.mark.parametrize(("operator", "name", "parameter"), NUMBERS, ids=lambda x: str(x)[:25])
def test_options_that_are_no_numbers_are_named_with_their_value(operator, name, parameter):
    arrays, whole = drawn(operator), str(parameter.annotation).startswith("int")
    bad = ["2", "a", [1.0], True, 1j, object(), np.ones((2, 2))] + [1.5, np.nan] * whole
    bad += [None] * (not str(parameter.annotation).endswith("None"))
    for x in bad:
        with pytest.raises(TypeError, match=f"^{name} is .*it needs {'an integer' if whole else 'a number'}"):
            door(operator, arrays, **{name: x})
    for x in () if whole else (np.nan, np.inf, np.float32(-np.inf)):
        if np.isnan(x) or name != "bandwidth":
            with pytest.raises(ValueError, match=f"^{name} must be a finite number, got {x}"):
                door(operator, arrays, **{name: x})


def test_the_ridge_of_mesa_is_named():
    for bad in ("a", None, True):
        with pytest.raises(TypeError, match="^ridge has dtype"):
            door("mesa", drawn("mesa"), ridge=bad)
    with pytest.raises(TypeError, match="^ridge is complex"):
        door("mesa", drawn("mesa"), ridge=1j)


def test_numbers_of_numpy_are_numbers():
    arrays = drawn("linear_attention")
    for two in (2, np.float32(2), np.array(2.0), np.int8(2)):
        expected = operators.linear_attention(**arrays, scale=2.0)
        np.testing.assert_array_equal(door("linear_attention", arrays, scale=two), expected)


def test_a_cache_in_any_order_is_read_as_it_is():
    """Broadcast over sequences, or in Fortran order: one prefix for many continuations."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 3, 5, 4))
    for operator in (ttr_np.softmax_attention, ttr_np.local_polynomial):
        for lead in ((), (1,), (3,), (2, 1)):
            _, state = operator(*rng.standard_normal((3, *lead, 4, 4)), output_final_state=True, backend="numpy")
            own = [2, 2, 1, 1]
            whole = [np.broadcast_to(x, (2, 3, *x.shape[x.ndim - n :])) for x, n in zip(state, own, strict=True)]
            for given in (state, type(state)(*map(np.asfortranarray, whole))):
                wanted = operator(q, k, v, initial_state=given, backend="numpy")
                found = operator(q, k, v, initial_state=given, backend="numba")
                np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("H", [-np.eye(4), -5 * np.eye(4), np.eye(4) - 3, np.triu(np.ones((4, 4))) + np.eye(4)])
def test_what_is_no_gram_matrix_is_refused(H, backend):
    q = np.ones((1, 4))
    with pytest.raises(ValueError, match="initial_state field H must be symmetric and have no negative eigenvalue"):
        ttr_np.mesa(q, q, q, initial_state=(np.zeros((4, 4)), H), backend=backend)


def test_gram_matrices_pass_whatever_their_size():
    q = np.ones((1, 2))
    small, bad = np.outer([1.0, 1e-170], [1.0, 1e-170]), np.diag([np.inf, np.nan])
    for H in (np.zeros((2, 2)), np.full((2, 2), 1e300), np.full((2, 2), 1e-300), np.full((2, 2), np.nan), small, bad):
        ttr_np.mesa(q, q, q, initial_state=(np.zeros((2, 2)), H), backend="numpy")


@pytest.mark.parametrize("field", [None, "1.0", True, np.datetime64("2020", "s")])
def test_a_state_of_no_numbers_is_refused(field):
    q = np.ones((1, 4))
    with pytest.raises(TypeError, match="initial_state field S has dtype .*; it needs real numbers"):
        ttr_np.linear_attention(q, q, q, initial_state=np.full((4, 4), field))
    with pytest.raises(TypeError, match="initial_state field S is a masked array"):
        ttr_np.linear_attention(q, q, q, initial_state=np.ma.array(np.ones((4, 4)), mask=True))
    _, state = ttr_np.softmax_attention(q, q, q, output_final_state=True)
    with pytest.raises(TypeError, match="initial_state field position has dtype float64; it needs integers"):
        ttr_np.softmax_attention(q, q, q, initial_state=state._replace(position=state.position + 0.5))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_options_are_numbers_of_any_kind_and_flags_are_flags(backend):
    q = np.ones((3, 4))
    wanted = ttr_np.softmax_attention(q, q, q, window=2, backend=backend)
    for number in (np.int64(2), np.uint8(2), np.array(2)):
        np.testing.assert_array_equal(ttr_np.softmax_attention(q, q, q, window=number, backend=backend), wanted)
    ttr_np.softmax_attention(q, q, q, causal=np.bool_(False), output_final_state=0, backend=backend)
    for flag in ("no", 2, None, [True]):
        with pytest.raises(TypeError, match="causal is .*; it needs True or False"):
            ttr_np.softmax_attention(q, q, q, causal=flag, backend=backend)


def test_what_is_no_array_is_named():
    q = np.ones((2, 2))
    with pytest.raises(ValueError, match="k is no array of numbers: "):
        ttr_np.linear_attention(q, [[1.0, 2.0], [3.0]], q)
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install ml_dtypes")
    with pytest.raises(TypeError, match="dtypes that have none in common: q is float16, k is bfloat16, v is float16"):
        ttr_np.linear_attention(q.astype(np.float16), q.astype(ml_dtypes.bfloat16), q.astype(np.float16))


@pytest.mark.parametrize("operator", sorted(FACTORING))
def test_factors_have_no_extended_precision(operator):
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long double is double here")
    arrays = draw(operator, np.random.default_rng(0), t=3)
    with pytest.raises(TypeError, match=f"{operator} computes in float64 at most: data of "):
        getattr(ttr_np, operator)(**{name: x.astype(np.longdouble) for name, x in arrays.items()})


def test_what_is_no_memory_is_refused():
    q = np.ones((2, 3))
    for memory in (3, "mlp"):
        with pytest.raises(TypeError, match="memory is .*; it needs a memory"):
            ttr_np.test_time_training(q, q, q, 0.1, memory=memory)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_keys_of_size_zero_make_a_weighted_mean(degree):
    v = np.random.default_rng(0).standard_normal((2, 5, 3))
    options = {"degree": degree, "ridge": 0.1, "log_decay": -np.ones((2, 5))}
    found = [ttr_np.local_polynomial(v[..., :0], v[..., :0], v, **options, backend=b) for b in ("numpy", "numba")]
    np.testing.assert_allclose(*found, rtol=1e-12)
