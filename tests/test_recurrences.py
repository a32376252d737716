"""Layers against the recurrences their papers print, token by token: loops that share nothing with the library."""

from __future__ import annotations

import numpy as np
import pytest

import ttr_np
from ttr_np.features import normalize_l2

T, K, V = 33, 4, 3


def mamba3(q, k, v, delta, rate, mix, phase, skip):
    """h = a h + (1 - mix) delta a B_{t-1} x_{t-1} + mix delta B_t x_t, with B and C turned by all angles so far."""
    h, angle, before, o = np.zeros((K, V)), np.zeros(K // 2), np.zeros((K, V)), np.zeros((T, V))
    for t in range(T):
        angle = angle + phase[t]
        R = np.zeros((K, K))
        for i, turn in enumerate(angle):
            R[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        pair, decay = np.outer(R @ k[t], v[t]), np.exp(-delta[t] * rate[t])
        h = decay * h + (1 - mix[t]) * delta[t] * decay * before + mix[t] * delta[t] * pair
        o[t], before = (R @ q[t]) @ h + skip * v[t], pair
    return o


def gated_oja(q, k, v, beta, log_decay):
    """S = S diag(a); S = S + beta (k - S v) v^T with |v| = 1; o = S^T q."""
    S, o = np.zeros((K, V)), np.zeros((T, V))
    for t in range(T):
        unit = v[t] / np.sqrt(v[t] @ v[t])
        S = S * np.exp(log_decay[t])
        S = S + beta[t] * np.outer(k[t] - S @ unit, unit)
        o[t] = S.T @ q[t]
    return o


def polysketchformer(q, k, v):
    """A_ij = (s_i . s_j)^2 over one more than its row sum, s = (x G1) * (x G2) / sqrt(32)."""
    G1, G2 = np.random.default_rng(0).standard_normal((2, K, 32))
    a, b = ((x @ G1) * (x @ G2) / np.sqrt(32) for x in (q, k))
    A = np.tril((a @ b.T) ** 2)
    return A @ v / (1 + A.sum(axis=1, keepdims=True))


def wall_attention(q, k, v, log_decay, scale):
    """softmax over i <= t of scale sum_c q_tc k_ic exp(P_tc - P_ic), P the sums of all log decays so far."""
    o, P = np.zeros((T, V)), np.cumsum(log_decay, axis=0)
    for t in range(T):
        w = np.exp(scale * np.sum(q[t] * k[: t + 1] * np.exp(P[t] - P[: t + 1]), axis=1))
        o[t] = w @ v[: t + 1] / w.sum()
    return o


def deltaformer(q, k, v, beta, erase_key, scale):
    """u_t = v_t - beta_t sum_{i < t} softmax(scale w_t . k_i) u_i; o is softmax attention over the pairs (k, u)."""
    u, o = np.zeros((T, V)), np.zeros((T, V))
    for t in range(T):
        w = np.exp(scale * k[:t] @ erase_key[t])
        u[t] = v[t] - (beta[t] * w @ u[:t] / w.sum() if t else 0)
        w = np.exp(scale * k[: t + 1] @ q[t])
        o[t] = w @ u[: t + 1] / w.sum()
    return o


def stick_breaking(q, k, v, scale):
    """o_t = sum_{i < t} b_i prod_{i < j < t} (1 - b_j) v_i."""
    o = np.zeros((T, V))
    for t in range(T):
        b = 1 / (1 + np.exp(-scale * k[:t] @ q[t]))
        for i in range(t):
            o[t] += b[i] * np.prod(1 - b[i + 1 :]) * v[i]
    return o


def hla(q, k, v):
    """S = sum k k^T, C = sum q v^T, G = sum k k^T C_{t-1}; o = q^T (S C - G): second order, masked."""
    S, C, G, o = np.zeros((K, K)), np.zeros((K, V)), np.zeros((K, V)), np.zeros((T, V))
    for t in range(T):
        G = G + np.outer(k[t], k[t] @ C)
        S, C = S + np.outer(k[t], k[t]), C + np.outer(q[t], v[t])
        o[t] = q[t] @ (S @ C - G)
    return o


LOOPS = {
    name.__name__: name
    for name in (mamba3, gated_oja, polysketchformer, wall_attention, deltaformer, stick_breaking, hla)
}
SIZES = {"t": T, "k": K, "v": V, "p": K // 2}
DRAWS = {
    "log_decay": lambda rng, shape: -rng.uniform(0, 1, shape),
    "phase": lambda rng, shape: rng.uniform(-3, 3, shape),
    "erase_key": lambda rng, shape: rng.standard_normal(shape),
    "scale": lambda rng, shape: 3.0,
}


def problem(name, seed=0):
    """Data of one sequence, unit keys and queries, and every gate of the layer."""
    rng = np.random.default_rng(seed)
    q, k = normalize_l2(rng.standard_normal((2, T, K)))
    shapes = {gate: tuple(SIZES[axis] for axis in x.axes.split()) for gate, x in ttr_np.layers[name].gates.items()}
    gates = {gate: DRAWS.get(gate, lambda rng, shape: rng.uniform(0, 1, shape))(rng, x) for gate, x in shapes.items()}
    return (q, k, rng.standard_normal((T, V))), gates


@pytest.mark.parametrize("name", LOOPS)
def test_a_layer_is_the_recurrence_of_its_paper(name):
    data, gates = problem(name)
    expected = LOOPS[name](*data, **gates)
    o = ttr_np.layers[name](*data, **gates, backend="numpy")
    np.testing.assert_allclose(o, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", LOOPS)
def test_the_future_of_a_layer_changes_no_bit_of_its_past(name):
    (data, gates), (other, others) = problem(name), problem(name, seed=1)
    o = ttr_np.layers[name](*data, **gates, backend="numpy")
    for t in (1, 16, 17):
        later = [np.concatenate([x[:t], y[t:]]) for x, y in zip(data, other, strict=True)]
        changed = {
            gate: np.concatenate([x[:t], others[gate][t:]]) if np.ndim(x) and len(x) == T else x
            for gate, x in gates.items()
        }
        np.testing.assert_array_equal(ttr_np.layers[name](*later, **changed, backend="numpy")[:t], o[:t])


@pytest.mark.parametrize("name", [name for name in LOOPS if ttr_np.layers[name].operator])
def test_queries_of_a_group_share_the_memory_of_a_layer(name):
    (q, k, v), gates = problem(name)
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((2, 3, T, K)), np.stack([k, k[::-1]])[:, None], np.stack([v, v[::-1]])[:, None]
    o, state = ttr_np.layers[name](q, k, v, **gates, output_final_state=True, backend="numpy")
    for i in range(2):
        for j in range(3):
            one = ttr_np.layers[name](q[i, j], k[i, 0], v[i, 0], **gates, backend="numpy")
            np.testing.assert_allclose(o[i, j], one, rtol=1e-12, atol=1e-13)


def test_mamba3_that_counts_only_its_own_step_and_never_turns_is_mamba2():
    data, gates = problem("mamba3")
    shared = {gate: gates[gate] for gate in ("delta", "rate", "skip")}
    o = ttr_np.layers["mamba3"](*data, mix=1.0, phase=0.0, **shared, backend="numpy")
    np.testing.assert_allclose(o, ttr_np.layers["mamba2"](*data, **shared, backend="numpy"), rtol=1e-12, atol=1e-14)


def test_an_odd_last_channel_of_mamba3_turns_beside_a_channel_of_zeros():
    (q, k, v), gates = problem("mamba3")
    wide = [np.concatenate([x[:, :3], np.zeros((T, 1))], axis=1) for x in (q, k)]
    o = ttr_np.layers["mamba3"](q[:, :3], k[:, :3], v, **gates, backend="numpy")
    np.testing.assert_allclose(o, mamba3(*wide, v, **gates), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(ttr_np.recall(ttr_np.layers["mamba3"], q[:, :3], k[:, :3], v, **gates), o, rtol=1e-12)
