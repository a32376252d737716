"""Torch's side of the comparison: each operator as matrix products over chunks, the best way its eager kernels allow.

Arrays are ``(h, t, d)``, all heads in front, per-step numbers ``(h, t)``; ``c`` is the chunk, a divisor of t. Decays
per channel are factors of queries and keys around a chunk's middle: one product in place of guarded blocks, right only
while the decays of half a chunk stay within float32. That is faster than what is safe, and so favours torch.

[1] Yang et al. (2024), arXiv:2412.06464, and the papers of the operators for the chunk forms
[2] von Oswald et al. (2025), MesaNet, arXiv:2506.05233
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CG_STEPS = 30


def chunks(x: Tensor, c: int) -> Tensor:
    """Axis t as chunks: ``(h, t, ...)`` to ``(h, n, c, ...)``."""
    return x.unflatten(1, (-1, c))


def entry_states(updates: Tensor, decays: Tensor | None) -> Tensor:
    """State at the start of every chunk, ``(h, n, k, v)``, from what each chunk adds and what it keeps."""
    if decays is None:
        return updates.cumsum(1) - updates
    states = torch.empty_like(updates)
    S = torch.zeros_like(updates[:, 0])
    for i in range(updates.shape[1]):
        states[:, i] = S
        S = torch.addcmul(updates[:, i], S, decays[:, i])
    return states


def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, c: int) -> Tensor:
    """All chunks at once; only their states are a loop."""
    q, k, v = (chunks(x, c) for x in (q, k, v))
    if log_decay is None:
        inner = (q @ k.mT).tril_()
        return (inner @ v + q @ entry_states(k.mT @ v, None)).flatten(1, 2)
    inner, reading, writing, kept = decayed(q, k, chunks(log_decay, c))
    states = entry_states(writing.mT @ v, kept)
    return (inner @ v + reading @ states).flatten(1, 2)


def decayed(q: Tensor, k: Tensor, log_decay: Tensor, strict: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores inside a chunk, queries and keys as they meet the state, and the share of the state that is kept."""
    b = log_decay.cumsum(2)
    last = b[:, :, -1:]
    if log_decay.ndim == 3:  # one gate per step: the difference itself, safe
        weights = (b[..., :, None] - b[..., None, :]).exp_().tril_(-1 if strict else 0)
        inner = (q @ k.mT).mul_(weights)
        return inner, q * b.exp()[..., None], k * (last - b).exp_()[..., None], last.exp()[..., None]
    middle = b[:, :, b.shape[2] // 2, None]
    inner = ((q * (b - middle).exp_()) @ (k * (middle - b).exp_()).mT).tril_(-1 if strict else 0)
    return inner, q * b.exp(), k * (last - b).exp_(), last.exp().mT


def linear_attention_loop(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, c: int) -> Tensor:
    """One chunk after the other, so that its products stay in cache."""
    o = torch.empty_like(v)
    S = q.new_zeros(q.shape[0], q.shape[2], v.shape[2])
    for low in range(0, q.shape[1], c):
        q_c, k_c, v_c = (x[:, low : low + c] for x in (q, k, v))
        if log_decay is None:
            torch.baddbmm(torch.bmm(q_c, S), (q_c @ k_c.mT).tril_(), v_c, out=o[:, low : low + c])
            S = torch.baddbmm(S, k_c.mT, v_c)
        else:
            parts = decayed(q_c[:, None], k_c[:, None], log_decay[:, None, low : low + c])
            inner, reading, writing, kept = (x[:, 0] for x in parts)
            torch.baddbmm(torch.bmm(reading, S), inner, v_c, out=o[:, low : low + c])
            S = torch.baddbmm(S.mul_(kept), writing.mT, v_c)
    return o


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, c: int) -> Tensor:
    """The WY form: one triangular solve per chunk, all at once; then a loop over the states."""
    q, k, v = (chunks(x, c) for x in (q, k, v))
    scaled = chunks(beta, c)[..., None] * k
    if log_decay is None:
        lower, erasing, kept = (scaled @ k.mT).tril_(-1), scaled, None
        inner, reading, writing = (q @ k.mT).tril_(), q, k
    else:
        gates = chunks(log_decay, c)
        lower, erasing, _, _ = decayed(scaled, k, gates, strict=True)
        inner, reading, writing, kept = decayed(q, k, gates)
    known = torch.cat([chunks(beta, c)[..., None] * v, erasing], -1)
    u, w = solve(lower, known).split([v.shape[-1], k.shape[-1]], -1)
    return states_loop(u, w, inner, reading, writing, kept)


def solve(lower: Tensor, known: Tensor) -> Tensor:
    """(I + lower)^-1 known, for strictly lower triangular matrices."""
    return torch.linalg.solve_triangular(lower, known, upper=False, unitriangular=True)


def states_loop(u: Tensor, w: Tensor, inner: Tensor, reading: Tensor, writing: Tensor, kept: Tensor | None) -> Tensor:
    """Errors, answers and state of one chunk after the other."""
    o = torch.empty_like(u)
    S = u.new_zeros(u.shape[0], w.shape[-1], u.shape[-1])
    for i in range(u.shape[1]):
        error = torch.baddbmm(u[:, i], w[:, i], S, alpha=-1)
        o[:, i] = torch.baddbmm(torch.bmm(reading[:, i], S), inner[:, i], error)
        S = torch.baddbmm(S if kept is None else S * kept[:, i], writing[:, i].mT, error)
    return o.flatten(1, 2)


def dplr(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, *, c: int) -> Tensor:
    """Diagonal plus low rank: as the delta rule, with one solve for what every token reads."""
    q, k, v, a, b, g = (chunks(x, c) for x in (q, k, v, a, b, log_decay))
    sums = g.cumsum(2)
    middle, last = sums[:, :, c // 2, None], sums[:, :, -1:]
    shrink, grow = (sums - middle).exp_(), (middle - sums).exp_()
    a_in, k_in, b_in = a * (sums - g - middle).exp_(), k * grow, b * grow
    lower = (a_in @ b_in.mT).tril_(-1).neg_()
    known = torch.cat([(a_in @ k_in.mT).tril_(-1) @ v, a * (sums - g).exp_()], -1)
    u, w = solve(lower, known).split([v.shape[-1], k.shape[-1]], -1)
    inner_b, inner_v = ((q * shrink) @ b_in.mT).tril_(), ((q * shrink) @ k_in.mT).tril_() @ v
    left = (last - sums).exp_()
    updates = (k * left).mT @ v
    return dplr_states(u, w, inner_b, inner_v, q * sums.exp(), b * left, updates, last.exp().mT)


def dplr_states(
    u: Tensor, w: Tensor, inner: Tensor, own: Tensor, reading: Tensor, writing: Tensor, updates: Tensor, kept: Tensor
) -> Tensor:
    """Readings, answers and state of one chunk after the other."""
    S = torch.zeros_like(updates[:, 0])
    for i in range(u.shape[1]):
        read = torch.baddbmm(u[:, i], w[:, i], S)
        own[:, i] += torch.baddbmm(torch.bmm(reading[:, i], S), inner[:, i], read)
        S = torch.baddbmm(torch.addcmul(updates[:, i], S, kept[:, i]), writing[:, i].mT, read)
    return own.flatten(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """Torch's own kernel."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]


def mesa(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, *, ridge: float, c: int) -> Tensor:
    """Thirty plain steps of conjugate gradients, each one product with H for all tokens at once [2]."""
    q, k, v, g = (chunks(x, c) for x in (q, k, v, log_decay))
    b = g.cumsum(2)
    last = b[:, :, -1:]
    scaled = k * chunks(beta, c)[..., None]
    weights = (b[..., :, None] - b[..., None, :]).exp_().tril_()
    writing, kept = scaled * (last - b).exp_()[..., None], last.exp()[..., None]
    into = b.exp()[..., None]
    H, G = entry_states(writing.mT @ k, kept), entry_states(writing.mT @ v, kept)

    def recall(x: Tensor, values: Tensor, states: Tensor) -> Tensor:
        return (x @ scaled.mT).mul_(weights) @ values + (x * into) @ states

    x = conjugate_gradients(lambda p: torch.add(recall(p, k, H), p, alpha=ridge), q)
    return recall(x, v, G).flatten(1, 2)


def conjugate_gradients(product, known: Tensor, steps: int = CG_STEPS) -> Tensor:
    """Solutions of product(x) = known, all tokens in step."""
    x, r, p = torch.zeros_like(known), known, known
    square = (r * r).sum(-1, keepdim=True)
    for _ in range(steps):
        image = product(p)
        length = square / (p * image).sum(-1, keepdim=True).clamp_min(1e-30)
        x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, image, value=-1)
        before, square = square, (r * r).sum(-1, keepdim=True)
        p = torch.addcmul(r, square / before.clamp_min(1e-30), p)
    return x


def doubling(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Associative scan of h = a h + x along axis 1, by spans that double; also the products of a."""
    span = 1
    while span < x.shape[1]:
        x = torch.cat([x[:, :span], torch.addcmul(x[:, span:], a[:, span:], x[:, :-span])], 1)
        a = torch.cat([a[:, :span], a[:, span:] * a[:, :-span]], 1)
        span *= 2
    return a, x


def diagonal_scan(x: Tensor, log_decay: Tensor, *, c: int) -> Tensor:
    """Associative scan inside chunks, all at once; then a loop over the chunks' ends."""
    h, t, d = x.shape
    a, y = doubling(log_decay.exp().reshape(-1, c, d), x.reshape(-1, c, d))
    ends = entry_states(y[:, -1].view(h, -1, d), a[:, -1].view(h, -1, d))
    return torch.addcmul(y, a, ends.reshape(-1, 1, d)).view(h, t, d)


def diagonal_scan_loop(x: Tensor, log_decay: Tensor) -> Tensor:
    """Token by token."""
    o, a = torch.empty_like(x), log_decay.exp()
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.addcmul(x[:, t], a[:, t], h, out=o[:, t])
    return o


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, c: int) -> Tensor:
    """Associative scan over a chunk of tokens at a time, ``(h, c, v, n)`` numbers of state."""
    o = torch.empty_like(u)
    h = u.new_zeros(u.shape[0], 1, *A.shape)
    for low in range(0, u.shape[1], c):
        u_c, delta_c, B_c, C_c = (x[:, low : low + c] for x in (u, delta, B, C))
        decay = (delta_c[..., None] * A).exp_()
        a, y = doubling(decay, (delta_c * u_c)[..., None] * B_c[:, :, None])
        y = torch.addcmul(y, a, h)
        o[:, low : low + c] = (y @ C_c[..., None])[..., 0]
        h = y[:, -1:]
    return o


def selective_scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Token by token."""
    o = torch.empty_like(u)
    h = u.new_zeros(u.shape[0], *A.shape)
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]
        h = torch.addcmul((step * u[:, t, :, None]) * B[:, t, None], (step * A).exp_(), h)
        o[:, t] = (h @ C[:, t, :, None])[..., 0]
    return o


def test_time_training(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, *, c: int) -> Tensor:
    """A linear memory in the dual form, one mini-batch of c tokens after the other."""
    o = torch.empty_like(v)
    W = q.new_zeros(q.shape[0], q.shape[2], v.shape[2])
    for low in range(0, q.shape[1], c):
        q_c, k_c, v_c = (x[:, low : low + c] for x in (q, k, v))
        step = torch.baddbmm(v_c, k_c, W, alpha=-1).mul_(step_size[:, low : low + c, None])
        torch.baddbmm(torch.bmm(q_c, W), (q_c @ k_c.mT).tril_(), step, out=o[:, low : low + c])
        W = torch.baddbmm(W, k_c.mT, step)
    return o


def delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the delta rule, ``(h, 1, d)``, and the new state."""
    error = torch.baddbmm(v, k, S, alpha=-1).mul_(beta[..., None])
    S = torch.baddbmm(S, k.mT, error)
    return torch.bmm(q, S), S


def linear_step(q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token of linear attention, ``(h, 1, d)``, and the new state."""
    S = torch.baddbmm(S, k.mT, v)
    return torch.bmm(q, S), S
