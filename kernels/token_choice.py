"""Tokens chosen on a GPU: the noise of `philox`, drawn where it is needed, and the best of each row.

The words that Philox yields are those of the CPU, bit by bit; the noise is two logarithms of them, whose last bit is
the machine's own. A row's choice depends on its scores, its seed and its place alone.

Shapes: S sampled rows, V vocabulary, C parts of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox import gumbel_quads

_PART = 4096
"""Tokens that a program looks at: a vocabulary of 150 000 makes 37 programs of one row."""


def choose_tokens(
    scores: torch.Tensor, seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Return for each row of ``scores`` [S, V] f32 the argmax of scores plus noise [S] int64; the lowest id of equals.

    ``seeds`` [S, 2]: the low and the high 32 bits of each seed, negative in rows that want no noise. ``choices`` and
    ``positions`` [S]. All int64. A row whose best score is not a number gets some id below V.
    """
    num_rows, vocabulary = scores.shape
    num_parts = triton.cdiv(vocabulary, _PART)
    best = torch.empty(num_rows, num_parts, dtype=torch.float32, device=scores.device)
    ids = torch.empty(num_rows, num_parts, dtype=torch.int64, device=scores.device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    if num_rows:
        _best_of_part[(num_rows, num_parts)](
            scores.contiguous(),
            seeds.contiguous(),
            choices.contiguous(),
            positions.contiguous(),
            best,
            ids,
            vocabulary,
            num_parts,
            QUADS=_PART // 4,
            num_warps=4,
        )
        _best_of_all[(num_rows,)](
            best, ids, tokens, vocabulary, num_parts, PARTS=triton.next_power_of_2(num_parts), num_warps=1
        )
    return tokens


def choose_tokens_reference(
    scores: torch.Tensor, seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Do the same in torch's operations."""
    vocabulary = scores.shape[1]
    quads = torch.arange(triton.cdiv(vocabulary, 4), device=scores.device)
    tokens = []
    for row, seed, choice, position in zip(scores, seeds, choices, positions, strict=True):
        if seed[1] >= 0:
            noise = gumbel_quads(
                seed.expand(len(quads), 2), choice.expand(len(quads)), position.expand(len(quads)), quads
            )
            row = row + noise.flatten()[:vocabulary]
        tokens.append(row.argmax())
    return torch.stack(tokens) if tokens else torch.empty(0, dtype=torch.int64, device=scores.device)


@triton.jit
def uniform_quads(low, high, choice, position, quads):
    """Return four f32 in (0, 1) for each of ``quads``: 23 bits and a half step, exact, as `gumbel_quads` makes them."""
    seed = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    # No number of its own: an argument of one bit width for all four counters
    none = quads * 0
    a, b, c, d = tl.philox(seed, quads, none + position, none + choice, none)
    return _uniform(a), _uniform(b), _uniform(c), _uniform(d)


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _total(scores, ids, vocabulary, uniform, is_drawn):
    scores = tl.load(scores + ids, mask=ids < vocabulary, other=float("-inf"))
    return scores + tl.where(is_drawn, -tl.log(-tl.log(uniform)), 0.0)


@triton.jit
def _best_of_part(scores, seeds, choices, positions, best, best_ids, vocabulary, num_parts, QUADS: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    low, high = tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1)
    is_drawn = high >= 0
    quads = (part * QUADS + tl.arange(0, QUADS)).to(tl.uint32)
    choice, position = tl.load(choices + row).to(tl.uint32), tl.load(positions + row).to(tl.uint32)
    a, b, c, d = uniform_quads(low & 0xFFFFFFFF, high & 0x7FFFFFFF, choice, position, quads)
    scores += row.to(tl.int64) * vocabulary
    ids = quads.to(tl.int32) * 4
    top = _total(scores, ids, vocabulary, a, is_drawn)
    top_ids = ids
    total = _total(scores, ids + 1, vocabulary, b, is_drawn)
    top, top_ids = tl.where(total > top, total, top), tl.where(total > top, ids + 1, top_ids)
    total = _total(scores, ids + 2, vocabulary, c, is_drawn)
    top, top_ids = tl.where(total > top, total, top), tl.where(total > top, ids + 2, top_ids)
    total = _total(scores, ids + 3, vocabulary, d, is_drawn)
    top, top_ids = tl.where(total > top, total, top), tl.where(total > top, ids + 3, top_ids)
    largest = tl.max(top, axis=0)
    tl.store(best + row * num_parts + part, largest)
    first = tl.min(tl.where(top == largest, top_ids, 2147483647), axis=0)
    tl.store(best_ids + row * num_parts + part, first.to(tl.int64))


@triton.jit
def _best_of_all(best, best_ids, tokens, vocabulary, num_parts, PARTS: tl.constexpr):
    row = tl.program_id(0)
    parts = tl.arange(0, PARTS)
    is_part = parts < num_parts
    values = tl.load(best + row * num_parts + parts, mask=is_part, other=float("-inf"))
    ids = tl.load(best_ids + row * num_parts + parts, mask=is_part, other=9223372036854775807)
    is_largest = is_part & (values == tl.max(values, axis=0))
    token = tl.min(tl.where(is_largest, ids, 9223372036854775807), axis=0)
    tl.store(tokens + row, tl.minimum(token, vocabulary - 1))  # of numbers that are none, none is the largest
