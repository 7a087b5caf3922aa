from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.router.routing import Routing
from penstock.router.topk import RouterSeam
from penstock.workers.architectures import SUPPORTED, UNSTEERABLE
from penstock.workers.known_routers import KnownRouter, known_router
from penstock.workers.loader import _moe_modules

GPU_PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
MODEL_TYPES = ["qwen3_moe", "deepseek_v3", "deepseek_v2", "mixtral", "olmoe"]
BY_NAME = {"qwen3_moe", "mixtral", "olmoe"}
"""Those of them whose forwards name all that is watched; DeepSeek's calls a method of its scores."""
Router = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def router_of(directory: Path) -> tuple[torch.nn.Module, int]:
    """A router of transformers' own model, and its top_k."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    _, routers = _moe_modules(model)
    return routers[-1], model.config.num_experts_per_tok


def audit(seam: RouterSeam, router: torch.nn.Module, rows: torch.Tensor) -> None:
    seam.audit = True
    router(rows)
    seam.audit = False


def hidden(rows: int = 40) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("audited", [False, True], ids=["unaudited", "audited"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_identity_selection_reproduces_the_router(
    checkpoint: Callable[[str], Path], model_type: str, audited: bool
) -> None:
    router, top_k = router_of(checkpoint(model_type))
    with torch.inference_mode():
        expected = router(hidden())
        seam = RouterSeam(router, 8, top_k)
        if audited:
            audit(seam, router, hidden(1))
        assert seam.is_overlaid == (audited and model_type in BY_NAME)
        asked = []

        def identity(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
            asked.append((tuple(routing.scores.shape), routing.ids.shape[1]))
            return routing.values, routing.ids

        seam.selection = identity
        steered = router(hidden())
        seam.selection = None
        untouched = router(hidden())
    assert asked == [((40, 8), top_k)]
    for before, after in zip(expected, untouched, strict=True):
        assert torch.equal(before, after)
    for before, after in zip(expected, steered, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_selection_steers_and_the_model_still_weighs(checkpoint: Callable[[str], Path], model_type: str) -> None:
    router, top_k = router_of(checkpoint(model_type))
    chosen = [6, 1, 3][:top_k]

    def always(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor(chosen).expand(len(routing.scores), top_k)
        return routing.scores.gather(1, ids), ids

    with torch.inference_mode():
        logits, weights, ids = router(hidden())
        seam = RouterSeam(router, 8, top_k)
        seam.selection = always
        steered_logits, steered_weights, steered_ids = router(hidden())
    assert steered_ids.tolist() == [chosen] * 40
    assert torch.equal(logits, steered_logits)
    # Rows that chose these experts anyway got the same weights: gathering and normalising stay the model's
    same = [row for row in range(40) if sorted(ids[row].tolist()) == sorted(chosen)]
    for row in same:
        by_id = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        assert steered_weights[row].tolist() == pytest.approx([by_id[expert] for expert in chosen])
    if model_type == "mixtral":
        probabilities = logits.softmax(dim=-1)[:, chosen]
        torch.testing.assert_close(steered_weights, probabilities / probabilities.sum(dim=-1, keepdim=True))
    assert torch.isfinite(steered_weights).all()


@pytest.mark.parametrize("model_type", [name for name in SUPPORTED if name not in UNSTEERABLE])
def test_in_every_architecture_the_selection_reaches_the_experts(
    checkpoint: Callable[[str], Path], model_type: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint(model_type), dtype=torch.float32).eval()
    experts, routers = _moe_modules(model)
    seen: list[torch.Tensor] = []
    for module in experts:
        module.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    ids = torch.arange(20, 31)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        top_k = seen[0].shape[-1]
        seams = [RouterSeam(router, 8, top_k) for router in routers]
        routings: list[Routing] = []

        def own(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
            routings.append(routing)
            return torch.topk(routing.scores, top_k, dim=-1)

        for seam in seams:
            seam.selection = own
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        for seam in seams:
            seam.audit = True
        model(ids[:, :1])
        for seam in seams:
            seam.audit = False
        assert {behind_logits(known_router(seam)) for seam in seams} == {documented()[model_type]}
        unaudited, routings = routings[: len(experts)], []
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        for before, after in zip(unaudited, routings, strict=True):
            torch.testing.assert_close(vars_of(after), vars_of(before), rtol=1e-5, atol=1e-5)
        chosen = torch.tensor([6, 1, 3][:top_k])
        for seam in seams:
            seam.selection = lambda routing: (routing.scores[:, chosen], chosen.expand(len(routing.scores), top_k))
        seen.clear()
        steered = model(ids).logits
    assert len(routings) == len(experts)
    for routing in routings:  # experts are outside a row's groups where the seam has said so, and nowhere else
        outside = routing.scores.isneginf() | ((routing.scores == 0) & (routing.affinities > 0))
        assert bool(outside.any()) == routing.in_groups
    assert len(seen) == len(experts)
    for selected in seen:
        assert selected.tolist() == [chosen.tolist()] * 11
    assert torch.isfinite(steered).all()
    assert not torch.allclose(steered, expected)


def behind_logits(known: KnownRouter | None) -> str:
    """What docs/gpu.md calls what follows a router's logits in replayed steps."""
    if known is None:
        return "its own code"
    return "the kernel, without" if known.router.limit is None else "the kernel, with groups"


def documented() -> dict[str, str]:
    """What docs/gpu.md says of each architecture."""
    table = re.findall(
        r"^\| (the kernel, \w+(?: groups)?|its own code) \| (`.*`) \|$", GPU_PAGE.read_text(), re.MULTILINE
    )
    return {name.strip("`"): kind for kind, names in table for name in names.split(", ")}


def test_the_gpu_page_has_every_architecture_once() -> None:
    assert documented().keys() == set(SUPPORTED)
    assert {name for name in UNSTEERABLE if documented()[name] != "its own code"} == set()


def vars_of(routing: Routing) -> list[torch.Tensor | bool]:
    return [routing.scores, routing.affinities, routing.values, routing.ids, routing.in_groups]


class _Named(torch.nn.Module):
    """A router of this module's own names."""

    def forward(self, scores: torch.Tensor) -> Any:
        return torch.topk(torch.nn.functional.softmax(scores, dim=-1), 2)


class _Half(torch.nn.Module):
    """A router that names its top-k, and calls its softmax otherwise."""

    def forward(self, scores: torch.Tensor) -> Any:
        return torch.topk(scores.softmax(dim=-1), 2)


class _Helped(torch.nn.Module):
    """A router that leaves its top-k to a helper."""

    def forward(self, scores: torch.Tensor) -> Any:
        return _best(scores)


def _best(scores: torch.Tensor) -> Any:
    return torch.topk(scores, 2)


@pytest.mark.parametrize(("kind", "by_name"), [(_Named, True), (_Half, False), (_Helped, False)])
def test_a_router_is_steered_by_name_only_where_that_sees_all(kind: type[torch.nn.Module], by_name: bool) -> None:
    routings: list[Routing] = []

    def last(routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        routings.append(routing)
        return routing.scores[:, 6:], torch.tensor([[6, 7]]).expand(5, 2)

    router = kind()
    seam = RouterSeam(router, 8, 2)
    scores = torch.rand(5, 8)
    for audited in (False, True):
        if audited:
            audit(seam, router, torch.rand(1, 8))
        seam.selection = last
        assert router(scores)[1].tolist() == [[6, 7]] * 5
        seam.selection = None
    assert seam.is_overlaid == by_name
    torch.testing.assert_close(vars_of(routings[1]), vars_of(routings[0]), rtol=0, atol=0)
    assert torch.equal(router(scores)[1], _best(scores)[1])


class _Odd(torch.nn.Module):
    """A router whose forward is given."""

    def __init__(self, choose: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.choose = choose

    def forward(self, scores: torch.Tensor) -> Any:
        return self.choose(scores)


@pytest.mark.parametrize(
    ("choose", "hits"),
    [
        (lambda scores: scores.argsort(dim=-1, descending=True)[:, :2], 0),
        (lambda scores: torch.topk(scores, 3).indices, 0),
        (lambda scores: torch.topk(scores[:, :4], 2).indices, 0),
        (lambda scores: torch.topk(scores[None], 2).indices, 0),
        (lambda scores: (scores.topk(2), torch.topk(scores, k=2)), 2),
    ],
)
def test_a_router_that_cannot_be_steered_is_refused(choose: Callable[[torch.Tensor], Any], hits: int) -> None:
    router = _Odd(choose)
    seam = RouterSeam(router, 8, 2)
    router(torch.rand(5, 8))  # nobody asks
    seam.audit = True
    with pytest.raises(ValueError, match=rf"^model: .* 8 experts {hits} times, expected once"):
        router(torch.rand(5, 8))
    seam.audit = False
    seam.selection = lambda routing: (routing.scores[:, :2], torch.arange(2).expand(5, 2))
    with pytest.raises(ValueError, match="cannot be steered"):
        router(torch.rand(5, 8))


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores: torch.topk(scores, 2, dim=-1),
        lambda scores: torch.topk(input=scores, k=2, sorted=False),
        lambda scores: scores.topk(k=2),
        lambda scores: scores.topk(2, -1),
    ],
)
def test_every_spelling_of_topk_is_seen(choose: Callable[[torch.Tensor], Any]) -> None:
    router = _Odd(choose)
    seam = RouterSeam(router, 8, 2)
    seam.audit = True
    router(torch.rand(5, 8))
    seam.selection = lambda routing: (routing.scores[:, :2], torch.tensor([[7, 0]]).expand(5, 2))
    assert router(torch.rand(5, 8))[1].tolist() == [[7, 0]] * 5


def test_the_seam_reaches_nothing_outside_its_router() -> None:
    router = _Odd(lambda scores: torch.topk(scores, 2))
    seam = RouterSeam(router, 8, 2)
    seam.selection = lambda routing: (routing.scores[:, :2], torch.zeros(3, 2, dtype=torch.int64))
    scores = torch.arange(8.0).expand(3, 8)
    assert router(scores)[1].tolist() == [[0, 0]] * 3
    assert torch.topk(scores, 2)[1].tolist() == [[7, 6]] * 3
