"""Which routers run as one kernel behind their logits in a step of fixed shape, and under which budgets.

A router is known by what it computes: on probing rows, the kernel's reference must select as it does and weigh as it
does. Where one does not, or for a budget that the kernel does not know, the router's own code chooses, at its seam.

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
from ..kernels.routing_rules import KeptExperts, Router, affinities_and_scores
from ..router.budgeted_choice import LayerRanks, Reduce
from ..router.expert_budget import ExpertBudget
from ..router.routing import BudgetedRows
from ..router.topk import Observed, RouterSeam

logger = logging.getLogger(__name__)

_PROBES = 64
"""Rows that are tried: at sizes of a sixteenth to sixteen."""

_FindBias = Callable[[tuple[Any, ...]], torch.Tensor]
"""From the arguments of a router's forward to what it adds to affinities for the choice [E]."""


@dataclass(frozen=True, slots=True)
class KnownRouter:
    """A router that the kernel computes."""

    router: Router
    find_bias: _FindBias | None


class LaunchedRouting:
    """One layer's choice in one launch, within a budget if there is one; padding rows get no expert.

    ``kept`` [T] f32, after the layer has run: the share of its weight that the budget left each row.
    """

    def __init__(
        self, known: KnownRouter, valid: torch.Tensor, kept: KeptExperts | None, reduce: Reduce | None
    ) -> None:
        self._known, self._valid, self._kept, self._reduce = known, valid, kept, reduce
        self.kept: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and ids [T, K] for ``logits`` [T, E], in the place of what the router makes of them."""
        from ..kernels.expert_routing import route

        bias = None if self._known.find_bias is None else self._known.find_bias(args)
        routed = route(logits, self._known.router, bias, self._kept, self._valid, self._reduce)
        self.kept = routed.kept
        return routed.weights, routed.ids


def launched_routings(
    known: Sequence[KnownRouter],
    budget: ExpertBudget | None,
    rows: BudgetedRows | None,
    valid: torch.Tensor,
    layers: Sequence[LayerRanks],
    reduce: Reduce,
) -> list[LaunchedRouting]:
    """Return each layer's choice in a step; empty where the routers' own code chooses. ``rows``: under a budget."""
    if not known or (budget is not None and not knows(budget)):
        return []
    reduces = reduce if budget is not None and budget.scope == "global" else None
    return [
        LaunchedRouting(router, valid, None if budget is None else _kept(budget, rows, layer), reduces)
        for router, layer in zip(known, layers, strict=True)
    ]


def knows(budget: ExpertBudget) -> bool:
    """Whether the kernel keeps to ``budget``: to a list of experts, but to no limits on the ranks of a row."""
    return budget.keeps_some and not budget.limits_ranks


def _kept(budget: ExpertBudget, rows: BudgetedRows | None, layer: LayerRanks) -> KeptExperts:
    assert rows is not None, "a budget acts on rows"
    assert budget.coverage is not None or rows.num_experts is not None, "a step of fixed shape reads its number"
    return KeptExperts(
        score=budget.score,
        num_groups=rows.num_groups,
        budgeted=rows.budgeted,
        reach=rows.reach,
        num_experts=rows.num_experts if budget.coverage is None else None,
        coverage=1.0 if budget.coverage is None else budget.coverage,
        owner=layer.owner if budget.is_per_owner else None,
        balance=budget.rank_balance,
        truncates=budget.rest == "truncation",
    )


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
    for router, find_bias in _candidates(seam, observed, args):
        bias = None if find_bias is None else find_bias(args)
        if proven := _proven(router, bias, observed, _numbers(seam.router)):
            return KnownRouter(proven, find_bias)
    return None


def _probes(like: torch.Tensor) -> torch.Tensor:
    """Return normal rows of the shape of ``like`` [.., T, H], the same in every process."""
    rows = torch.randn(*like.shape[:-2], _PROBES, like.shape[-1], generator=torch.Generator().manual_seed(0))
    sizes = torch.logspace(-4, 4, _PROBES, base=2)[:, None]
    return (rows * sizes).to(like)


def _is_plain(observed: Observed, top_k: int) -> bool:
    """Whether the router returned its logits, weights and ids of each row, and limits none to groups of experts."""
    result, rows, routing = observed.result, len(observed.logits), observed.routing
    is_outside = routing.scores.isneginf() | ((routing.scores == 0) & (routing.affinities > 0))
    return (
        not (routing.in_groups and is_outside.any())
        and isinstance(result, tuple)
        and len(result) == 3
        and torch.equal(result[0].float(), observed.logits.float())
        and result[1].shape == result[2].shape == (rows, top_k)
    )


def _candidates(
    seam: RouterSeam, observed: Observed, args: tuple[Any, ...]
) -> Iterator[tuple[Router, _FindBias | None]]:
    shape, router = (seam.num_experts,), seam.router
    biases: list[_FindBias | None] = [None]
    for name, part in (*router.named_parameters(), *router.named_buffers()):
        if part.shape == shape:
            biases.append(lambda _, name=name: _part(router, name))  # type: ignore[misc]
    for place, given in enumerate(args):
        if isinstance(given, torch.Tensor) and given.shape == shape:
            biases.append(lambda args, place=place: args[place])  # type: ignore[misc]
    for sigmoid, normalise, bias in product((False, True), (True, False), biases):
        yield Router(seam.top_k, sigmoid, normalise, 1.0, observed.selects_logits, observed.result[1].dtype), bias


def _part(router: torch.nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or buffer by its dotted ``name``, whatever tensor it is at present."""
    owner, _, last = name.rpartition(".")
    found: torch.Tensor = getattr(router.get_submodule(owner), last)
    return found


def _numbers(router: torch.nn.Module) -> list[float]:
    """Return what a router may multiply weights by."""
    return [1.0, *(float(number) for number in vars(router).values() if isinstance(number, float))]


def _proven(router: Router, bias: torch.Tensor | None, observed: Observed, scales: Sequence[float]) -> Router | None:
    """Return ``router`` with one of ``scales`` if it selects and weighs as the observed one did, ties aside.

    Budgets go by affinities: those must be what a selection at the router's seam would see.
    """
    _, weights, ids = observed.result
    affinities, scores = affinities_and_scores(observed.logits, router, bias)
    seen = observed.routing.affinities
    if not torch.allclose(affinities.to(seen.dtype), seen, rtol=_tolerance(seen.dtype), atol=1e-6):
        return None
    best = scores.topk(router.top_k, dim=1).values
    if not torch.equal(scores.gather(1, ids).sort(dim=1, descending=True).values, best):
        return None
    own = affinities.gather(1, ids)
    if router.normalise:
        own = own / own.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    ratio = float(weights.double().sum() / own.double().sum())
    scale = min(scales, key=lambda number: abs(number - ratio))
    is_same = torch.allclose((own * scale).to(weights.dtype), weights, rtol=_tolerance(weights.dtype), atol=1e-6)
    return replace(router, scale=scale) if is_same else None


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
