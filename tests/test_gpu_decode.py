"""The parts of benchmarks/gpu_decode on a CPU, with shapes that fit there."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.benchmarks import gpu_decode
from penstock.benchmarks.fixed_steps import FixedSteps, step_bytes
from penstock.benchmarks.harness import Options
from penstock.benchmarks.model_shapes import (
    SHAPES,
    demo_share,
    random_model,
    skew_routers,
    uniform_experts,
)
from penstock.workers.loader import LoadedModel
from penstock.workers.runner import ModelRunner

CPU = torch.device("cpu")
PUBLISHED = {  # billions of parameters, as the models' cards say
    "OLMoE-1B-7B": 6.92,
    "Qwen3-30B-A3B": 30.5,
    "DeepSeek-V2-Lite": 15.7,
    "GPT-OSS-20B": 20.9,
    "Mixtral-8x7B": 46.7,
}


def tiny(name: str) -> Any:
    config = SHAPES[name]()
    config.num_hidden_layers = 3
    config.hidden_size, config.vocab_size = 32, 128
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    for field, size in {"head_dim": 8, "intermediate_size": 24, "moe_intermediate_size": 16}.items():
        if getattr(config, field, None) is not None:
            setattr(config, field, size)
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:3]
    return config


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return random_model(tiny("Qwen3-30B-A3B"), torch.float32, CPU, seed=3)


@pytest.fixture(scope="module")
def runner(loaded: LoadedModel) -> ModelRunner:
    return ModelRunner(
        model="tiny", dtype="float32", device="cpu", loaded=loaded, max_model_len=512, kv_cache_bytes=8 << 20
    )


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_sizes_that_were_published(name: str) -> None:
    num_parameters = gpu_decode._num_bytes(SHAPES[name]()) / 2 / 1e9
    assert num_parameters == pytest.approx(PUBLISHED[name], rel=0.01)


def test_routers_become_as_uneven_as_asked(runner: ModelRunner, loaded: LoadedModel) -> None:
    uniform = uniform_experts(128, 8)
    assert skew_routers(runner, loaded.routers, 1.0, seed=5)[0] > 0.8, "as even as random choices are"
    reached = skew_routers(runner, loaded.routers, 0.6, seed=5)
    assert reached == pytest.approx([0.6] * 3, abs=0.03)
    # Tokens that popularity was not fitted to
    assert 0.45 < distinct_experts(runner) / uniform < 0.75


def distinct_experts(runner: ModelRunner) -> float:
    steps = FixedSteps(runner, num_requests=1, context=64, seed=11)
    steps.fill()
    counts = [sum(runner.step(steps.plan(8)).counts.experts) / 3 for _ in range(12)]
    return sum(counts) / len(counts)


def test_the_demo_says_how_uneven() -> None:
    demo = ModelRunner(
        model=str(gpu_decode.DEMO), dtype="float32", device="cpu", max_model_len=1024, kv_cache_bytes=16 << 20
    )
    assert 0.4 < demo_share(demo, gpu_decode.DEMO) < 1.0


def test_bytes_of_a_step(runner: ModelRunner) -> None:
    model = runner.model
    dense = sum(p.nbytes for name, p in model.named_parameters() if ".experts." not in name and "embed" not in name)
    dense += sum(b.nbytes for b in model.buffers())
    found = step_bytes(runner, [3.0, 4.0, 5.5], num_requests=2, context=100)
    assert found.dense == dense
    assert found.experts == 12.5 * 3 * 32 * 16 * 4
    assert found.context == 2 * 100 * 3 * 2 * 2 * 8 * 4
    assert found.total == dense + found.experts + found.context


def test_all_sizes_are_measured(runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "_WARM_UPS", 1)
    monkeypatch.setattr(gpu_decode, "_REPEATS", 2)
    model = gpu_decode.Model("tiny", runner, bytes_per_s=1e9)
    gpu_decode.measure_steps(model, (1, 16), (0, 3, 7), context=40, seed=0)
    sizes = [(row["batch"], row["draft_len"], row["budget"] != "none", row["graphs"]) for row in model.rows]
    assert sizes == [
        (1, 0, False, True),
        (1, 0, False, False),
        (1, 3, False, True),
        (1, 7, False, True),
        (1, 7, False, False),
        (1, 7, True, True),
        (1, 7, True, True),
        (16, 0, False, True),
        (16, 3, False, True),
    ]
    by_size = {(row["batch"], row["draft_len"], row["budget"]): row for row in model.rows if row["graphs"]}
    one, eight = by_size[1, 0, "none"], by_size[1, 7, "none"]
    assert one["experts_per_layer"] == 8
    wanted = float(str(eight["experts_per_layer"]))
    assert wanted > 8
    for share in gpu_decode.SHARES:
        number = round(share * wanted)
        assert by_size[1, 7, str(number)]["experts_per_layer"] == number
    assert one["share_of_roofline"] == pytest.approx(float(str(one["gb_per_s"])))
    ratios = gpu_decode.ratios_of(model.rows)
    assert [(ratio["batch"], ratio["draft_len"]) for ratio in ratios] == [(1, 7)] * 3 + [(16, 3)]
    assert ratios[0]["experts_per_layer_over_one_row"] == pytest.approx(wanted / 8)


def test_what_is_required_is_required_of_batch_1() -> None:
    ours = {"model": "m", "who": "penstock", "batch": 1, "draft_len": 0, "budget": "none", "graphs": True}
    rows: list[Any] = [
        {"model": "demo", "distinct_over_uniform": 0.7},
        {**ours, "batch": 8, "step_ms": 9.0, "share_of_roofline": 0.9, "host_share": 0.9},
        {**ours, "step_ms": 2.0, "share_of_roofline": 0.4, "host_share": 0.08},
        {**ours, "graphs": False, "step_ms": 4.0, "share_of_roofline": 0.1},
        {"model": "m", "who": "transformers", "batch": 1, "draft_len": 0, "budget": "none", "step_ms": 5.0},
    ]
    targets = gpu_decode.targets_of(rows)
    assert [(round(target.figure, 3), target.reached) for target in targets] == [
        (0.4, True),
        (2.5, False),
        (0.08, False),
    ]


def test_transformers_decodes_the_same_weights(loaded: LoadedModel, runner: ModelRunner) -> None:
    """Last of those that use the runner: what steps put into its modules is taken out."""
    steps = FixedSteps(runner, num_requests=1, context=24, seed=2, text=[(7 * i) % 128 for i in range(32)])
    steps.fill()
    (emitted,) = runner.step(steps.plan(1)).token_ids
    peer = gpu_decode.Transformers("tiny", runner)
    row = peer.row(1, 16, (1, 3), 1)
    assert "error" not in row, row
    assert math.isfinite(float(str(row["step_ms"])))
    with torch.inference_mode():
        ids = torch.tensor([[(7 * i) % 128 for i in range(25)]])
        assert loaded.model(ids).logits[0, -1].argmax().item() == emitted[0]


@pytest.mark.parametrize("name", ["GPT-OSS-20B", "OLMoE-1B-7B", "Mixtral-8x7B"])
def test_a_model_is_measured_from_its_weights_to_its_targets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"_WARM_UPS": 1, "_REPEATS": 1, "CONTEXT": 24, "KV_BYTES": 8 << 20, "OUTPUTS": (1, 3), "BATCHES": (1, 2)}
    for field, size in sizes.items():
        monkeypatch.setattr(gpu_decode, field, size)
    config = tiny(name)
    monkeypatch.setitem(gpu_decode.SHAPES, name, lambda: config)
    options = Options(quick=False, seed=4, given=argparse.Namespace(layers=None, profile=None))
    rows: list[Any] = []
    gpu_decode.measure_model(name, CPU, 0.9, 1e9, options, rows, torch.float32)
    assert not any("error" in row for row in rows), rows
    assert [row["batch"] for row in rows if row.get("who") == "transformers"] == [1, 8, 32]
    assert [target.name for target in gpu_decode.targets_of(rows)] == [
        f"{name}: share of the roofline at batch 1",
        f"{name}: over transformers at batch 1",
    ]


def test_the_inflated_demo_is_served_by_every_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_decode, "DRAFT_LENS", (0, 3))
    rows = list(gpu_decode.inflated_rows("cpu", 2, 1))
    assert [row["policy"] for row in rows] == ["fixed 0", "fixed 3", "shadow"] * (len(rows) // 3)
    assert all(float(str(row["tokens_per_s"])) > 0 for row in rows)
    assert {row["tokens_per_step"] for row in rows if row["policy"] == "fixed 0"} < {1.0, 64 / 65, 64 / 64}
    assert max(float(str(row["tokens_per_step"])) for row in rows) > 1.2


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_decode.main() == 2
    assert "no CUDA device" in capsys.readouterr().err
