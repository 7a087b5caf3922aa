"""The experts' benchmark, and the kernels at real models' shapes, for which a GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from .triton_device import DEVICE  # isort: skip
from penstock.benchmarks import gpu_experts as benchmark
from penstock.benchmarks.expert_layers import MODELS, LayerShape, draw, parts_of, stored
from penstock.benchmarks.harness import Row
from penstock.benchmarks.tile_search import PARTS, Layer, candidates, fastest
from penstock.kernels.expert_tiles import LayerTiles, Tiles
from penstock.kernels.grouped_experts import grouped_experts, grouped_experts_reference

CUDA = DEVICE.type == "cuda"
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


def measured(weights: str, rows: int, name: str, us: float | None = None, **more: Any) -> Row:
    row = {"model": "small", "routing": "skewed", "weights": weights, "rows": rows, "implementation": name, **more}
    return row if us is None else {**row, "share_of_copy": 0.8, "difference": 0.001, "us": us}


def test_what_is_stored_is_compared_with_bf16_of_the_same_rows() -> None:
    plain = [
        measured("bf16", 1, "penstock", 20),
        measured("bf16", 8, "penstock", 60),
        measured("bf16", 1, "other", 30),
        measured("bf16", 8, "other", note="out of memory"),
    ]
    kept = [measured("fp8", 1, "penstock", 12), measured("fp8", 8, "penstock", 30)]
    found = {target.name: target.figure for target in benchmark.targets(plain + kept)}
    assert found["time of ours in bf16 over ours as stored, least"] == pytest.approx(20 / 12)
    assert found["time of the fastest other over ours, up to 16 rows, least"] == pytest.approx(1.5)
    assert found["rows that ours failed to compute"] == 0
    assert len(benchmark.targets(plain)) == len(found) - 1
    assert benchmark.targets([]) == [], "nothing was measured yet"
    (failed, *_) = benchmark.targets([*plain, measured("bf16", 2, "penstock", note="out of memory")])
    assert (failed.figure, failed.reached) == (1, False)


def test_shares_of_a_copy_s_rate_are_asked_of_two_models() -> None:
    def share(model: str, rows: int, share: float, weights: str = "bf16") -> Row:
        return {**measured(weights, rows, "penstock", 20), "model": model, "share_of_copy": share}

    found = benchmark.targets(
        [
            share("Qwen3-30B-A3B", 1, 0.61),
            share("Qwen3-30B-A3B", 2, 0.1),
            share("Qwen3-30B-A3B", 4, 0.85),
            share("Mixtral-8x7B", 32, 0.79),
            share("Mixtral-8x7B", 64, 0.1),
            share("Qwen3-30B-A3B", 8, 0.1, "fp8"),
            share("OLMoE-1B-7B", 8, 0.1),
        ]
    )
    shares = {target.name.split(",")[1]: target for target in found if target.name.startswith("share")}
    assert {rows: (target.figure, target.reached) for rows, target in shares.items()} == {
        " 1 to 1 rows of Qwen3-30B-A3B and Mixtral-8x7B": (0.61, True),
        " 4 to 32 rows of Qwen3-30B-A3B and Mixtral-8x7B": (0.79, False),
    }


def test_an_implementation_that_fails_ends_nothing() -> None:
    draws = [draw(LayerShape("small", 16, 16, 8, 2), 4, "uniform", CPU, seed) for seed in range(5)]
    called: list[tuple[int, int]] = []

    def of_layer(number: int) -> benchmark.Implementation:
        def compute(rows: Any) -> torch.Tensor:
            called.append((number, next(step for step, other in enumerate(draws) if other is rows)))
            return rows.hidden

        return compute

    def fails(error: Exception) -> benchmark.Implementation:
        def compute(rows: Any) -> torch.Tensor:
            raise error

        return compute

    def clock(calls: Any) -> tuple[float, bool]:
        called.clear()
        for call in calls:
            call()
        return 2e-6, True

    computed_by = {
        "first": [fails(torch.OutOfMemoryError("2 GiB\nmore"))],
        "second": [fails(ValueError("no such shape\nmore"))],
        "third": [of_layer(0), of_layer(1)],
    }
    layers = benchmark.Layers("bf16", computed_by, lambda rows: 2 * rows.hidden, expert_bytes=1e6)
    first, second, third = benchmark.layer_rows("small", "uniform", layers, draws, 1e3, clock)
    assert (first["note"], second["note"]) == ("out of memory", "ValueError: no such shape")
    assert "us" not in {**first, **second}
    assert called == [(0, 0), (1, 1), (0, 2), (1, 3), (0, 4)], "layers in turns, each step once"
    assert (third["us"], third["layers"], third["difference"]) == (2.0, 2, 0.5)
    assert third["gb_per_s"] == round(sum(rows.num_active for rows in draws) / 5 * 1e6 / 2e-6 / 1e9)

    lost = benchmark.Layers("bf16", {"lost": [fails(torch.AcceleratorError("gone"))]}, layers.expected, 1.0)
    with pytest.raises(torch.AcceleratorError):
        list(benchmark.layer_rows("small", "uniform", lost, draws, 1e3, clock))


@pytest.mark.parametrize(
    "shape", [LayerShape("small", 64, 32, 8, 2, "mxfp4"), LayerShape("small", 128, 128, 8, 2, "fp8")], ids=str
)
@torch.inference_mode()
def test_all_compute_the_same_layer(shape: LayerShape) -> None:
    draws = benchmark.steps_of(shape, 3, "skewed", DEVICE, seed=0)
    kinds = [make(shape, DEVICE, cache_bytes=1) for make in (benchmark.plain_layers, benchmark.stored_layers)]
    rows = [
        row
        for layers in kinds
        for row in benchmark.layer_rows("small", "skewed", layers, draws[:2], 1.0, lambda calls: (1.0, False))
    ]
    assert [(row["weights"], row["implementation"]) for row in rows] == [
        ("bf16", "penstock"),
        ("bf16", "transformers batched_mm"),
        ("bf16", "transformers grouped_mm"),
        ("bf16", "torch grouped_mm"),
        (shape.stored_as, "penstock"),
    ]
    for row in rows:
        assert row["layers"] == 2
        if row["implementation"] == "penstock" or not CUDA:  # a GPU's other kernels may ask for other sizes
            assert row["difference"] < 0.01


def test_a_layer_s_weights_have_left_the_cache_before_it_comes_again() -> None:
    cache = 50 << 20
    for least_step_bytes in (1e6, 38e6, 75e6, 700e6):
        between = (benchmark.num_layers(least_step_bytes, cache) - 1) * least_step_bytes
        assert between >= 4 * cache
        assert between - least_step_bytes < 4 * cache


# --- better cuts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "as_stored"), [(MODELS[0], False), (MODELS[0], True), (MODELS[2], True)], ids=str)
def test_cuts_that_leave_processors_without_work_are_not_tried(shape: LayerShape, as_stored: bool) -> None:
    layer = Layer(shape, as_stored)
    if as_stored:
        up, _ = stored(shape, torch.device("meta"))
        assert layer.key == (shape.hidden_size, shape.inner_size, shape.top_k, up.bytes_per_weight)
    for part, num_outputs in (("up", 2 * shape.inner_size), ("down", shape.hidden_size)):
        tried = list(candidates(layer, part, 132))
        assert 10 < len(tried) < 150
        assert len(set(tried)) == len(tried)
        assert getattr(layer.tiles(), part) not in tried
        for cut in tried:
            assert shape.top_k * -(-num_outputs // cut.outputs) * cut.splits >= 132
            assert layer.scale_inputs is None or cut.inputs <= layer.scale_inputs
        assert {cut.splits for cut in tried} == ({1} if part == "up" else {1, 2, 4})


def test_the_fastest_cut_of_the_second_projection_is_beside_that_of_the_first() -> None:
    layer = Layer(LayerShape("small", 256, 256, 8, 2), as_stored=False)
    present = layer.tiles()
    good, better, bad = Tiles(32, 64), Tiles(64, 64), Tiles(128, 64)
    costs = {(present.up, present.down): 9.0, (good, present.down): 7.0, (bad, present.down): float("inf")}
    costs |= {(good, better): 4.0, (good, bad): 8.0}

    def seconds(tiles: LayerTiles) -> float:
        return costs[tiles.up, tiles.down]

    cuts = dict(zip(PARTS, ([bad, good], [bad, better]), strict=True))
    assert fastest(layer, cuts, seconds) == (LayerTiles(good, better), 4.0)
    answers = iter([False, False, True])
    assert fastest(layer, cuts, seconds, lambda: next(answers)) == (LayerTiles(good, present.down), 7.0)


COMPILES = """
from penstock.benchmarks.expert_layers import LayerShape
from penstock.benchmarks.tile_search import Compiled, Layer
from penstock.kernels.expert_tiles import Tiles

if __name__ == "__main__":
    compiled = Compiled(90, num_processes=1)
    layer = Layer(LayerShape("small", 256, 2048, 8, 2), as_stored=False)
    print(list(compiled.fit(layer, "down", [Tiles(64, 64), Tiles(128, 256, num_stages=6), Tiles(48, 64)])))
    compiled.close()
"""


def test_cuts_that_take_a_processor_for_themselves_or_do_not_compile_are_ruled_out(tmp_path: Any) -> None:
    program = tmp_path / "program.py"
    program.write_text(COMPILES)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([Tiles(64, 64)])


# --- on a GPU --------------------------------------------------------------------------------------------------------

CASES = [(shape, as_stored) for shape in MODELS for as_stored in (False, True) if shape.stored_as or not as_stored]


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize(("shape", "as_stored"), CASES, ids=str)
    @torch.inference_mode()
    def test_real_layers_equal_their_reference(self, shape: LayerShape, as_stored: bool) -> None:
        device = torch.device("cuda")
        parts = parts_of(shape, device, as_stored=as_stored)
        for num_rows in (1, 8, 20, 64, 130):
            rows = draw(shape, num_rows, "skewed", device, seed=num_rows)
            inputs = (rows.hidden, rows.expert_ids, rows.weights)
            result, num_active = grouped_experts(*parts, *inputs)
            expected, _ = grouped_experts_reference(*parts, *inputs)
            assert (result - expected).float().norm() <= 1e-2 * expected.float().norm()
            assert int(num_active) == rows.num_active

    @pytest.mark.parametrize("num_rows", [8, 20, 64])
    @pytest.mark.parametrize(("shape", "as_stored"), CASES, ids=str)
    @torch.inference_mode()
    def test_a_row_s_bits_do_not_depend_on_the_rows_beside_it(
        self, shape: LayerShape, as_stored: bool, num_rows: int
    ) -> None:
        """By 8 rows a program takes as many as by one; by 20 and 64 others, and the compiler may order sums anew."""
        device = torch.device("cuda")
        parts = parts_of(shape, device, as_stored=as_stored)
        rows = draw(shape, num_rows, "skewed", device, seed=num_rows)
        inputs = (rows.hidden, rows.expert_ids, rows.weights)
        result, _ = grouped_experts(*parts, *inputs)
        alone, _ = grouped_experts(*parts, *(part[-1:] for part in inputs))
        assert torch.equal(alone[0], result[-1])

    @torch.inference_mode()
    def test_the_host_waits_for_nothing_and_a_graph_takes_other_rows(self) -> None:
        device, shape = torch.device("cuda"), MODELS[3]
        parts = parts_of(shape, device, as_stored=False)
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
