"""Routers that a kernel computes are known by what they compute, and others keep their own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .triton_device import DEVICE

from penstock.kernels.device import triton_on  # isort: skip
from penstock.kernels.routing_rules import GroupLimit
from penstock.router.topk import RouterSeam
from penstock.workers.gpu_routing import LaunchedRouting
from penstock.workers.known_routers import known_router

from .test_topk_seam import audit, hidden, router_of
from .tiny_configs import settings_of

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="there `-m gpu` tests run the kernels as they are")

KNOWN = {
    "qwen3_moe": {"sigmoid": False, "normalise": False, "by_logits": False},
    "mixtral": {"sigmoid": False, "normalise": True, "by_logits": False},
    "gpt_oss": {"sigmoid": False, "normalise": True, "by_logits": True},
    "deepseek_v2": {"sigmoid": False, "normalise": False, "limit": GroupLimit(4, 2, 1, 0.0)},
    "deepseek_v3": {"sigmoid": True, "normalise": True, "limit": GroupLimit(4, 2, 2)},
    "cohere2_moe": None,
    "kolibri1": None,
}


@pytest.mark.parametrize("model_type", KNOWN)
def test_routers_are_known_by_what_they_compute(checkpoint: Callable[[str], Path], model_type: str) -> None:
    router, top_k = router_of(checkpoint(model_type))
    seam = RouterSeam(router, 8, top_k)
    with torch.inference_mode():
        audit(seam, router, hidden(1))
        known = known_router(seam)
    if KNOWN[model_type] is None:
        assert known is None
    else:
        assert known is not None
        assert {name: getattr(known.router, name) for name in KNOWN[model_type]} == KNOWN[model_type]


def seam_over(kind: str, **settings: object) -> RouterSeam:
    """A router of DeepSeek's over 8 experts, of which rows choose 2."""
    from transformers import AutoConfig
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    router_of_kind = {"deepseek_v2": DeepseekV2TopkRouter, "deepseek_v3": DeepseekV3TopkRouter}[kind]
    router = router_of_kind(AutoConfig.for_model(kind, **{**settings_of(kind), **settings}))
    with torch.inference_mode():
        router.weight.normal_()
        if kind == "deepseek_v3":
            router.e_score_correction_bias.uniform_(-0.2, 0.2)
        seam = RouterSeam(router, 8, 2)
        audit(seam, router, hidden(1))
    return seam


@pytest.mark.parametrize(
    ("kind", "num_groups", "num_kept", "limit"),
    [
        ("deepseek_v3", 1, 1, None),
        ("deepseek_v3", 2, 1, GroupLimit(2, 1, 2)),
        ("deepseek_v3", 4, 1, GroupLimit(4, 1, 2)),
        ("deepseek_v3", 4, 3, GroupLimit(4, 3, 2)),
        ("deepseek_v3", 4, 4, None),
        ("deepseek_v2", 8, 3, GroupLimit(8, 3, 1, 0.0)),
        ("deepseek_v2", 2, 2, None),
    ],
)
def test_groups_of_experts_are_known(kind: str, num_groups: int, num_kept: int, limit: GroupLimit | None) -> None:
    seam = seam_over(kind, n_group=num_groups, topk_group=num_kept, routed_scaling_factor=2.5)
    with torch.inference_mode():
        known = known_router(seam)
    assert known is not None
    assert (known.router.sigmoid, known.router.scale) == (kind == "deepseek_v3", 2.5)
    assert known.router.limit == limit
    assert (known.find_bias is not None) == (kind == "deepseek_v3")


class _Groups(torch.nn.Module):
    """A router that lets rows choose 2 experts in 2 of 4 groups, and is wrong in one of many ways."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong, self.groups, self.kept = wrong, 1 if wrong == "too few" else 4, 2
        self.weight = torch.nn.Parameter(torch.randn(8, 32, generator=torch.Generator().manual_seed(3)) / 6)
        self.register_buffer(
            "lift", torch.linspace(-0.9, -0.4, 8) if wrong == "zeros" else torch.linspace(-0.2, 0.3, 8)
        )

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(rows, self.weight)
        affinities = torch.sigmoid(logits)
        scores = affinities + self.lift
        blocks = (affinities if self.wrong == "unbiased" else scores).view(-1, 4, 2)
        if self.wrong == "strided":
            blocks = blocks.view(-1, 2, 4).transpose(1, 2)
        worth = blocks.amin(dim=2) if self.wrong == "least" else blocks.sum(dim=2)
        _, stays = torch.topk(worth, 2)
        is_inside = torch.zeros(len(rows), 4, dtype=torch.bool).scatter(1, stays, True)
        is_inside = is_inside.repeat(1, 2) if self.wrong == "strided" else is_inside.repeat_interleave(2, dim=1)
        _, ids = torch.topk(scores.masked_fill(~is_inside, 0.0 if self.wrong == "zeros" else -torch.inf), 2)
        weights = affinities.gather(1, ids)
        return logits, weights / weights.sum(dim=1, keepdim=True), ids


@pytest.mark.parametrize("wrong", ["", "unbiased", "strided", "least", "zeros", "too few"])
def test_groups_that_are_something_else_keep_their_router_s_code(wrong: str) -> None:
    seam = RouterSeam(router := _Groups(wrong), 8, 2)
    with torch.inference_mode():
        audit(seam, router, hidden(1))
        known = known_router(seam)
    assert (known is None) == bool(wrong)
    if known is not None:
        assert known.router.limit == GroupLimit(4, 2, 2)


def test_scales_of_experts_are_known() -> None:
    from transformers import AutoConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    router = Gemma4TextRouter(AutoConfig.for_model("gemma4_text", **settings_of("gemma4_text")))
    seam = RouterSeam(router, 8, 2)
    with torch.inference_mode():
        router.per_expert_scale.uniform_(0.5, 2)
        audit(seam, router, hidden(1))
        known = known_router(seam)
        assert known is not None
        assert known.find_bias is None
        assert known.find_scales is not None
        assert torch.equal(known.find_scales(()), router.per_expert_scale)
        affinities, weights, ids = router(hidden())
        seam.replacement = LaunchedRouting(known, torch.ones(40, dtype=torch.bool), None, None)
        with triton_on("cpu"):
            found = router(hidden())
    assert torch.equal(found[2], ids)
    torch.testing.assert_close(found[:2], (affinities, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighs_by", ["softmax", "sigmoid"])
def test_logits_are_not_weighed_by_their_sigmoids(weighs_by: str) -> None:
    from transformers import AutoConfig
    from transformers.models.cohere2_moe.modeling_cohere2_moe import Cohere2MoeTopKRouter

    settings = {**settings_of("cohere2_moe"), "expert_selection_fn": weighs_by}
    seam = RouterSeam(router := Cohere2MoeTopKRouter(AutoConfig.for_model("cohere2_moe", **settings)), 8, 2)
    with torch.inference_mode():
        router.weight.normal_()
        audit(seam, router, hidden(1))
        known = known_router(seam)
    assert (known is None) == (weighs_by == "sigmoid")


class _Odd(torch.nn.Module):
    """A router that weighs by sigmoids, with a bias, and is wrong in one of many ways."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong, self.factor = wrong, 2.827
        self.weight = torch.nn.Parameter(torch.randn(8, 32, generator=torch.Generator().manual_seed(3)) / 6)
        self.register_buffer("lift", torch.linspace(-0.2, 0.3, 8))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(rows, self.weight)
        scores = logits.sigmoid() * (1.1 if self.wrong == "affinities" else 1)
        _, ids = torch.topk(scores + self.lift * (1.5 if self.wrong == "bias" else 1), 3)
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=1, keepdim=True) + (1e-4 if self.wrong == "sum" else 1e-20))
        if self.wrong == "ids":
            ids = ids.flip(1)
        return logits, weights * self.factor * (1.0001 if self.wrong == "scale" else 1), ids


@pytest.mark.parametrize("wrong", ["", "affinities", "bias", "sum", "ids", "scale"])
def test_a_router_that_computes_something_else_keeps_its_code(wrong: str) -> None:
    seam = RouterSeam(router := _Odd(wrong), 8, 3)
    with torch.inference_mode():
        audit(seam, router, hidden(1))
        known = known_router(seam)
    assert (known is None) == bool(wrong)
    if known is not None:
        assert (known.router.sigmoid, known.router.normalise, known.router.scale) == (True, True, 2.827)
        assert known.find_bias is not None
        assert torch.equal(known.find_bias(()), router.lift)
