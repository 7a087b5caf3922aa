"""The experts' benchmark, and the kernels at real models' shapes, for which a GPU is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

from penstock.benchmarks import gpu_experts as benchmark
from penstock.benchmarks.expert_layers import MODELS, LayerShape, draw, gate_of, module_of, stored
from penstock.kernels.expert_weights import ExpertWeights
from penstock.kernels.grouped_experts import Gate, grouped_experts, grouped_experts_reference

CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


@pytest.mark.skipif(CUDA, reason="there it runs")
def test_the_benchmark_refuses_a_machine_without_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock.benchmarks.gpu_experts"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "gpu_experts: there is no CUDA device here, and a CPU's figures would say nothing of one"
    )


def test_skewed_rows_share_experts() -> None:
    shape = LayerShape("small", 16, 16, 64, 8)
    active = {}
    for routing in ("uniform", "skewed"):
        draws = [draw(shape, 16, routing, CPU, seed) for seed in range(20)]
        active[routing] = sum(rows.num_active for rows in draws) / len(draws)
        for rows in draws:
            assert rows.num_active == len(set(rows.expert_ids.flatten().tolist()))
            assert all(len(set(ids)) == 8 for ids in rows.expert_ids.tolist())
            torch.testing.assert_close(rows.weights.sum(dim=1), torch.ones(16))
    assert active["skewed"] < 0.85 * active["uniform"]


@pytest.mark.parametrize(
    ("name", "stored_as", "bits"), [("Qwen3-30B-A3B", "fp8", 8 + 32 / 128**2), ("GPT-OSS-20B", "mxfp4", 4 + 8 / 32)]
)
def test_bytes_are_those_that_the_checkpoint_stores(name: str, stored_as: str, bits: float) -> None:
    (shape,) = [shape for shape in MODELS if shape.name == name]
    assert shape.stored_as == stored_as
    up, down = stored(shape, torch.device("meta"))
    biases = 2 * (2 * shape.inner_size + shape.hidden_size) if shape.is_oss else 0
    numbers = 3 * shape.inner_size * shape.hidden_size
    assert up.bytes_per_expert + down.bytes_per_expert == numbers * bits / 8 + biases
    # Its cuts are looked up by the same size
    assert up.bytes_per_weight == down.bytes_per_weight == (1 if stored_as == "fp8" else 0.5)


def test_what_is_stored_is_compared_with_bf16_of_the_same_rows() -> None:
    def row(weights: str, rows: int, name: str, us: float) -> benchmark.Row:
        shared = {"model": "small", "routing": "skewed", "share_of_copy": 0.8, "difference": 0.001}
        return {**shared, "weights": weights, "rows": rows, "implementation": name, "us": us}

    plain = [row("bf16", 1, "penstock", 20), row("bf16", 8, "penstock", 60), row("bf16", 1, "other", 30)]
    kept = [row("fp8", 1, "penstock", 12), row("fp8", 8, "penstock", 30)]
    found = {target.name: target.figure for target in benchmark._targets(plain + kept)}
    assert found["time of ours in bf16 over ours as stored, least"] == pytest.approx(20 / 12)
    assert found["time of the fastest other over ours, least"] == pytest.approx(1.5)
    assert len(benchmark._targets(plain)) == len(found) - 1


def layer(shape: LayerShape, device: torch.device, *, as_stored: bool) -> tuple[ExpertWeights, ExpertWeights, Gate]:
    from penstock.workers.gpu_experts import fused

    if as_stored:
        return *stored(shape, device), gate_of(shape)
    return fused(module_of(shape, device)).args


CASES = [(shape, as_stored) for shape in MODELS for as_stored in (False, True) if shape.stored_as or not as_stored]


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("shape", "as_stored"), CASES, ids=str)
    @torch.inference_mode()
    def test_real_layers_equal_their_reference(self, shape: LayerShape, as_stored: bool) -> None:
        device = torch.device("cuda")
        parts = layer(shape, device, as_stored=as_stored)
        for num_rows in (1, 8, 20, 64, 130):
            rows = draw(shape, num_rows, "skewed", device, seed=num_rows)
            inputs = (rows.hidden, rows.expert_ids, rows.weights)
            result, num_active = grouped_experts(*parts, *inputs)
            expected, _ = grouped_experts_reference(*parts, *inputs)
            assert (result - expected).float().norm() <= 1e-2 * expected.float().norm()
            assert int(num_active) == rows.num_active
            alone, _ = grouped_experts(*parts, *(part[-1:] for part in inputs))
            assert torch.equal(alone[0], result[-1])

    @torch.inference_mode()
    def test_the_host_waits_for_nothing_and_a_graph_takes_other_rows(self) -> None:
        device, shape = torch.device("cuda"), MODELS[1]
        parts = layer(shape, device, as_stored=False)
        first, second = (draw(shape, 8, "skewed", device, seed) for seed in range(2))
        inputs = [part.clone() for part in (first.hidden, first.expert_ids, first.weights)]
        grouped_experts(*parts, *inputs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            grouped_experts(*parts, *inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, num_active = grouped_experts(*parts, *inputs)
        for place, part in zip(inputs, (second.hidden, second.expert_ids, second.weights), strict=True):
            place.copy_(part)
        graph.replay()
        expected, num_expected = grouped_experts(*parts, second.hidden, second.expert_ids, second.weights)
        assert torch.equal(output, expected)
        assert int(num_active) == int(num_expected) == second.num_active
