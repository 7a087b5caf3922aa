"""Which of a model's routers a kernel computes.

A router is known by what it computes: on probing rows, the kernel's reference must select as it does and weigh as it
does. Where one does not, the router's own code chooses, at its seam.

Shapes: T rows, E experts, K experts per row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch

from ..kernels.device import has_triton
from ..kernels.routing_rules import GroupLimit, Router, affinities_and_scores, group_worth, outside
from ..router.routing import Routing
from ..router.topk import Observed, RouterSeam

logger = logging.getLogger(__name__)

_PROBES = 64
"""Rows that are tried: at sizes of a sixteenth to sixteen."""

_FindPart = Callable[[tuple[Any, ...]], torch.Tensor]
"""From the arguments of a router's forward to a number for each expert [E]."""


@dataclass(frozen=True, slots=True)
class KnownRouter:
    """A router that the kernel computes."""

    router: Router
    find_bias: _FindPart | None
    """What it adds to affinities for the choice."""
    find_scales: _FindPart | None = None
    """What it multiplies the weights of each expert by."""
    returns_affinities: bool = False
    """It returns affinities, else logits, before its weights and ids."""


def known_routers(seams: Sequence[RouterSeam], device: torch.device) -> list[KnownRouter]:
    """Return what the kernel computes of audited routers, one for each; none, and a line in the log, if not all."""
    if not has_triton(device) or not seams:
        return []
    found = [known_router(seam) for seam in seams]
    known = [router for router in found if router is not None]
    _say(len(known) == len(found))
    return known if len(known) == len(found) else []


def known_router(seam: RouterSeam) -> KnownRouter | None:
    """Return what the kernel computes of an audited router; None if that is not what the router does."""
    args, seam.audited_args = seam.audited_args, None
    if not args or not isinstance(args[0], torch.Tensor):
        return None
    args = (_probes(args[0]), *args[1:])
    observed = seam.observe(*args)
    if not _is_plain(observed, seam.top_k):
        return None
    if observed.routing.in_groups:
        observed = _telling(observed)
        if len(observed.logits) < _PROBES // 4:
            return None
    returns_logits = torch.equal(observed.result[0].float(), observed.logits.float())
    for router, find_bias, find_scales in _candidates(seam, observed, args):
        bias, scales = (None if find is None else find(args) for find in (find_bias, find_scales))
        if proven := _proven(router, bias, scales, observed, _numbers(seam.router)):
            return KnownRouter(proven, find_bias, find_scales, not returns_logits)
    return None


def _probes(like: torch.Tensor) -> torch.Tensor:
    """Return normal rows of the shape of ``like`` [.., T, H], the same in every process."""
    rows = torch.randn(*like.shape[:-2], _PROBES, like.shape[-1], generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(-4, 4, _PROBES, base=2)[:, None]
    return (rows * sizes).to(like)


def _is_plain(observed: Observed, top_k: int) -> bool:
    """Whether the router returned its logits or affinities, and weights and ids of each row."""
    result, rows = observed.result, len(observed.logits)
    return (
        isinstance(result, tuple)
        and len(result) == 3
        and any(torch.equal(result[0].float(), one.float()) for one in (observed.logits, observed.routing.affinities))
        and result[1].shape == result[2].shape == (rows, top_k)
    )


def _telling(observed: Observed) -> Observed:
    """Return the rows without affinities of nothing, of which none could tell whether they were set aside."""
    seen = observed.routing
    tells = (seen.affinities > 0).all(dim=1)
    routing = Routing(
        seen.scores[tells], seen.affinities[tells], seen.values[tells], seen.ids[tells], in_groups=seen.in_groups
    )
    result = tuple(part[tells] for part in observed.result)
    return replace(observed, logits=observed.logits[tells], routing=routing, result=result)


def _candidates(
    seam: RouterSeam, observed: Observed, args: tuple[Any, ...]
) -> Iterator[tuple[Router, _FindPart | None, _FindPart | None]]:
    """Yield routers, what may be their bias, and what may be their scales."""
    router = seam.router
    found: list[_FindPart | None] = [None]
    for name, part in (*router.named_parameters(), *router.named_buffers()):
        if part.numel() == seam.num_experts:
            found.append(lambda _, name=name: _part(router, name))  # type: ignore[misc]
    for place, given in enumerate(args):
        if isinstance(given, torch.Tensor) and given.shape == (seam.num_experts,):
            found.append(lambda args, place=place: args[place])  # type: ignore[misc]
    by_logits, dtype = observed.selects_logits, observed.result[1].dtype
    limits = list(_limits(seam, observed))
    for scales, sigmoid, normalise, limit, bias in product(found, (False, True), (True, False), limits, found):
        if limit is None or limit.outside or bias is None:  # 0 may be more than a biased score
            yield Router(seam.top_k, sigmoid, normalise, 1.0, by_logits, limit, dtype), bias, scales


def _limits(seam: RouterSeam, observed: Observed) -> Iterator[GroupLimit | None]:
    """Yield what the router's own whole numbers make of the experts that it set aside; None if it set aside none."""
    seen = observed.routing
    set_aside = outside(seen.scores, seen.affinities)
    if not (seen.in_groups and set_aside.any()):
        yield None
        return
    numbers = {number for number in vars(seam.router).values() if type(number) is int and number > 0}
    filled = -torch.inf if seen.scores.isneginf().any() else 0.0
    for num_groups, num_kept in product(numbers, numbers):
        size = seam.num_experts // num_groups
        # Where groups hold too few, which of the others come in is up to how topk orders equal scores
        if seam.num_experts % num_groups == 0 and seam.top_k <= num_kept * size:
            blocks = set_aside.view(-1, num_groups, size)
            is_gone = blocks.all(dim=2)
            if torch.equal(is_gone, blocks.any(dim=2)) and (is_gone.sum(dim=1) == num_groups - num_kept).all():
                yield from (GroupLimit(num_groups, num_kept, best, filled) for best in (1, 2) if best <= size)


def _part(router: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer, flat, by its dotted ``name``, whatever tensor it is at present."""
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(router.get_submodule(owner), last)
    return found.reshape(-1)


def _numbers(router: torch.nn.Module) -> list[float]:
    """Return what a router may multiply weights by."""
    return [1.0, *(float(number) for number in vars(router).values() if isinstance(number, float))]


def _proven(
    router: Router,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    observed: Observed,
    numbers: Sequence[float],
) -> Router | None:
    """Return ``router`` with one of ``numbers`` for its scale if it does as the observed one did, ties aside.

    Budgets go by affinities: those must be what a selection at the router's seam would see.
    """
    _, weights, ids = observed.result
    affinities, scores = affinities_and_scores(observed.logits, router, bias)
    seen, limit = observed.routing, router.limit
    dtype = seen.affinities.dtype
    if not torch.allclose(affinities.to(dtype), seen.affinities, rtol=_tolerance(dtype), atol=1e-6):
        return None
    if limit is not None:
        set_aside = outside(seen.scores, seen.affinities)
        if not _are_best(~set_aside.view(len(scores), limit.num_groups, -1)[:, :, 0], group_worth(scores, limit)):
            return None
        scores = scores.masked_fill(set_aside, -torch.inf)
    if not _are_best(torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, value=True), scores):
        return None
    own = affinities.gather(1, ids)
    if router.normalise:
        own = own / own.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if scales is not None:
        own = own * scales.float()[ids]
    ratio = float(weights.double().sum() / own.double().sum())
    scale = min(numbers, key=lambda number: abs(number - ratio))
    is_same = torch.allclose((own * scale).to(weights.dtype), weights, rtol=_tolerance(weights.dtype), atol=1e-6)
    return replace(router, scale=scale) if is_same else None


def _are_best(are_chosen: torch.Tensor, numbers: torch.Tensor) -> bool:
    """Whether of each row those ``are_chosen`` [T, N] have the largest ``numbers`` [T, N], ties aside."""
    ordered = numbers.sort(dim=1, descending=True).values
    chosen = numbers.masked_fill(~are_chosen, -torch.inf).sort(dim=1, descending=True).values
    places = torch.arange(numbers.shape[1], device=numbers.device)
    return torch.equal(chosen, ordered.masked_fill(places >= are_chosen.sum(dim=1, keepdim=True), -torch.inf))


def _tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that one rounding to ``dtype`` explains."""
    return 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps


@cache
def _say(is_known: bool) -> None:
    """Once: ranks of a process and layers of a model do not differ."""
    if is_known:
        logger.info("routers run as one Triton kernel behind their logits in steps that graphs replay")
    else:
        logger.warning("routers run as the model's own code in steps that graphs replay: no kernel of ours weighs so")
