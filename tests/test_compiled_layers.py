"""Layers whose dense part torch compiles, in steps that are padded to buckets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

from penstock.router.expert_budget import ExpertBudget
from penstock.workers.plan import RankPlan

from .static_steps import STEPS, exact_counts, padded, prompts, runner_of


@pytest.mark.parametrize(
    ("model_type", "backend", "in_place"),
    [
        ("qwen3_moe", "inductor", False),
        ("deepseek_v3", "aot_eager", False),
        ("deepseek_v3", "aot_eager", True),
        ("gpt_oss", "aot_eager", False),
    ],
)
def test_compiled_layers_give_what_layers_give(
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    backend: str,
    in_place: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    runner = runner_of(checkpoint(model_type))
    if in_place:
        runner.padded.objection = ""
        runner.padded.choose_attention()
        assert runner.padded.objection == ""
    runner.step(prompts())
    with caplog.at_level(logging.INFO):
        runner.padded.compile_layers(backend)
    assert "is compiled by torch" in caplog.text
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    for step in STEPS.values():
        for budget in (None, ExpertBudget(experts=4)):
            first = None if budget is None else 0
            requests = [replace(part, first_budgeted_row=first) for part in step]
            plan = RankPlan(0, 1, requests=requests, budget=budget)
            with torch.inference_mode():
                launched, replayed = runner._launched(plan), runner.padded.run(padded(plan, runner))
            torch.testing.assert_close(replayed.logits, launched.logits, rtol=1e-4, atol=1e-5)
            assert exact_counts(replayed.counts) == exact_counts(launched.counts)
    assert counters["stats"]["unique_graphs"] == num_graphs, "all shapes are compiled before the first request"


def test_what_is_ours_is_in_no_graph(checkpoint: Callable[[str], Path]) -> None:
    """Routers ask for budgets, and kernels count on the device: a compiler must see neither."""
    runner = runner_of(checkpoint("qwen3_moe"))
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call_"))
        return graph.forward

    runner.padded.compile_layers(backend)
    assert any("rsqrt" in name or "rms_norm" in name for name in seen)
    for name in ("topk", "softmax", "index_copy", "index_select", "scaled_dot_product_attention"):
        assert not any(name in target for target in seen)


def test_layers_that_cannot_be_compiled_run_as_they_are(
    checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    runner = runner_of(checkpoint("qwen3_moe"))
    runner.step(prompts())

    def backend(*_: object) -> Callable[..., object]:
        raise RuntimeError("no such instruction")

    runner.padded.compile_layers(backend)
    assert "runs as it is written" in caplog.text
    assert "no such instruction" in caplog.text
    plan = RankPlan(0, 1, requests=STEPS["plain"])
    assert runner.step(padded(plan, runner)).token_ids == runner.step(plan).token_ids
