"""The benchmark of whole models, run on a CPU over tiny shapes: the same code, with steps launched one by one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.benchmarks import model_needs
from penstock.benchmarks.fixed_steps import FixedSteps
from penstock.benchmarks.generate_peer import GeneratePeer
from penstock.benchmarks.gpu_decode import add_options, bench_of, growth, targets
from penstock.benchmarks.harness import Options, Row
from penstock.benchmarks.inflated_decode import InflatedDemo
from penstock.benchmarks.model_needs import needs_of
from penstock.benchmarks.model_shapes import SHAPES, ModelShape
from penstock.benchmarks.random_model import DEMO, UNEQUAL, random_model
from penstock.benchmarks.routing_skew import MODEL, choices
from penstock.benchmarks.step_bytes import ByteCounter, windows
from penstock.benchmarks.stopwatch import Stopwatch
from penstock.benchmarks.time_budget import TimeBudget
from penstock.benchmarks.watched_serving import serve
from penstock.benchmarks.whole_model import Bench, WholeModel, figures, kv_token_bytes
from penstock.cluster.config import EngineConfig
from penstock.router.expert_budget import ExpertBudget
from penstock.workers.plan import Bucket
from penstock.workers.runner import ModelRunner

from .tiny_configs import settings_of

CPU = torch.device("cpu")
GB = 2.0
"""GB/s of the roofline."""


def tiny(model_type: str, **options: Any) -> ModelShape:
    return ModelShape("tiny", "none", model_type, 0, {**settings_of(model_type), "eos_token_id": None, **options})


def bench(**options: Any) -> Bench:
    given = {"batches": (1, 3), "draft_lens": (0, 3, 7), "context": 21, "num_tokens": 4, "rounds": 1, "steps": 2}
    return Bench(device=CPU, copy_gb_per_s=GB, skew=UNEQUAL, dtype=torch.float32, **{**given, **options})


def runner_of(shape: ModelShape, **options: Any) -> ModelRunner:
    loaded = random_model(shape.config(), CPU, dtype=torch.float32, skew=DEMO, seed=0)
    settings = {"device": "cpu", "block_size": 4, "max_model_len": 64, "kv_cache_bytes": 1 << 20, **options}
    return ModelRunner(model="none", loaded=loaded, **settings)


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_has_the_parameters_that_were_published(shape: ModelShape) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.num_parameters


def test_a_model_that_does_not_fit_is_left_out_with_a_reason() -> None:
    mixtral = needs_of("Mixtral-8x7B", MODEL)
    assert mixtral.objection(140 << 30) is None
    reason = mixtral.objection(80_000_000_000)
    assert reason is not None
    assert "needs 102 GB" in reason
    assert "80 are free" in reason


def test_what_models_need_is_what_the_committed_table_says() -> None:
    results = Path(model_needs.__file__).parent / "results" / "gpu_decode_needs.json"
    kept = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert list(model_needs.rows(MODEL, 32)) == kept
    assert len(kept) == len(SHAPES) + 1
    for row in kept:
        shape = next((shape for shape in SHAPES if shape.name == row["model"]), None)
        needs = needs_of(row["model"], MODEL)
        assert shape is None or needs.weight_bytes == 2 * shape.num_parameters
        # What the table says is where a model begins to fit
        assert needs.objection(int(1e9 * row["free_gb"] + 1e8)) is None
        assert needs.objection(int(1e9 * row["free_gb"] - 1e8)) is not None


# --- weights ---------------------------------------------------------------------------------------------------------


def test_choices_are_those_of_the_tokens() -> None:
    runner = runner_of(tiny("qwen3_moe"))
    text = list(range(5, 25))
    (one,), (other,) = choices(runner, [text]), choices(runner, [text[:9]])
    assert one.shape == (2, 20, 2)
    assert torch.equal(one[:, :9], other)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_transformers_computes_the_same_model_in_the_same_memory(model_type: str) -> None:
    shape = tiny(model_type)
    runner = runner_of(shape)
    peer = GeneratePeer(shape.config(), runner.model, CPU)  # type: ignore[arg-type]
    theirs = dict(peer._model.named_parameters())
    for name, parameter in runner.model.named_parameters():
        assert theirs[name].data_ptr() == parameter.data_ptr()
        assert parameter.isfinite().all()
        assert parameter.count_nonzero()
    steps = FixedSteps(2, 20, 96, 4, 64)
    prompts = [steps.tokens(number) for number in range(2)]
    found = peer.generate(prompts, 4)
    assert len(found.steps_s) == 3
    assert [len(tokens) for tokens in found.token_ids] == [4, 4]
    config = EngineConfig(model="none", device="cpu", num_threads=1, block_size=4, max_model_len=64, draft_len=0)
    for graphs in (False, True):
        served = serve(config, runner, prompts, 4, graphs=graphs)
        assert served.token_ids == found.token_ids
        assert served.num_tokens == 8
        assert [step.contexts for step, _ in served.steps] == [[20, 20], [21, 21], [22, 22]]
        assert {step.num_rows for step, _ in served.steps} == {2}


# --- plans and bytes -------------------------------------------------------------------------------------------------


def test_prompts_come_in_parts_and_verifications_behind_them() -> None:
    steps = FixedSteps(2, 21, 96, 4, 64, seed=3)
    prompts = list(steps.prompts(16))
    assert [(p.requests[0].request_id, p.requests[0].committed_len, len(p.requests[0].token_ids)) for p in prompts] == [
        (0, 0, 16),
        (0, 16, 5),
        (1, 0, 16),
        (1, 16, 5),
    ]
    assert all(not plan.requests[0].num_sampled_rows for plan in prompts)
    assert prompts[0].requests[0].token_ids + prompts[1].requests[0].token_ids == steps.tokens(0)
    plan = steps.verification(5, 4, ExpertBudget(experts=3), padded=True)
    assert plan.bucket == Bucket(2, 4, 64)
    assert [(r.committed_len, r.num_sampled_rows, r.first_budgeted_row) for r in plan.requests] == [(21, 4, 0)] * 2
    assert [r.parents for r in plan.requests] == [[-1, 0, 1, 2]] * 2
    blocks = [block for request in plan.requests for block in request.new_blocks]
    assert len(set(blocks)) == len(blocks) == 2 * -(-29 // 4)
    other = steps.verification(6, 4, padded=False)
    assert other.bucket is None
    assert other.requests[0].token_ids != plan.requests[0].token_ids
    assert other.requests[0].first_budgeted_row is None
    assert steps.verification(0, 8, padded=True).bucket == Bucket(2, 8, 64)
    assert FixedSteps(16, 21, 96, 4, 64).verification(0, 8, padded=True).bucket is None, "more rows than are padded"


def test_bytes_of_a_step_are_exact() -> None:
    runner = runner_of(tiny("gpt_oss", tie_word_embeddings=False))
    hidden, layers, vocab = 32, 2, 96
    per_expert = 4 * (hidden * 64 + 64 + 32 * hidden + hidden)
    total = sum(tensor.nbytes for tensor in (*runner.model.parameters(), *runner.model.buffers()))
    dense = total - layers * 8 * per_expert - vocab * hidden * 4
    found = ByteCounter(runner).of([3, 5], [20, 6], num_rows=7)
    assert found.dense == dense + 7 * hidden * 4
    assert found.experts == 8 * per_expert
    # two heads of eight numbers, keys and values; one layer sees the last eight tokens
    assert found.kv == 2 * 2 * 8 * 4 * ((8 + 6) + (20 + 6))
    assert found.total == found.dense + found.experts + found.kv
    assert found.roofline_s(2.0) == pytest.approx(found.total / 2e9)
    latent = ByteCounter(runner_of(tiny("deepseek_v2"))).of([2], [20, 6], num_rows=2)
    assert latent.kv == layers * (16 + 8) * 4 * (20 + 6)
    tied = runner_of(tiny("gpt_oss", tie_word_embeddings=True))
    assert ByteCounter(tied).of([3, 5], [20, 6], 7).dense == dense, "the head is read as a whole"


def test_windows_are_the_config_s() -> None:
    assert windows(tiny("mixtral").config()) == [12, 12]
    assert windows(tiny("gpt_oss").config()) == [8, None]
    assert windows(tiny("olmoe").config()) == [None, None]
    by_name = {shape.name: shape.config() for shape in SHAPES}
    assert set(windows(by_name["Qwen3-30B-A3B"])) == set(windows(by_name["Mixtral-8x7B"])) == {None}
    assert windows(by_name["GPT-OSS-20B"]) == [128, None] * 12


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_the_pool_is_large_enough_for_what_layers_keep(model_type: str) -> None:
    shape = tiny(model_type)
    runner = runner_of(shape)
    needed = runner.info.kv_block_bytes // 4
    assert needed <= kv_token_bytes(shape.config(), torch.float32) <= 8 * needed


def test_figures_compare_with_the_roofline() -> None:
    found = figures(0.5, [[3, 5], [4, 6]], 4e8, GB)
    assert found == {
        "step_ms": 500.0,
        "experts": 4.5,
        "gb": 0.4,
        "gb_per_s": pytest.approx(0.8),
        "roofline_ms": pytest.approx(200.0),
        "share_of_roofline": pytest.approx(0.4),
    }


def test_a_stopwatch_tells_the_time_between_marks() -> None:
    watch = Stopwatch(CPU)
    assert watch.intervals_s() == []
    for _ in range(3):
        watch.mark()
    first = watch.intervals_s()
    assert len(first) == 2
    assert min(first) >= 0
    assert watch.intervals_s() == []


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_a_whole_model_is_measured() -> None:
    model = WholeModel(tiny("qwen3_moe"), bench())
    rows = [*model.rows(), *model.peer_rows()]
    decode = [row for row in rows if row["part"] == "decode"]
    assert [(row["engine"], row["batch"]) for row in decode] == [
        (engine, batch) for engine in ("penstock", "transformers") for batch in (1, 3)
    ]
    assert all(row["penstock_over_it"] > 0 for row in decode[2:])
    for row in decode:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"], rel=0.01)
    steps = [row for row in rows if row["part"] == "step"]
    plain = [row for row in steps if row["budget"] == "none"]
    assert [(row["batch"], row["draft_len"], row["graph"]) for row in plain] == [
        (batch, draft_len, graph) for batch in (1, 3) for draft_len in (0, 3, 7) for graph in (True, False)
    ]
    assert [row["rows"] for row in plain[::2]] == [1, 4, 8, 3, 12, 24]
    assert [row["padded_rows"] for row in plain[::2]] == [1, 4, 8, 4, 16, 32]
    distinct = {(row["batch"], row["draft_len"]): row["experts"] for row in plain}
    assert distinct[1, 0] == 2, "top-k"
    assert distinct[1, 0] < distinct[1, 3] <= distinct[1, 7] <= 8
    cut = [row for row in steps if row["budget"] != "none"]
    assert {row["budget"] for row in cut} == {"75%", "50%"}
    for row in cut:
        assert 2 <= row["experts"] <= row["budget_experts"] < 8
        assert row["draft_len"] > 0
    for row in rows:
        if row["engine"] == "penstock":
            assert row["gb_per_s"] == pytest.approx(1e3 * row["gb"] / row["step_ms"])
            assert row["share_of_roofline"] == pytest.approx(row["roofline_ms"] / row["step_ms"])
        if row.get("host_share") is not None:
            assert 0 <= row["host_share"] < 1
    info = model.runner.info
    one = next(row for row in plain if (row["batch"], row["draft_len"]) == (1, 0))
    assert 1e9 * one["gb"] == ByteCounter(model.runner).of([2] * info.model.num_moe_layers, [21], 1).total
    row, table = model.profile()
    assert row["part"] == "profile"
    assert "aten::" in table
    names = {target.name.split(",")[0] for target in targets([*rows, *growth(rows)])}
    assert len(names) == 5


def test_no_batch_begins_when_time_is_over() -> None:
    passed = iter([1.0, 10.0, 11.0, 12.0])
    model = WholeModel(tiny("qwen3_moe"), bench(draft_lens=(0,), budget=TimeBudget(5.0, lambda: next(passed))))
    rows = [*model.rows(), *model.peer_rows()]
    assert {(row["engine"], row["batch"]) for row in rows} == {("penstock", 1)}
    assert model._bench.budget.left_out == [
        "tiny, batch 3",
        "tiny, transformers at batch 1",
        "tiny, transformers at batch 3",
    ]


def test_the_inflated_demo_is_measured() -> None:
    given = bench(batches=(2,), draft_lens=(0, 3))
    rows = list(InflatedDemo(MODEL, given, factor=2, max_tokens=12).rows())
    ours = [row for row in rows if row["engine"] == "penstock"]
    assert [(row["draft_len"], row["graph"], row["budget"]) for row in ours][:4] == [
        (0, True, "none"),
        (0, False, "none"),
        (3, True, "none"),
        (3, False, "none"),
    ]
    plain = ours[0]
    assert plain["rows"] == 2
    assert 4 <= plain["experts"] <= 8
    assert ours[2]["steps"] < plain["steps"], "some drafts of real text are right"
    for row in ours:
        if row["budget"] != "none":
            assert row["budget_experts"] < 32
            assert row["draft_len"] == 3
    assert [row["engine"] for row in rows][-1] == "transformers"
    assert all(row["tokens_per_s"] > 0 for row in rows)


# --- targets and options ---------------------------------------------------------------------------------------------


def row(part: str, model: str = "a", **more: Any) -> Row:
    return {"part": part, "model": model, "stored_as": "bfloat16", "batch": 1, **more}


def step(draft_len: int, step_ms: float, gb: float, budget: str = "none", model: str = "a") -> Row:
    figures_ = {"step_ms": step_ms, "gb": gb, "experts": 10 * gb, "budget": budget}
    return row("step", model, draft_len=draft_len, graph=True, **figures_)


def test_growth_is_of_eight_rows_over_one() -> None:
    steps = [
        step(0, 2.0, 1.0),
        step(3, 3.0, 2.0),
        step(7, 6.0, 2.5),
        step(7, 4.0, 1.5, "50%"),
        step(7, 9.0, 9.0, "75%"),
    ]
    others = [{**step(7, 99.0, 9.0), "graph": False}, {**step(7, 99.0, 9.0), "batch": 2}, step(7, 1.0, 1.0, model="b")]
    plain, halved, worse = growth([*steps, *others])
    assert plain["time_over_one_row"] == 3.0
    assert plain["bytes_over_one_row"] == plain["experts_over_one_row"] == 2.5
    assert plain["saved"] == 0.0
    assert halved["saved"] == 0.5
    assert worse["saved"] == -0.75


def test_targets_take_the_worst_model_and_leave_out_what_was_not_measured() -> None:
    assert targets([]) == []
    decode = [
        row("decode", "a", engine="penstock", step_ms=2.0, share_of_roofline=0.5, tokens_per_s=500.0, host_share=0.02),
        row("decode", "a", engine="transformers", step_ms=8.0, tokens_per_s=125.0, penstock_over_it=4.0),
        row("decode", "b", engine="penstock", step_ms=4.0, share_of_roofline=0.3, tokens_per_s=250.0, host_share=0.1),
        row("decode", "b", engine="transformers", note="out of memory"),
        {**row("decode", "b", engine="penstock", step_ms=4.0, share_of_roofline=0.1, tokens_per_s=1.0), "batch": 2},
    ]
    grown = growth([step(0, 2.0, 1.0), step(7, 6.0, 2.5), step(7, 4.0, 1.5, "50%")])
    found = targets([*decode, *grown])
    assert [target.figure for target in found] == [0.3, 4.0, 0.1, pytest.approx(1.2), 0.5]
    assert [target.reached for target in found] == [False, True, False, True, True]
    assert "3.00 to 3.00" in found[3].name
    assert len(targets(decode[:1])) == 2


def options_of(*arguments: str, quick: bool = False) -> Options:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return Options(quick, 5, parser.parse_args(arguments))


def test_options_say_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    full = bench_of(options_of(), CPU, GB)
    assert (full.batches, full.draft_lens, full.context, full.peer) == ((1, 2, 4, 8, 16, 32), (0, 1, 3, 7), 512, True)
    assert (full.skew, full.seed, full.dtype) == (DEMO, 5, torch.bfloat16)
    some = bench_of(options_of("--batches", "1,8", "--draft-lens", "0,2", "--skew", "unequal", "--no-peer"), CPU, GB)
    assert (some.batches, some.draft_lens, some.skew, some.peer) == ((1, 8), (0, 2), UNEQUAL, False)
    assert bench_of(options_of(quick=True), CPU, GB).batches == (1, 8)
    assert full.budget.allows("all")
    assert not bench_of(options_of("--budget-s", "0"), CPU, GB).budget.allows("all")
    for wrong in (["--batches", "0"], ["--draft-lens", "8"], ["--model", "GPT-5"]):
        with pytest.raises(SystemExit):
            options_of(*wrong)
    assert "is not of numbers in [1, 64]" in capsys.readouterr().err


BARE = """
import sys
BLOCKED = {"ray", "pydantic", "zmq", "msgspec", "fastapi", "openai", "anyio", "aiohttp"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from penstock.benchmarks import gpu_decode
sys.exit(gpu_decode.main())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it runs")
def test_it_needs_no_more_than_a_gpu_machine_has_and_refuses_one_without() -> None:
    done = subprocess.run([sys.executable, "-I", "-c", BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip() == (
        "gpu_decode: there is no CUDA device here, and a CPU's figures would say nothing of one"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_small_model_is_measured_on_a_gpu() -> None:
    given = Bench(
        torch.device("cuda"), 1000.0, DEMO, batches=(1,), draft_lens=(0, 7), context=64, num_tokens=4, rounds=1, steps=2
    )
    shape = tiny("qwen3_moe", hidden_size=256, moe_intermediate_size=128, head_dim=64)
    rows = list(WholeModel(shape, given).rows())
    (decode,) = (row for row in rows if row["part"] == "decode" and row["engine"] == "penstock")
    assert decode["graph"]
    assert 0 < decode["device_ms"] <= 1.5 * decode["step_ms"]
