"""The compiled choice within a budget, beside torch's operations: the same to the bit."""

from __future__ import annotations

import ctypes
import itertools
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from penstock.kernels import expert_choice
from penstock.kernels.expert_choice import compile_kernel, kernel
from penstock.router.budgeted_choice import LayerRanks, Limits, choose, substitute
from penstock.router.budgeted_selection import BudgetedSelection
from penstock.router.compiled_choice import CompiledChoice, compiled_choice
from penstock.router.expert_budget import RESTS, SCOPES, SCORES, ExpertBudget
from penstock.router.routing import BudgetedRows, Routing

ROUTERS = ("softmax", "ties", "logits", "groups at 0", "groups at -inf")
SHAPES = [(1, 8, 2), (8, 32, 4), (9, 24, 3), (40, 128, 8)]
"""T, E, K"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the kernel is compiled where it runs")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return compile_kernel()


def routing_of(router: str, num_rows: int, num_experts: int, top_k: int, seed: int = 0) -> Routing:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_experts, generator=rng) * 2
    if router == "ties":
        logits = logits.round()
    if router in ("softmax", "ties"):
        scores = affinities = logits.softmax(-1)
    elif router == "logits":
        scores, affinities = logits, logits.softmax(-1)
    else:
        affinities = logits.sigmoid()
        quarter = num_experts // 4
        inside = torch.rand(num_rows, 4, generator=rng).argsort(1).lt(2).repeat_interleave(quarter, dim=1)
        outside = 0.0 if router == "groups at 0" else -torch.inf
        scores = (affinities + torch.randn(num_experts, generator=rng)).masked_fill(~inside, outside)
    return Routing(scores, affinities, *scores.topk(top_k), in_groups=router.startswith("groups"))


def rows_of(num_rows: int, kind: str, seed: int = 0) -> BudgetedRows:
    rng = torch.Generator().manual_seed(seed)
    num_groups = 1 if kind == "all" else 3
    return BudgetedRows(
        budgeted=torch.rand(num_rows, generator=rng) < (1.0 if kind == "all" else 0.6),
        valid=torch.rand(num_rows, generator=rng) < 0.8 if kind == "padded" else None,
        groups=torch.randint(num_groups, (num_rows,), generator=rng),
        num_groups=num_groups,
        reach=torch.rand(num_rows, generator=rng),
        all_budgeted=kind == "all",
    )


def ranks_of(num_experts: int, num_ranks: int) -> LayerRanks:
    owner = torch.randint(num_ranks, (num_experts,), generator=torch.Generator().manual_seed(3))
    return LayerRanks(owner, num_ranks, num_ranks // 2)


class OtherRanks:
    """Adds what other ranks would: the same to whoever asks."""

    def __init__(self, rows: BudgetedRows, num_experts: int) -> None:
        rng = torch.Generator().manual_seed(5)
        shape = (rows.num_groups, num_experts)
        worth, loaded = torch.rand(shape, generator=rng), torch.rand(shape, generator=rng) < 0.1
        self._added = torch.stack([worth, loaded.float()])
        self.seen: list[torch.Tensor] = []

    def __call__(self, both: torch.Tensor) -> None:
        self.seen.append(both.clone())
        both += self._added


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same(tensor: torch.Tensor, expected: torch.Tensor) -> bool:
    return tensor.dtype == expected.dtype and torch.equal(tensor.nan_to_num(7.0), expected.nan_to_num(7.0))


Choice = tuple[Limits, torch.Tensor, torch.Tensor]


def assert_same(found: Choice, expected: Choice, what: object) -> None:
    (limits, *choice), (expected_limits, *expected_choice) = found, expected
    assert torch.equal(limits.allowed, expected_limits.allowed), what
    assert same(limits.kept, expected_limits.kept), what
    for tensor, wanted in zip(choice, expected_choice, strict=True):
        assert same(tensor, wanted), what


LISTS = [{"experts": 0}, {"experts": 3}, {"coverage": 0.3}, {"coverage": 0.9}, {"coverage": 1.0}, {}]
"""Beyond top-k; none where only ranks are limited."""
RANK_LIMITS = [{}, {"max_ranks_per_row": 1}, {"max_ranks_per_row": 2, "min_rank_share": 0.2}, {"min_rank_share": 0.4}]


def budgets(top_k: int) -> list[ExpertBudget]:
    """Every score, rest and scope, with every list and every limit on ranks that fits."""
    found = []
    for kept, limits, score, rest, scope in itertools.product(LISTS, RANK_LIMITS, SCORES, RESTS, SCOPES):
        if ("coverage" in kept and scope == "owner") or not (kept or limits) or (not kept and score != "squared"):
            continue
        number = {"experts": top_k + kept["experts"]} if "experts" in kept else kept
        found.append(ExpertBudget(**number, **limits, score=score, rest=rest, scope=scope))
        if "experts" in kept and scope != "owner" and not limits:
            found.append(ExpertBudget(**number, score=score, rest=rest, scope=scope, rank_balance=0.4))
    return found


@needs_compiler
@pytest.mark.parametrize("kind", ["all", "mixed", "padded"])
@pytest.mark.parametrize("router", ROUTERS)
def test_it_is_the_reference_to_the_bit(library: ctypes.CDLL, router: str, kind: str) -> None:
    changed = cut = 0
    for number, (num_rows, num_experts, top_k) in enumerate(SHAPES):
        rows = rows_of(num_rows, kind, seed=number)
        ranks = ranks_of(num_experts, 4)
        # The largest shape has a part of the budgets, as it takes most of the time
        every = 7 if num_experts > 100 else 1
        for budget in budgets(top_k)[number::every]:
            routing = routing_of(router, num_rows, num_experts, top_k, seed=number)
            others = OtherRanks(rows, num_experts)
            expected = choose(budget, routing, rows, ranks, others)
            compiled = CompiledChoice(library, budget, rows, others)
            assert compiled.takes(routing)
            with poisoned_memory():
                found = compiled(routing, ranks)
            assert_same(found, expected, (budget, num_rows, num_experts))
            assert len(others.seen) == 2 * (budget.keeps_some and budget.scope == "global")
            if others.seen:
                assert torch.equal(*others.seen), budget
            changed += not torch.equal(found[2], routing.ids)
            cut += not found[0].allowed.all()
    assert changed > 100
    assert cut > changed


@needs_compiler
@pytest.mark.parametrize("seed", range(20))
def test_of_equal_experts_the_lowest_come_first(library: ctypes.CDLL, seed: int) -> None:
    routing, rows = routing_of("ties", 8, 32, 4, seed), rows_of(8, "all")
    for score, experts in itertools.product(SCORES, (4, 6, 9, 14)):
        budget = ExpertBudget(experts=experts, score=score)
        expected = choose(budget, routing, rows, ranks_of(32, 1))
        assert_same(CompiledChoice(library, budget, rows)(routing, ranks_of(32, 1)), expected, budget)
        kept = expected[0].allowed[0].tolist()
        for row, own, (values, ids) in zip(
            routing.scores.tolist(), routing.ids.tolist(), zip(*(part.tolist() for part in expected[1:]), strict=True),
            strict=True,
        ):  # fmt: skip
            allowed = [expert for expert in range(32) if kept[expert]]
            by_hand = sorted(allowed, key=lambda expert: (-row[expert], expert))[:4]
            assert ids == (own if set(own) <= set(allowed) else by_hand)
            assert values == [row[expert] for expert in ids]


def test_a_list_prefers_the_lower_of_equal_experts() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.25, 0.25, 0.0, 0.25, 0.25, 0.0]])
    ids = torch.tensor([[6, 5, 3, 2]])
    routing, rows = Routing(scores, scores, scores.gather(1, ids), ids), rows_of(1, "all")
    for experts, kept in ((4, [2, 3, 5, 6]), (6, [0, 1, 2, 3, 5, 6])):
        limits, values, chosen = choose(ExpertBudget(experts=experts), routing, rows, ranks_of(8, 1))
        assert limits.allowed[0].nonzero()[:, 0].tolist() == kept
        assert (values.tolist(), chosen.tolist()) == (routing.values.tolist(), ids.tolist()), "its own, in its order"
    allowed = torch.tensor([[True, True, False, True, True, True, False, False]])
    assert substitute(routing, allowed)[1].tolist() == [[3, 5, 0, 1]]


@needs_compiler
def test_all_experts_leave_a_router_its_own_choice_even_among_equals(library: ctypes.CDLL) -> None:
    routing = routing_of("ties", 40, 32, 4)
    reversed_ids = routing.ids.flip(1)  # as a router may break ties that no sort would
    routing = replace(routing, ids=reversed_ids, values=routing.scores.gather(1, reversed_ids))
    rows, ranks = rows_of(40, "all"), ranks_of(32, 1)
    budget = ExpertBudget(experts=32)
    for _, values, ids in (choose(budget, routing, rows, ranks), CompiledChoice(library, budget, rows)(routing, ranks)):
        assert torch.equal(values, routing.values)
        assert torch.equal(ids, routing.ids)


@needs_compiler
@pytest.mark.parametrize("score", SCORES)
def test_what_padding_rows_hold_reaches_no_other_row(library: ctypes.CDLL, score: str) -> None:
    routing, rows = routing_of("softmax", 8, 32, 4), rows_of(8, "mixed")
    padding = torch.tensor([False] * 6 + [True] * 2)
    rows = replace(rows, budgeted=rows.budgeted & ~padding, valid=~padding)
    spoiled = replace(
        routing, scores=routing.scores.masked_fill(padding[:, None], torch.nan),
        affinities=routing.affinities.masked_fill(padding[:, None], torch.nan),
    )  # fmt: skip
    budget, ranks = ExpertBudget(experts=5, score=score, scope="request"), ranks_of(32, 1)
    clean = choose(budget, routing, rows, ranks)
    for found in (choose(budget, spoiled, rows, ranks), CompiledChoice(library, budget, rows)(spoiled, ranks)):
        assert torch.equal(found[0].allowed, clean[0].allowed)
        assert torch.equal(found[1], clean[1])
        assert torch.equal(found[2], clean[2])


@needs_compiler
def test_it_reads_tensors_that_are_not_contiguous(library: ctypes.CDLL) -> None:
    routing, rows, ranks = routing_of("groups at 0", 8, 32, 4), rows_of(8, "mixed"), ranks_of(32, 4)
    parts = (routing.scores, routing.affinities, routing.values, routing.ids)
    strided = Routing(*(part.t().contiguous().t() for part in parts))
    assert not strided.scores.is_contiguous()
    budget = ExpertBudget(experts=6, max_ranks_per_row=1)
    assert_same(CompiledChoice(library, budget, rows)(strided, ranks), choose(budget, routing, rows, ranks), budget)


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_a_layer_takes_few_operations() -> None:
    budget, routing, rows = ExpertBudget(experts=12), routing_of("logits", 8, 32, 4), rows_of(8, "all")
    ranks = ranks_of(32, 1)
    choose(budget, routing, rows, ranks)
    with Operations() as reference:
        choose(budget, routing, rows, ranks)
    assert reference.number <= 40
    if kernel() is not None:
        selection = BudgetedSelection(budget, rows, ranks, None)
        with Operations() as compiled:
            values, ids = selection(routing)
            selection.truncate(ids, values)
        assert compiled.number <= 4, "its outputs' memory"


@pytest.mark.parametrize(
    "text",
    [
        *(f"experts=6,score={score},scope=request" for score in SCORES),
        "experts=6,scope=owner,rest=truncation",
        "experts=6,scope=global,min_rank_share=0.2",
        "coverage=0.5,max_ranks_per_row=1",
    ],
)
@pytest.mark.parametrize("router", ["softmax", "groups at 0"])
def test_the_reference_reads_no_number_on_the_host(router: str, text: str) -> None:
    """Tensors without numbers do: whoever reads one, or makes a shape of it, fails."""
    routing, rows = routing_of(router, 8, 32, 4), rows_of(8, "padded")
    parts = (routing.scores, routing.affinities, routing.values, routing.ids)
    routing = Routing(*(part.to("meta") for part in parts), in_groups=routing.in_groups)
    held = {name: getattr(rows, name).to("meta") for name in ("budgeted", "valid", "groups", "reach")}
    ranks = LayerRanks(torch.empty(32, dtype=torch.int64, device="meta"), 4, 1)
    limits, values, ids = choose(ExpertBudget.parse(text), routing, replace(rows, **held), ranks, lambda both: None)
    assert limits.allowed.shape == (8, 32)
    assert values.shape == ids.shape == (8, 4)
    assert limits.kept.shape == (8,)


def test_other_types_are_left_to_torch() -> None:
    routing, rows, ranks = routing_of("softmax", 8, 32, 4), rows_of(8, "mixed"), ranks_of(32, 1)
    narrow = routing.scores.bfloat16()
    half = Routing(narrow, narrow, *narrow.topk(4), in_groups=False)
    budget = ExpertBudget(experts=5)
    expected = choose(budget, half, rows, ranks)
    values, ids = BudgetedSelection(budget, rows, ranks, None)(half)
    assert torch.equal(values, expected[1])
    assert torch.equal(ids, expected[2])


@needs_compiler
@pytest.mark.parametrize("failure", ["no compiler", "it fails"])
def test_without_a_compiler_torch_chooses(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    routing, rows, ranks = routing_of("softmax", 8, 32, 4), rows_of(8, "mixed"), ranks_of(32, 1)
    budget = ExpertBudget(experts=5)
    compiled = BudgetedSelection(budget, rows, ranks, None)(routing)
    kernel.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        if failure == "no compiler":
            patch.setattr(shutil, "which", lambda name: None)
        else:
            patch.setattr(expert_choice, "_FLAGS", ("--no-such-flag",))
        assert compiled_choice(budget, rows) is None
        found = BudgetedSelection(budget, rows, ranks, None)(routing)
    assert len(caplog.records) == 1
    for tensor, expected in zip(found, compiled, strict=True):
        assert torch.equal(tensor, expected)
    kernel.cache_clear()
    assert compiled_choice(budget, rows) is not None
