"""Adaptive filters: the delta rule with one output of one sequence, its weights in registers.

    e_t = beta_t (v_t - w . p_t),    w = w + e_t k_t,    o_t = scale w . q_t

A token must wait for the weights that the token before it left, and for nothing else: while they stay in registers that
is one multiply-add, one sum and its step. The sums are those of ``_lanes``, where sequences lie side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ._lanes import CHAINS
from ._vectors import Held, Vectors, ceil_div

__all__ = ["Series", "Tokens", "walk"]

WRITTEN_OUT = (1, 2, 4, 8)  # blocks of keys whose weights stay in registers


class Series(NamedTuple):
    """Numbers of one sequence: those of the first token, how far the next token's are, and the next group's."""

    data: Any
    step: int  # 0: there are none
    apart: int


class Tokens(NamedTuple):
    """Numbers of some tokens of one sequence, of their values one column."""

    k: Series
    erase: Series
    v: Series
    beta: Series
    decays: Series
    rests: Series  # of their rounding
    q: Series
    o: Series


class Weights(Held):
    """w of a filter."""

    def __init__(self, builder: Any, like: Any, w: Any, blocks: Any) -> None:
        super().__init__(Vectors(builder, like, CHAINS), w, blocks)
        self.each(lambda i: self.put(self.there(i), i))

    def dot(self, x: Any) -> Any:
        """w . x, everywhere."""
        vectors = self.vectors
        (total,) = vectors.totals(1)
        self.each(lambda i: vectors.accumulate(total, vectors.load(x, i), self.get(i)))
        return vectors.sum_everywhere(vectors.builder.load(total))

    def forget(self, decay: Any, rest: Any) -> None:
        """w = (decay + rest) w; nothing is left of anything, NaN included, where the decay is 0."""
        vectors, builder = self.vectors, self.vectors.builder
        gone, decay = builder.fcmp_ordered("==", decay, decay.type(0.0)), vectors.everywhere(decay)
        rest = vectors.everywhere(rest)

        def scale(i: Any) -> None:
            left = vectors.multiply_add(decay, self.get(i), vectors.multiply(rest, self.get(i)))
            self.put(builder.select(gone, vectors.constant(0.0), left), i)

        self.each(scale)

    def learn(self, error: Any, k: Any) -> None:
        """w = w + error k."""
        vectors = self.vectors
        self.each(lambda i: self.put(vectors.multiply_add(error, vectors.load(k, i), self.get(i)), i))


class Lines:
    """The series of ``Tokens`` in code."""

    def __init__(self, builder: Any, tokens: Any) -> None:
        self.builder = builder
        fields = [builder.extract_value(tokens, i) for i in range(len(Tokens._fields))]
        self.series = {name: self.opened(x) for name, x in zip(Tokens._fields, fields, strict=True)}

    def opened(self, series: Any) -> Series:
        """The numbers of a series by their names."""
        return Series(*(self.builder.extract_value(series, i) for i in range(len(Series._fields))))

    def at(self, name: str, i: Any, group: Any = None) -> Any:
        """Pointer to what token i has there."""
        series, builder = self.series[name], self.builder
        offset = builder.mul(i, series.step)
        offset = offset if group is None else builder.add(offset, builder.mul(group, series.apart))
        return builder.gep(series.data, [offset])

    def number(self, name: str, i: Any) -> Any:
        """The number that token i has there."""
        return self.builder.load(self.at(name, i))


def learn_token(weights: Weights, lines: Lines, i: Any) -> None:
    """Token i: what is left of the past, and one gradient step."""
    vectors, builder = weights.vectors, weights.vectors.builder
    gated = builder.icmp_signed("!=", lines.series["decays"].step, ir.IntType(64)(0))
    with builder.if_then(gated):
        weights.forget(lines.number("decays", i), lines.number("rests", i))
    told = weights.dot(lines.at("erase", i))
    v, beta = (vectors.everywhere(lines.number(name, i)) for name in ("v", "beta"))
    weights.learn(builder.fmul(beta, builder.fsub(v, told)), lines.at("k", i))


def walk_blocks(
    builder: Any, like: Any, w: Any, lines: Lines, scale: Any, bounds: tuple[Any, Any], blocks: Any
) -> None:
    """As ``walk`` says, for keys of some blocks."""
    word, weights = ir.IntType(64), Weights(builder, like, w, blocks)
    with cgutils.for_range(builder, bounds[0], intp=word) as tokens:
        learn_token(weights, lines, tokens.index)
        with cgutils.for_range(builder, bounds[1], intp=word) as readers:
            answer = builder.extract_element(weights.dot(lines.at("q", tokens.index, readers.index)), ir.IntType(32)(0))
            builder.store(builder.fmul(scale, answer), lines.at("o", tokens.index, readers.index))
    weights.leave()


@intrinsic
def walk(typingctx: Any, w: Any, tokens: Any, scale: Any, rows: Any, groups: Any, d: Any) -> Any:
    """Some tokens of one sequence, one after the other; the sizes of most filters are written out.

    Parameters
    ----------
    w
        The weights, ``padded(d)`` numbers, the last ones zero; updated.
    tokens
        Where they are; rows of keys and queries have as many numbers.
    scale
        Factor on the answers.
    rows, groups
        How many tokens, and queries of each.
    d
        Size of a key.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, tokens, scale, rows, groups, d = args
        like, lines, bounds = signature.args[0].dtype, Lines(builder, tokens), (rows, groups)
        blocks = ceil_div(builder, d, CHAINS)
        end = builder.append_basic_block("walked")
        for count in WRITTEN_OUT:
            with builder.if_then(builder.icmp_unsigned("==", blocks, d.type(count))):
                walk_blocks(builder, like, w, lines, scale, bounds, count)
                builder.branch(end)
        walk_blocks(builder, like, w, lines, scale, bounds, blocks)
        builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(w, tokens, scale, types.intp, types.intp, types.intp), codegen
