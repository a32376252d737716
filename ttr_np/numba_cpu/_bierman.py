"""P = U diag(D) U^T of small memories, vectors as in ``_lanes``, and Bierman's update of it by one pair.

U is a unit upper triangle in tiles of CHAINS x CHAINS, its ones and the zeros below them written out: tile (I, J),
I <= J, is number J (J + 1) / 2 + I and lies column after column. With f = U^T k, g = D f and the variances
a_j = 1 + sum_{i <= j} f_i g_i,

    U_ij' = U_ij - f_j / a_{j-1} sum_{m < j} U_im g_m,    D_j' = D_j a_{j-1} / a_j,    gain = U g.

Nothing is subtracted from a variance. The columns wait for each other only in the sum a: ``weights`` gives all f and a
first, ``turn`` then walks along the rows of U, whose sums stay in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._compile import inner
from ._lanes import CHAINS, in_fours, padded
from ._vectors import WIDE, Held, Vectors, ceil_div, repeat

__all__ = ["Pairs", "learn_factors", "learn_pairs", "numbers_of", "place_of"]

WRITTEN_OUT = (1, 2, 4)  # blocks of keys whose sums stay in registers
COLUMNS = CHAINS if WIDE else CHAINS // 2  # of a block whose sums, CHAINS each, stay in registers


def numbers_of(d: int) -> int:
    """Of U, for one memory."""
    blocks = -(-d // CHAINS)
    return blocks * (blocks + 1) // 2 * CHAINS * CHAINS


@inner
def place_of(i, j):
    """Where U_ij, i <= j, stands among the vectors of U."""
    block = j // CHAINS
    tile = block * (block + 1) // 2 + i // CHAINS
    return (tile * CHAINS + j % CHAINS) * CHAINS + i % CHAINS


def tile_at(builder: Any, i: Any, j: Any) -> Any:
    """Number of the first vector of tile (i, j), one vector per number."""
    word = ir.IntType(64)
    before = builder.lshr(builder.mul(j, builder.add(j, word(1))), word(1))
    return builder.mul(builder.add(before, i), word(CHAINS * CHAINS))


def products_side(vectors: Vectors, U: Any, k: Any, block: Any) -> list[Any]:
    """f of the columns of one block, a vector of sequences for each."""
    return [f for first in range(0, CHAINS, COLUMNS) for f in columns_side(vectors, U, k, block, first)]


def columns_side(vectors: Vectors, U: Any, k: Any, block: Any, first: int) -> list[Any]:
    """f of COLUMNS columns of one block, from the first of them on."""
    builder, word = vectors.builder, ir.IntType(64)
    totals = vectors.totals(COLUMNS * CHAINS)
    start = builder.add(tile_at(builder, word(0), block), word(first * CHAINS))
    with cgutils.for_range(builder, block, intp=word) as loop:
        keys = [vectors.load(k, in_fours(builder, loop.index, r)) for r in range(CHAINS)]
        tile = builder.add(start, builder.mul(loop.index, word(CHAINS * CHAINS)))
        for i, total in enumerate(totals):
            u = vectors.load(U, builder.add(tile, word(i)))
            vectors.accumulate(total, u, keys[i % CHAINS])
    keys = [vectors.load(k, in_fours(builder, block, r)) for r in range(CHAINS)]
    tile = builder.add(start, builder.mul(block, word(CHAINS * CHAINS)))
    for i, total in enumerate(totals):  # of the last tile what is above its ones, and those
        column, r = first + i // CHAINS, i % CHAINS
        if r < column:
            vectors.accumulate(total, vectors.load(U, builder.add(tile, word(i))), keys[r])
        elif r == column:
            vectors.accumulate(total, vectors.constant(1.0), keys[r])
    sums = [builder.load(total) for total in totals]
    while len(sums) > COLUMNS:
        sums = [vectors.add(one, other) for one, other in zip(sums[::2], sums[1::2], strict=True)]
    return sums


def products_alone(vectors: Vectors, U: Any, k: Any, block: Any) -> Any:
    """f of the columns of one block of one sequence, as one vector: the sums of ``products_side``."""
    builder, word = vectors.builder, ir.IntType(64)
    totals = vectors.totals(CHAINS)

    def add(i: Any) -> None:
        key, tile = vectors.load(k, i), builder.udiv(tile_at(builder, i, block), word(CHAINS))
        for c, total in enumerate(totals):
            u = vectors.load(U, builder.add(tile, word(c)))
            vectors.accumulate(total, u, key)

    end = block.constant + 1 if isinstance(block, ir.Constant) else builder.add(block, word(1))
    repeat(builder, word(0), end, add)
    sums = [builder.load(total) for total in totals]
    return vectors.sums_across(sums)


def variances_side(vectors: Vectors, terms: list[Any], before: Any) -> list[Any]:
    """The sums of a vector before the first term, then after each."""
    one, two, three, four = terms
    left, right = vectors.add(one, two), vectors.add(three, four)
    sums = [one, left, vectors.add(left, three), vectors.add(left, right)]
    return [before, *(vectors.add(before, x) for x in sums)]


def variances_alone(vectors: Vectors, terms: Any, before: Any) -> tuple[Any, Any, Any]:
    """The same sums of one sequence: those before each term, those after each, and the last everywhere."""
    zero = vectors.constant(0.0)
    pairs = vectors.add(terms, vectors.shuffle(terms, zero, [4, 0, 4, 2]))
    sums = vectors.add(pairs, vectors.shuffle(pairs, zero, [4, 4, 1, 1]))
    after = vectors.add(before, sums)
    return vectors.shuffle(after, before, [4, 0, 1, 2]), after, vectors.shuffle(after, after, [3, 3, 3, 3])


def shares_side(vectors: Vectors, a: list[Any]) -> list[Any]:
    """One over each of four vectors, by one division because four take longer than all else that a block needs.

    No variance is below 1, and the caps of P keep the product of four finite.
    """
    one, two, three, four = a
    left, right = vectors.multiply(one, two), vectors.multiply(three, four)
    share = vectors.builder.fdiv(vectors.constant(1.0), vectors.multiply(left, right))
    left, right = vectors.multiply(share, right), vectors.multiply(share, left)  # one over them
    shares = [vectors.multiply(x, y) for x, y in ((left, two), (left, one), (right, four), (right, three))]
    return [corrected(vectors, share, x) for share, x in zip(shares, a, strict=True)]


def corrected(vectors: Vectors, share: Any, a: Any) -> Any:
    """One over a from what is nearly that, rounded as a division but for one in a million: P adds up all errors."""
    error = vectors.multiply_add(vectors.builder.fneg(a), share, vectors.constant(1.0))
    return vectors.multiply_add(share, error, share)


def shares_alone(vectors: Vectors, a: Any) -> Any:
    """The same of four numbers of one sequence."""
    zero = vectors.constant(0.0)
    beside = vectors.shuffle(a, zero, [1, 0, 3, 2])
    pairs = vectors.multiply(a, beside)
    others = vectors.shuffle(pairs, zero, [2, 3, 0, 1])
    share = vectors.builder.fdiv(vectors.constant(1.0), vectors.multiply(pairs, others))
    return corrected(vectors, vectors.multiply(vectors.multiply(share, others), beside), a)


def variances_of(vectors: Vectors, U: Any, k: Any, D: Any, into: tuple[Any, Any, Any], blocks: Any) -> Any:
    """f, g and the variances after each column, for a vector of sequences; the last of these is returned."""
    builder, word, (total,) = vectors.builder, ir.IntType(64), vectors.totals(1, 1.0)
    with cgutils.for_range(builder, blocks, intp=word) as loop:
        f = products_side(vectors, U, k, loop.index)
        at = [in_fours(builder, loop.index, i) for i in range(CHAINS)]
        g = [vectors.multiply(vectors.load(D, i), x) for i, x in zip(at, f, strict=True)]
        terms = [vectors.multiply(x, y) for x, y in zip(f, g, strict=True)]
        a = variances_side(vectors, terms, builder.load(total))[1:]
        for place, numbers in zip(into, (f, g, a), strict=True):
            for i, x in zip(at, numbers, strict=True):
                vectors.store(x, place, i)
        builder.store(a[-1], total)
    return builder.load(total)


@intrinsic
def weights_side(typingctx, U, D, k, grow, shrink, gain, variance, blocks):
    """As ``learn_factors`` says, before U is turned, for a vector of sequences; the gain is used as scratch.

    Divisions wait for variances, which wait for each other. They are a loop of their own: its blocks wait for nothing.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        U, D, k, grow, shrink, gain, variance, blocks = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        vectors.store(variances_of(vectors, U, k, D, (shrink, grow, gain), blocks), variance, word(0))
        total, share = vectors.totals(2, 1.0)  # a, and one over it
        with cgutils.for_range(builder, blocks, intp=word) as loop:
            at = [in_fours(builder, loop.index, i) for i in range(CHAINS)]
            after = [vectors.load(gain, i) for i in at]
            a, over = [builder.load(total), *after], [builder.load(share), *shares_side(vectors, after)]
            for i, place in enumerate(at):
                f, old = vectors.load(shrink, place), vectors.load(D, place)
                vectors.store(vectors.multiply(builder.fneg(f), over[i]), shrink, place)
                vectors.store(vectors.multiply(old, vectors.multiply(a[i], over[i + 1])), D, place)
            builder.store(a[CHAINS], total)
            builder.store(over[CHAINS], share)
        return context.get_dummy_value()

    return types.void(U, D, k, grow, shrink, gain, variance, types.intp), codegen


def turn_column(vectors: Vectors, U: Any, place: Any, factors: tuple[Any, Any], total: Any) -> Any:
    """One vector of a column of U, and the sum along its row, with it."""
    (grow, shrink), u = factors, vectors.load(U, place)
    vectors.store(vectors.multiply_add(shrink, total, u), U, place)
    return vectors.multiply_add(grow, u, total)


@intrinsic
def turn_side(typingctx, U, grow, shrink, gain, blocks):
    """U and the gain after a pair, for a vector of sequences."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        U, grow, shrink, gain, blocks = args
        vectors, word = Vectors(builder, signature.args[0].dtype), ir.IntType(64)
        with cgutils.for_range(builder, blocks, intp=word) as rows:
            totals = turn_corner(vectors, U, (grow, shrink), rows.index)
            after = builder.add(rows.index, word(1))
            with cgutils.for_range_slice(builder, after, blocks, word(1), intp=word) as (block, _):
                tile = tile_at(builder, rows.index, block)
                for i in range(CHAINS):
                    factors = tuple(vectors.load(x, in_fours(builder, block, i)) for x in (grow, shrink))
                    for r, total in enumerate(totals):
                        place = builder.add(tile, word(CHAINS * i + r))
                        builder.store(turn_column(vectors, U, place, factors, builder.load(total)), total)
            for r, total in enumerate(totals):
                vectors.store(builder.load(total), gain, in_fours(builder, rows.index, r))
        return context.get_dummy_value()

    return types.void(U, U, U, U, types.intp), codegen


def turn_corner(vectors: Vectors, U: Any, factors: tuple[Any, Any], block: Any) -> list[Any]:
    """A tile with ones on its diagonal, of which only what is above them turns; the sums along its rows begin there."""
    builder, word, totals = vectors.builder, ir.IntType(64), vectors.totals(CHAINS)
    tile = tile_at(builder, block, block)
    for i in range(CHAINS):
        grow, shrink = (vectors.load(x, in_fours(builder, block, i)) for x in factors)
        for r, total in enumerate(totals[:i]):
            place = builder.add(tile, word(CHAINS * i + r))
            builder.store(turn_column(vectors, U, place, (grow, shrink), builder.load(total)), total)
        builder.store(grow, totals[i])
    return totals


def turn_alone(vectors: Vectors, U: Any, sums: Held, block: Any, factors: tuple[Any, Any]) -> None:
    """A block of columns of U of one sequence, and the sums along their rows."""
    builder, word = vectors.builder, ir.IntType(64)
    columns = [tuple(vectors.shuffle(x, x, [i] * CHAINS) for x in factors) for i in range(CHAINS)]

    def turn(rows: Any) -> None:
        first, total = builder.udiv(tile_at(builder, rows, block), word(CHAINS)), sums.get(rows)
        for i, column in enumerate(columns):
            total = turn_column(vectors, U, builder.add(first, word(i)), column, total)
        sums.put(total, rows)

    end = block.constant + 1 if isinstance(block, ir.Constant) else builder.add(block, word(1))
    repeat(builder, word(0), end, turn)


class Pairs(NamedTuple):
    """Where a sequence's memory lies, some pairs that it learns and queries that it answers, see ``learn_pairs``."""

    U: Any
    D: Any
    gain: Any
    grow: Any  # scratch, as large
    shrink: Any
    S: Any  # w rows
    k: Any
    v: Any
    q: Any
    told: Any


def learn_factors_alone(vectors: Vectors, at: Pairs, k: Any, blocks: Any) -> tuple[Held, Any]:
    """As ``learn_factors``, for one sequence: the gain, and the last a everywhere."""
    builder, (total, share) = vectors.builder, vectors.totals(2, 1.0)  # a, and one over it
    grow, shrink, gain = (Held(vectors, x, blocks) for x in (at.grow, at.shrink, at.gain))

    def weigh(block: Any) -> None:
        f = products_alone(vectors, at.U, k, block)
        g = vectors.multiply(vectors.load(at.D, block), f)
        _, after, last = variances_alone(vectors, vectors.multiply(f, g), builder.load(total))
        for held, x in ((shrink, f), (grow, g), (gain, after)):
            held.put(x, block)
        builder.store(last, total)

    def divide(block: Any) -> None:
        f, after = shrink.get(block), gain.get(block)
        over_after = shares_alone(vectors, after)
        sides = (after, total), (over_after, share)
        before, over_before = (vectors.shuffle(x, builder.load(last), [4, 0, 1, 2]) for x, last in sides)
        D = vectors.multiply(vectors.load(at.D, block), vectors.multiply(before, over_after))
        vectors.store(D, at.D, block)
        shrink.put(vectors.multiply(builder.fneg(f), over_before), block)
        for x, last in sides:
            builder.store(vectors.shuffle(x, x, [3, 3, 3, 3]), last)

    gain.each(weigh)
    variance = builder.load(total)
    builder.store(vectors.constant(1.0), total)
    gain.each(divide)
    gain.each(lambda i: gain.put(vectors.constant(0.0), i))
    gain.each(lambda block: turn_alone(vectors, at.U, gain, block, (grow.get(block), shrink.get(block))))
    return gain, variance


def follow(builder: Any, like: Any, at: Pairs, sizes: dict[str, Any], blocks: Any) -> None:
    """As ``learn_pairs``, for keys of some blocks."""
    vectors, word = Vectors(builder, like, CHAINS), ir.IntType(64)
    deep, w = builder.mul(sizes["blocks"], word(CHAINS)), sizes["w"]

    def place(base: Any, i: Any, size: Any) -> Any:
        return builder.gep(base, [builder.mul(i, size)])

    def said(j: Any, x: Any) -> Any:
        (total,), S = vectors.totals(1), place(at.S, j, deep)
        repeat(builder, word(0), blocks, lambda i: vectors.accumulate(total, vectors.load(x, i), vectors.load(S, i)))
        return builder.extract_element(vectors.sum_everywhere(builder.load(total)), ir.IntType(32)(0))

    with cgutils.for_range(builder, sizes["rows"], intp=word) as tokens:
        k, v = place(at.k, tokens.index, deep), place(at.v, tokens.index, w)
        with cgutils.for_range(builder, w, intp=word) as outputs:
            error = place(v, outputs.index, word(1))
            builder.store(builder.fsub(builder.load(error), said(outputs.index, k)), error)
        gain, variance = learn_factors_alone(vectors, at, k, blocks)
        with cgutils.for_range(builder, w, intp=word) as outputs:
            error, S = builder.load(place(v, outputs.index, word(1))), place(at.S, outputs.index, deep)
            error = builder.fdiv(vectors.everywhere(error), variance)
            gain.each(lambda i: vectors.store(vectors.multiply_add(error, gain.get(i), vectors.load(S, i)), S, i))
        with cgutils.for_range(builder, sizes["groups"], intp=word) as readers:
            row = builder.add(builder.mul(readers.index, sizes["tokens"]), tokens.index)
            with cgutils.for_range(builder, w, intp=word) as outputs:
                o = builder.gep(place(at.told, row, w), [outputs.index])
                builder.store(said(outputs.index, place(at.q, row, deep)), o)


@intrinsic
def learn_pairs(typingctx, pairs, rows, tokens, groups, w, d):
    """Some tokens of one sequence, one after the other; the sizes of most filters are written out.

    Parameters
    ----------
    pairs
        What is known: U, D and S, updated. What is learnt: keys, and values, which are left as errors. What is asked:
        queries, and where to answer.
    rows
        How many tokens.
    tokens
        For how many there is room: a group's queries begin so many after those of the group before.
    groups, w, d
        Queries of a token, outputs, and the size of a key.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs, rows, tokens, groups, w, d = args
        at = Pairs(*(builder.extract_value(pairs, i) for i in range(len(Pairs._fields))))
        blocks = ceil_div(builder, d, CHAINS)
        end = builder.append_basic_block("learnt")
        sizes = {"rows": rows, "tokens": tokens, "groups": groups, "w": w, "blocks": blocks}
        like = signature.args[0][0].dtype
        for count in WRITTEN_OUT:
            with builder.if_then(builder.icmp_unsigned("==", blocks, d.type(count))):
                follow(builder, like, at, sizes | {"blocks": d.type(count)}, count)
                builder.branch(end)
        follow(builder, like, at, sizes, blocks)
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(pairs, *[types.intp] * 5), codegen


@inner
def learn_factors(U, D, k, gain, grow, shrink, variance, d):
    """One pair of a vector of sequences: U, D and, for what the pair teaches, the gain U D U^T k and its variance.

    Parameters
    ----------
    U, D
        Updated.
    k
        The keys.
    gain, grow, shrink
        Written: U g, g and -f / a, ``padded(d)`` vectors each.
    variance
        Written: the last a, one vector.
    d
        Sizes of the keys.
    """
    blocks = padded(d) // CHAINS
    weights_side(U, D, k, grow, shrink, gain, variance, blocks)
    turn_side(U, grow, shrink, gain, blocks)
