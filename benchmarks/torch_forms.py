"""Torch's side of the comparison: each operator as matrix products over chunks, the best way its eager kernels allow.

Arrays are ``(h, t, d)``, all heads in front, per-step numbers ``(h, t)``; ``c`` is the chunk, a divisor of t. Decays
per channel are factors of queries and keys around a chunk's middle: one product in place of guarded blocks, right only
while the decays of half a chunk stay within float32. That is faster than what is safe, and so favours torch.

[1] Yang et al. (2024), arXiv:2412.06464, and the papers of the operators for the chunk forms
[2] von Oswald et al. (2025), MesaNet, arXiv:2506.05233
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

CG_STEPS = 30
DONE = 1e-16  # square of a residual
PRODUCT = 32  # up to so many chunks the states are one product


def chunks(x: Tensor, c: int) -> Tensor:
    """Axis t as chunks: ``(h, t, ...)`` to ``(h, n, c, ...)``."""
    return x.unflatten(1, (-1, c))


def plain(body: Callable) -> Callable:
    """The body of a loop as it is; the benchmark puts a compiled one in its place."""
    return body


def entry_states(updates: Tensor, log_kept: Tensor | None) -> Tensor:
    """State at the start of every chunk, ``(h, n, k, v)``, from what each chunk adds and the log of what it keeps.

    Few chunks are one product with their decays among each other, which compiles well; many are a loop.
    """
    if log_kept is None:
        return updates.cumsum(1) - updates
    if updates.shape[1] > PRODUCT:
        return looped_states(updates, log_kept.exp())
    b = log_kept.cumsum(1).movedim(1, -1)  # (h, k or 1, 1, n)
    later = (b - log_kept.movedim(1, -1)).mT - b  # from the end of chunk j to the start of chunk i > j
    weights = later.tril_(-1).exp_().tril_(-1)
    return (weights @ updates.movedim(1, 2)).movedim(2, 1) if weights.shape[1] > 1 else mixed(weights[:, 0], updates)


def mixed(weights: Tensor, updates: Tensor) -> Tensor:
    """Sums of whole states, one weight per pair of chunks."""
    return (weights @ updates.flatten(2)).view_as(updates)


def looped_states(updates: Tensor, kept: Tensor) -> Tensor:
    """The same, one chunk after the other."""
    states = torch.empty_like(updates)
    S = torch.zeros_like(updates[:, 0])
    for i in range(updates.shape[1]):
        states[:, i] = S
        S = torch.addcmul(updates[:, i], S, kept[:, i])
    return states


def linear_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, c: int) -> Tensor:
    """All chunks at once; only their states are a loop."""
    q, k, v = (chunks(x, c) for x in (q, k, v))
    if log_decay is None:
        inner = (q @ k.mT).tril_()
        return (inner @ v + q @ entry_states(k.mT @ v, None)).flatten(1, 2)
    inner, reading, writing, log_kept = decayed(q, k, chunks(log_decay, c))
    return (inner @ v + reading @ entry_states(writing.mT @ v, log_kept)).flatten(1, 2)


def decayed(q: Tensor, k: Tensor, log_decay: Tensor, strict: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores inside a chunk, queries and keys as they meet the state, and the log of the share that is kept."""
    b = log_decay.cumsum(2)
    last = b[:, :, -1:]
    if log_decay.ndim == 3:  # one gate per step: the difference itself, safe
        weights = (b[..., :, None] - b[..., None, :]).exp_().tril_(-1 if strict else 0)
        inner = (q @ k.mT).mul_(weights)
        return inner, q * b.exp()[..., None], k * (last - b).exp_()[..., None], last[..., None]
    middle = b[:, :, b.shape[2] // 2, None]
    inner = ((q * (b - middle).exp_()) @ (k * (middle - b).exp_()).mT).tril_(-1 if strict else 0)
    return inner, q * b.exp(), k * (last - b).exp_(), last.mT


def linear_attention_loop(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, c: int, wrap: Callable = plain
) -> Tensor:
    """One chunk after the other, so that its products stay in cache."""
    o, body = torch.empty_like(v), wrap(linear_chunk)
    S = q.new_zeros(q.shape[0], q.shape[2], v.shape[2])
    for low in range(0, q.shape[1], c):
        here = (slice(None), slice(low, low + c))
        o[here], S = body(q[here], k[here], v[here], None if log_decay is None else log_decay[here], S)
    return o


def linear_chunk(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """Answers of one chunk, and the new state."""
    if log_decay is None:
        return torch.baddbmm(torch.bmm(q, S), (q @ k.mT).tril_(), v), torch.baddbmm(S, k.mT, v)
    inner, reading, writing, log_kept = (x[:, 0] for x in decayed(q[:, None], k[:, None], log_decay[:, None]))
    return torch.baddbmm(torch.bmm(reading, S), inner, v), torch.baddbmm(S * log_kept.exp(), writing.mT, v)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, c: int, wrap: Callable = plain
) -> Tensor:
    """The WY form: one triangular solve per chunk, all at once; then a loop over the states."""
    u, w, inner, reading, writing, kept = wrap(delta_parts)(*(chunks(x, c) for x in (q, k, v, beta)), log_decay)
    o, body = torch.empty_like(u), wrap(delta_chunk)
    S = u.new_zeros(u.shape[0], w.shape[-1], u.shape[-1])
    for i in range(u.shape[1]):
        now = (x[:, i] for x in (u, w, inner, reading, writing))
        o[:, i], S = body(*now, None if kept is None else kept[:, i], S)
    return o.flatten(1, 2)


def delta_parts(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, ...]:
    """What needs no state: corrected values and keys, scores, and how queries and keys meet the state."""
    scaled = beta[..., None] * k
    if log_decay is None:
        lower, erasing, kept = (scaled @ k.mT).tril_(-1), scaled, None
        inner, reading, writing = (q @ k.mT).tril_(), q, k
    else:
        gates = chunks(log_decay, q.shape[2])
        lower, erasing, _, _ = decayed(scaled, k, gates, strict=True)
        inner, reading, writing, log_kept = decayed(q, k, gates)
        kept = log_kept.exp()
    u, w = solve(lower, torch.cat([beta[..., None] * v, erasing], -1)).split([v.shape[-1], k.shape[-1]], -1)
    return u, w, inner, reading, writing, kept


def delta_chunk(
    u: Tensor, w: Tensor, inner: Tensor, reading: Tensor, writing: Tensor, kept: Tensor | None, S: Tensor
) -> tuple[Tensor, Tensor]:
    """Errors, then answers of one chunk and the new state."""
    error = torch.baddbmm(u, w, S, alpha=-1)
    o = torch.baddbmm(torch.bmm(reading, S), inner, error)
    return o, torch.baddbmm(S if kept is None else S * kept, writing.mT, error)


def solve(lower: Tensor, known: Tensor) -> Tensor:
    """(I + lower)^-1 known, for strictly lower triangular matrices."""
    return torch.linalg.solve_triangular(lower, known, upper=False, unitriangular=True)


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, *, c: int, wrap: Callable = plain
) -> Tensor:
    """Diagonal plus low rank: as the delta rule, with one solve for what every token reads."""
    u, w, own, inner, reading, writing, updates, kept = wrap(dplr_parts)(
        *(chunks(x, c) for x in (q, k, v, a, b, log_decay))
    )
    S, body = torch.zeros_like(updates[:, 0]), wrap(dplr_chunk)
    for i in range(u.shape[1]):
        now = (x[:, i] for x in (u, w, own, inner, reading, writing, updates, kept))
        own[:, i], S = body(*now, S)
    return own.flatten(1, 2)


def dplr_parts(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """What needs no state, of all chunks at once."""
    sums = g.cumsum(2)
    middle, last = sums[:, :, g.shape[2] // 2, None], sums[:, :, -1:]
    shrink, grow = (sums - middle).exp_(), (middle - sums).exp_()
    a_in, k_in, b_in = a * (sums - g - middle).exp_(), k * grow, b * grow
    lower = (a_in @ b_in.mT).tril_(-1).neg_()
    known = torch.cat([(a_in @ k_in.mT).tril_(-1) @ v, a * (sums - g).exp_()], -1)
    u, w = solve(lower, known).split([v.shape[-1], k.shape[-1]], -1)
    inner, own = ((q * shrink) @ b_in.mT).tril_(), ((q * shrink) @ k_in.mT).tril_() @ v
    left = (last - sums).exp_()
    return u, w, own, inner, q * sums.exp(), b * left, (k * left).mT @ v, last.exp().mT


def dplr_chunk(
    u: Tensor,
    w: Tensor,
    own: Tensor,
    inner: Tensor,
    reading: Tensor,
    writing: Tensor,
    updates: Tensor,
    kept: Tensor,
    S: Tensor,
) -> tuple[Tensor, Tensor]:
    """What a chunk's tokens read, then their answers and the new state."""
    read = torch.baddbmm(u, w, S)
    o = torch.baddbmm(torch.baddbmm(own, reading, S), inner, read)
    return o, torch.baddbmm(torch.addcmul(updates, S, kept), writing.mT, read)


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
    writing, log_kept = scaled * (last - b).exp_()[..., None], last[..., None]
    into = b.exp()[..., None]
    H, G = entry_states(writing.mT @ k, log_kept), entry_states(writing.mT @ v, log_kept)

    def recall(x: Tensor, values: Tensor, states: Tensor) -> Tensor:
        return (x @ scaled.mT).mul_(weights) @ values + (x * into) @ states

    x = conjugate_gradients(lambda p: torch.add(recall(p, k, H), p, alpha=ridge), q)
    return recall(x, v, G).flatten(1, 2)


def conjugate_gradients(product, known: Tensor, steps: int = CG_STEPS) -> Tensor:
    """Solutions of product(x) = known, all tokens in step.

    A token that is done waits for the others: run on, its residual would fall to denormal numbers, on which a CPU takes
    ten times as long.
    """
    x, r, p = torch.zeros_like(known), known, known
    square = (r * r).sum(-1, keepdim=True)
    for _ in range(steps):
        image = product(p)
        alive = square > DONE
        length = torch.where(alive, square / (p * image).sum(-1, keepdim=True).clamp_min(1e-30), 0.0)
        x, r = torch.addcmul(x, length, p), torch.addcmul(r, length, image, value=-1)
        before, square = square, (r * r).sum(-1, keepdim=True)
        p = torch.addcmul(r, torch.where(alive, square / before.clamp_min(1e-30), 0.0), p)
    return x


def after(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """h -> a h + x, one step after another."""
    return left[0] * right[0], torch.addcmul(right[1], left[1], right[0])


def scan(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's own associative scan of h = a h + x along axis 1; also the products of a."""
    return associative_scan(after, (a, x), dim=1, combine_mode="generic")


def diagonal_scan(x: Tensor, log_decay: Tensor, *, c: int) -> Tensor:
    """Associative scan inside chunks, all at once; then over the chunks' ends."""
    h, t, d = x.shape
    a, y = scan(log_decay.exp().reshape(-1, c, d), x.reshape(-1, c, d))
    if c == t:
        return y.reshape(h, t, d)
    kept, ends = scan(a[:, -1].reshape(h, -1, d), y[:, -1].reshape(h, -1, d))
    starts = F.pad(ends[:, :-1], (0, 0, 1, 0))
    return torch.addcmul(y, a, starts.reshape(-1, 1, d)).reshape(h, t, d)


def diagonal_scan_loop(x: Tensor, log_decay: Tensor) -> Tensor:
    """Token by token."""
    o, a = torch.empty_like(x), log_decay.exp()
    h = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        h = torch.addcmul(x[:, t], a[:, t], h, out=o[:, t])
    return o


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, c: int, wrap: Callable = plain
) -> Tensor:
    """Associative scan over a chunk of tokens at a time, ``(h, c, v, n)`` numbers of state."""
    o, h, body = torch.empty_like(u), u.new_zeros(u.shape[0], 1, *A.shape), wrap(selective_chunk)
    for low in range(0, u.shape[1], c):
        u_c, delta_c, B_c, C_c = (x[:, low : low + c] for x in (u, delta, B, C))
        o[:, low : low + c], h = body(u_c, delta_c, A, B_c, C_c, h)
    return o


def selective_chunk(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Answers of one chunk, and the new state."""
    a, y = scan((delta[..., None] * A).exp_(), (delta * u)[..., None] * B[:, :, None])
    y = torch.addcmul(y, a, h)
    return (y @ C[..., None])[..., 0], y[:, -1:].clone()  # a view would keep the states of all tokens


def selective_scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, wrap: Callable = plain) -> Tensor:
    """Token by token."""
    o, h, body = torch.empty_like(u), u.new_zeros(u.shape[0], *A.shape), wrap(selective_token)
    for t in range(u.shape[1]):
        o[:, t], h = body(u[:, t, :, None], delta[:, t, :, None], A, B[:, t, None], C[:, t, :, None], h)
    return o


def selective_token(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Answer of one token, and the new state."""
    h = torch.addcmul((delta * u) * B, (delta * A).exp_(), h)
    return (h @ C)[..., 0], h


def test_time_training(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, *, c: int, wrap: Callable = plain) -> Tensor:
    """A linear memory in the dual form, one mini-batch of c tokens after the other."""
    o, body = torch.empty_like(v), wrap(training_chunk)
    W = q.new_zeros(q.shape[0], q.shape[2], v.shape[2])
    for low in range(0, q.shape[1], c):
        here = (slice(None), slice(low, low + c))
        o[here], W = body(q[here], k[here], v[here], step_size[here], W)
    return o


def training_chunk(q: Tensor, k: Tensor, v: Tensor, step_size: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Answers of one mini-batch, and the trained memory."""
    step = torch.baddbmm(v, k, W, alpha=-1).mul_(step_size[..., None])
    return torch.baddbmm(torch.bmm(q, W), (q @ k.mT).tril_(), step), torch.baddbmm(W, k.mT, step)


def short_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Torch's own depthwise convolution, padded so that it sees no future."""
    w, d = weight.shape
    padded = F.pad(x.mT, (w - 1, 0))
    return F.conv1d(padded, weight.mT[:, None], groups=d).mT


def delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the delta rule, ``(h, 1, d)``, and the new state."""
    error = torch.baddbmm(v, k, S, alpha=-1).mul_(beta[..., None])
    S = torch.baddbmm(S, k.mT, error)
    return torch.bmm(q, S), S


def linear_step(q: Tensor, k: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token of linear attention, ``(h, 1, d)``, and the new state."""
    S = torch.baddbmm(S, k.mT, v)
    return torch.bmm(q, S), S
