"""The walk along trees of drafts on a GPU, so that a step's tokens need no word from the host.

Shapes: T rows of the step, S sampled rows, R requests, D rows of a request at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class DraftTrees:
    """Where the requests of a step stand in its rows; all int64, on one device."""

    token_ids: torch.Tensor
    """[T]"""
    parents: torch.Tensor
    """[T] each row's parent, counted within its request; -1 for the last committed token."""
    first_rows: torch.Tensor
    """[R] each request's first row of the step."""
    num_rows: torch.Tensor
    """[R]"""
    first_sampled: torch.Tensor
    """[R] the request's first row that yields a token, counted within it; ``num_rows`` if none does."""
    first_choices: torch.Tensor
    """[R] where its first row's token is among the sampled, or would be."""
    most_rows: int
    """D"""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the walk found; -1 behind each end."""

    tokens: torch.Tensor
    """[R, D] emitted tokens: accepted drafts, and the token after the last."""
    path: torch.Tensor
    """[R, D] the rows that yielded them, counted within their request."""
    num_tokens: torch.Tensor
    """[R]"""


def accept_trees(trees: DraftTrees, sampled: torch.Tensor) -> Accepted:
    """Follow the ``sampled`` tokens [S] int64 down each request's tree of drafts.

    A draft is accepted if its row's parent was and chose its token; of two such siblings the first is.
    """
    num_requests = len(trees.num_rows)
    accepted = _empty(trees)
    if num_requests:
        _walk[(num_requests,)](
            trees.token_ids,
            trees.parents,
            trees.first_rows,
            trees.num_rows,
            trees.first_sampled,
            trees.first_choices,
            sampled,
            accepted.tokens,
            accepted.path,
            accepted.num_tokens,
            trees.most_rows,
            ROWS=triton.next_power_of_2(trees.most_rows),
            num_warps=1,
        )
    return accepted


def accept_trees_reference(trees: DraftTrees, sampled: torch.Tensor) -> Accepted:
    """Do the same on the host, one row at a time."""
    accepted = _empty(trees)
    accepted.tokens.fill_(-1)
    accepted.path.fill_(-1)
    token_ids, parents, tokens = trees.token_ids.tolist(), trees.parents.tolist(), sampled.tolist()
    places = (trees.first_rows, trees.num_rows, trees.first_sampled, trees.first_choices)
    for request, (first, num_rows, row, choice) in enumerate(zip(*(part.tolist() for part in places), strict=True)):
        found, offset = [], choice
        if row < num_rows:
            found.append((tokens[row + offset], row))
            for child in range(row + 1, num_rows):
                if parents[first + child] == row and token_ids[first + child] == found[-1][0]:
                    row = child
                    found.append((tokens[row + offset], row))
        for place, (token, at) in enumerate(found):
            accepted.tokens[request, place], accepted.path[request, place] = token, at
        accepted.num_tokens[request] = len(found)
    return accepted


def _empty(trees: DraftTrees) -> Accepted:
    shape = (len(trees.num_rows), trees.most_rows)
    tokens, path, num_tokens = (
        torch.empty(size, dtype=torch.int64, device=trees.num_rows.device) for size in (shape, shape, shape[:1])
    )
    return Accepted(tokens, path, num_tokens)


@triton.jit
def _walk(
    token_ids,
    parents,
    first_rows,
    num_rows,
    first_sampled,
    first_choices,
    sampled,
    tokens,
    path,
    num_tokens,
    most_rows,
    ROWS: tl.constexpr,
):
    request = tl.program_id(0)
    first, count = tl.load(first_rows + request), tl.load(num_rows + request)
    row = tl.load(first_sampled + request)
    offset = tl.load(first_choices + request)
    rows = tl.arange(0, ROWS)
    is_row = rows < count
    # The whole tree is read at once: the walk then waits for no memory
    drafts = tl.load(token_ids + first + rows, mask=is_row, other=-1)
    parent = tl.load(parents + first + rows, mask=is_row, other=-2)
    chosen = tl.load(sampled + offset + rows, mask=is_row & (rows >= row), other=-1)
    row = tl.where(row < count, row, ROWS).to(tl.int32)
    emitted = tl.full([ROWS], -1, dtype=tl.int64)
    walked = tl.full([ROWS], -1, dtype=tl.int64)
    length = 0
    while row < ROWS:
        token = tl.sum(tl.where(rows == row, chosen, 0), axis=0)
        emitted = tl.where(rows == length, token, emitted)
        walked = tl.where(rows == length, row.to(tl.int64), walked)
        length += 1
        is_child = (parent == row) & (drafts == token) & (rows > row)
        row = tl.min(tl.where(is_child, rows, ROWS), axis=0)
    is_kept = rows < most_rows
    tl.store(tokens + request * most_rows + rows, emitted, mask=is_kept)
    tl.store(path + request * most_rows + rows, walked, mask=is_kept)
    tl.store(num_tokens + request, length)
