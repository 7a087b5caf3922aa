"""Placement files: what is written, what is refused, what a model and its ranks make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.cluster.client.llm import LLM
from penstock.cluster.client.trace_run import trace_routing
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import Replacement
from penstock.cluster.placement_commands import place, trace
from penstock.cluster.placement_file import PlacementFile, placement_of
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.router.balanced import balanced
from penstock.router.placement import Placement, contiguous
from penstock.router.rank_visits import expert_loads, rows_sent
from penstock.router.routing_trace import RoutingTrace
from penstock.workers.plan import StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .random_placement import random_ids, random_placement
from .tiny_engine import config_of

DEMO = Path(__file__).parents[1] / "demo" / "model"


@pytest.mark.parametrize("method", ["contiguous", "affine", "balanced"])
def test_what_is_written_is_read(tmp_path: Path, method: str) -> None:
    placement = random_placement(method, 3, 10, 4)
    path = tmp_path / "p.json"
    PlacementFile.of(placement, method, "olmoe").write(path)
    file = PlacementFile.read(path)
    assert (file.method, file.model_type) == (method, "olmoe")
    assert file.placement() == placement
    # A line for each layer, so that a person can read it
    assert [line for line in path.read_text().splitlines() if line.startswith("    [[")] == [
        f"    {json.dumps(layer)}{',' * (number < 2)}" for number, layer in enumerate(file.layers)
    ]


GOOD: dict[str, Any] = {
    "version": 1, "method": "mine", "model_type": "qwen3_moe", "num_experts": 8, "num_ranks": 2,
    "layers": [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 2, 4, 6], [1, 3, 5, 7, 0]]],
}  # fmt: skip


def layers(*first: list[int]) -> dict[str, Any]:
    return {"layers": [list(first), GOOD["layers"][1]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: Input should be 1"),
        ({"num_ranks": "2"}, "num_ranks: Input should be a valid integer"),
        ({"num_experts": 0}, "num_experts: Input should be greater than or equal to 1"),
        ({"layers": []}, "layers: List should have at least 1 item"),
        ({"layers": [[[0, "1"]]]}, "layers.0.0.1: Input should be a valid integer"),
        ({"comment": "mine"}, "comment: Extra inputs are not permitted"),
        ({"method": None}, "method: Input should be a valid string"),
        ({"num_ranks": 4}, "is for 4 ranks, but expert_parallel_size is 2; set that to 4, or .*--num-ranks 2"),
        ({"num_experts": 16}, "is for 16 experts, this model has 8; make one for this model"),
        ({"layers": GOOD["layers"][:1]}, "is for 1 MoE layers, this model has 2; make one for this model"),
        ({"model_type": "olmoe"}, "is for model type olmoe, this model is of type qwen3_moe; make one for this model"),
        (layers([0, 1, 2, 3], [4, 5, 6]), "layer 0 gives expert 7 to no rank; every expert must be held; mend it, or"),
        (layers([0, 1, 2], [3, 4], [5, 6, 7]), "layer 0 names rank 2, which does not exist: ranks are 0 to 1; mend"),
        (layers([0, 1, 2, 3, 4, 5, 6, 7]), "layer 0 says nothing of rank 1"),
        (layers([0, 1, 2, 3, 4, 5, 6, 7], []), "layer 0 gives rank 1 no expert; every rank must hold one"),
        (layers([0, 1, 2, 3], [4, 5, 6, 7, 8]), r"layer 0 gives rank 1 expert 8, which is not in \[0, 7\]"),
        (layers([0, 1, 2, 3], [4, 5, 6, 7, -1]), r"layer 0 gives rank 1 expert -1, which is not in \[0, 7\]"),
        (layers([0, 1, 2, 3, 3], [4, 5, 6, 7]), "layer 0 gives rank 0 expert 3 twice"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_starts(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**GOOD, **change}))
    config = config_of(checkpoint("qwen3_moe"), 2, placement=str(path))
    with pytest.raises(ValueError, match=rf"^placement: .*p\.json:? .*{message}"):
        placement_of(config)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a rank was started"))
    with pytest.raises(ValueError, match=r"^placement: "):
        ProcessRanks(config)


def test_a_file_that_fits_is_taken(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(GOOD))
    placement = placement_of(config_of(checkpoint("qwen3_moe"), 2, placement=str(path)))
    assert placement is not None
    assert placement.holders[1] == ((0, 1), (1,), (0,), (1,), (0,), (1,), (0,), (1,))
    assert placement_of(config_of(checkpoint("qwen3_moe"), 2)) is None


def test_what_may_move_begins_in_equal_runs_or_with_copies() -> None:
    config = EngineConfig(model=str(DEMO), expert_parallel_size=4)
    assert placement_of(config) is None
    moving = replace(config, enable_eplb=True)
    assert placement_of(moving) == contiguous(4, 32, 4)
    placement = placement_of(replace(moving, num_redundant_experts=4))
    assert placement is not None
    assert {len(placement.experts_of(layer, rank)) for layer in range(4) for rank in range(4)} == {9}
    with pytest.raises(ValueError, match=r"^num_redundant_experts: 97 is not in \[0, 96\]"):
        placement_of(replace(moving, num_redundant_experts=97))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "layers: []"])
def test_what_is_no_placement_file_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=r"^placement: .*p\.json: "):
        placement_of(config_of(checkpoint("qwen3_moe"), 2, placement=str(tmp_path / "p.json")))
    with pytest.raises(ValueError, match=r"^placement: cannot read .*none: .*`penstock place` writes such a file"):
        placement_of(config_of(checkpoint("qwen3_moe"), 2, placement=str(tmp_path / "none")))


def test_every_way_in_refuses_a_placement_for_others(tmp_path: Path) -> None:
    from penstock.cluster.client.local_client import LocalClient
    from penstock.cluster.serving.app import build_app
    from penstock.cluster.serving.server import run_server

    path = tmp_path / "p.json"
    PlacementFile.of(contiguous(4, 32, 2), "contiguous", "qwen3_moe").write(path)
    config = EngineConfig(model=str(DEMO), device="cpu", placement=str(path))
    ways: list[Callable[[], Any]] = [
        lambda: LLM(str(DEMO), device="cpu", placement=str(path)),
        lambda: LocalClient(config),
        lambda: build_app(config),
        lambda: run_server(config, host="127.0.0.1", port=0),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"^placement: .* is for 2 ranks, but expert_parallel_size is 1"):
            way()


def test_one_rank_may_have_a_placement(tmp_path: Path) -> None:
    PlacementFile.of(contiguous(4, 32, 1), "contiguous", "qwen3_moe").write(tmp_path / "p.json")
    with LLM(str(DEMO), device="cpu", num_threads=1, max_model_len=64, placement=str(tmp_path / "p.json")) as llm:
        assert len(llm.generate("import os\n", temperature=0, max_tokens=4)[0].token_ids) == 4


class WatchedRanks:
    """Real ranks, with what was asked of them and what they answered."""

    def __init__(self, ranks: ProcessRanks) -> None:
        self._ranks, self.infos = ranks, ranks.infos
        self.steps: list[tuple[StepPlan, StepResult]] = []

    def step(self, plan: StepPlan) -> StepResult:
        result = self._ranks.step(plan)
        self.steps.append((plan, result))
        return result

    def recover(self, generation: int) -> Sequence[Replacement]:
        raise AssertionError("no step fails here")

    def close(self) -> None:
        self._ranks.close()


def placement_from(trace: RoutingTrace, num_ranks: int) -> Placement:
    return balanced(expert_loads(trace.ids, trace.num_experts), num_ranks, num_redundant_experts=5)


@pytest.mark.distributed
def test_ranks_count_what_the_trace_foretells(tmp_path: Path) -> None:
    """Each step's rows sent and distinct experts, from a trace of one rank. Started ranks need the file no more."""
    texts = ["import os\nimport sys\n", "def main(self, text):\n", "class Reader:\n", "for line in lines:\n    "]
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    one = config_of(DEMO, dtype="float32")
    recorded = trace_routing(one, texts, sampling)
    placement = placement_from(recorded, 2)
    assert len({tuple(layer) for layer in placement.holders}) == 4
    path = tmp_path / "p.json"
    PlacementFile.of(placement, "balanced", recorded.model_type).write(path)
    config = replace(one, expert_parallel_size=2, placement=str(path), speculation="off", max_num_batched_tokens=32)
    ranks = WatchedRanks(ProcessRanks(config))
    path.unlink()
    try:
        assert [info.num_local_experts for info in ranks.infos] == [
            [len(placement.experts_of(layer, rank)) for layer in range(4)] for rank in range(2)
        ]
        engine = Engine(config, ranks)
        tokenizer = _tokenizer()
        for number, text in enumerate(texts):
            engine.add_request(str(number), tokenizer.encode(text), sampling)
        while engine.has_requests:
            engine.step()
    finally:
        ranks.close()
    num_rows = 0
    for plan, result in ranks.steps:
        rows = [_planned_rows(recorded, plan, rank) for rank in range(2)]
        num_rows += sum(map(len, rows))
        for layer in range(4):
            reached: list[set[int]] = [set(), set()]
            for rank in range(2):
                table = placement.owner_table(layer, rank).tolist()
                for expert in rows[rank][:, layer].ravel().tolist():
                    reached[table[expert]].add(expert)
            for rank in range(2):
                counts = result.ranks[rank].counts
                assert counts.rows_sent[layer] == rows_sent(placement, rows[rank], rank)[:, layer].sum()
                assert counts.experts[layer] == len(reached[rank])
                assert counts.payload_bytes[layer] == counts.rows_sent[layer] * 2 * 128 * 4
    assert num_rows == len(recorded.ids)


def _planned_rows(recorded: RoutingTrace, plan: StepPlan, rank: int) -> np.ndarray:
    """What the rows of one rank's plan chose [N, L, K]."""
    parts = [recorded.ids[:0]]
    for request in plan.ranks[rank].requests:
        stop = request.committed_len + len(request.token_ids)
        is_mine = (recorded.requests == request.request_id) & (recorded.positions >= request.committed_len)
        parts.append(recorded.ids[is_mine & (recorded.positions < stop)])
    return np.concatenate(parts)


def _tokenizer() -> Any:
    from penstock.cluster.api.chat_tokenizer import ChatTokenizer

    return ChatTokenizer(str(DEMO))


def demo_trace(path: Path, num_requests: int = 10, seed: int = 4, **changes: Any) -> RoutingTrace:
    """A made-up trace of the demo model's shape."""
    ids = random_ids(40 * num_requests, 4, 4, 32, seed)
    numbers = np.arange(len(ids), dtype=np.int32)
    made = RoutingTrace(
        model_type="qwen3_moe",
        num_experts=32,
        ids=ids,
        weights=np.full(ids.shape, 0.25, dtype=np.float16),
        requests=numbers // 40,
        positions=numbers % 40,
        is_prompt=numbers % 40 < 20,
    )
    made = replace(made, **changes)
    made.write(path)
    return made


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("contiguous", {}),
        ("balanced", {}),
        ("balanced", {"num_redundant_experts": 8}),
        ("affine", {}),
        ("affine", {"max_load_imbalance": 2}),
    ],
)
def test_place_writes_what_an_engine_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: Any, options: dict[str, Any]
) -> None:
    demo_trace(tmp_path / "t")
    place(str(DEMO), trace=tmp_path / "t", num_ranks=4, method=method, output=tmp_path / "p.json", **options)
    config = EngineConfig(model=str(DEMO), expert_parallel_size=4, placement=str(tmp_path / "p.json"))
    placement = placement_of(config)
    assert placement is not None
    assert sum(len(ranks) for ranks in placement.holders[0]) == 32 + options.get("num_redundant_experts", 0)
    shown = capsys.readouterr().out
    names = [line.split()[0] for line in shown.splitlines() if line.startswith(("contiguous", "balanced", "affine"))]
    assert names == list(dict.fromkeys(["contiguous", method]))
    assert "80 rows of requests that the placement was not made from" in shown


def test_few_requests_are_measured_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo_trace(tmp_path / "t", num_requests=4)
    place(str(DEMO), trace=tmp_path / "t", num_ranks=2, method="affine", output=tmp_path / "p.json")
    assert "160 rows of the requests it was made from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 0}, r"num_ranks: 0 is not in \[1, 32\], the model's experts"),
        ({"num_ranks": 33}, r"num_ranks: 33 is not in \[1, 32\]"),
        ({"num_redundant_experts": 1}, "num_redundant_experts: only with balanced, not with affine"),
        ({"method": "balanced", "num_redundant_experts": 97}, r"num_redundant_experts: 97 is not in \[0, 96\]"),
        ({"method": "balanced", "max_load_imbalance": 1.1}, "max_load_imbalance: only with affine, not with balanced"),
        ({"max_load_imbalance": 0.5}, r"max_load_imbalance: 0.5 is not in \[1, inf\)"),
        ({"output": Path("/nowhere/p.json")}, "output: cannot write /nowhere/p.json"),
        ({"trace": Path("/nowhere/t")}, "trace: cannot read /nowhere/t"),
    ],
)
def test_place_refuses_by_field(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    demo_trace(tmp_path / "t")
    given = {
        "trace": tmp_path / "t", "num_ranks": 4, "method": "affine", "output": tmp_path / "p.json", **options,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{message}"):
        place(str(DEMO), **given)
    assert not (tmp_path / "p.json").exists()


def test_a_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    demo_trace(tmp_path / "t", num_experts=64)
    options: Any = {"num_ranks": 2, "method": "affine", "output": tmp_path / "p.json"}
    with pytest.raises(ValueError, match=r"^trace: .* is for 64 experts, this model has 32"):
        place(str(DEMO), trace=tmp_path / "t", **options)
    demo_trace(tmp_path / "t", model_type="olmoe")
    with pytest.raises(ValueError, match=r"^trace: .* is for model type olmoe, this model is of type qwen3_moe"):
        place(str(DEMO), trace=tmp_path / "t", **options)


def test_trace_records_a_file_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from penstock.cluster.flags import TraceEngineFlags

    lines = (DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    flags = TraceEngineFlags(device="cpu", num_threads=1, max_model_len=512)
    trace(str(DEMO), data=tmp_path / "p.jsonl", output=tmp_path / "t", max_tokens=6, engine=flags)
    found = RoutingTrace.read(tmp_path / "t")
    assert set(found.requests.tolist()) == set(range(6))
    assert 0 < (~found.is_prompt).sum() <= 6 * 5  # the last token of an output is not computed
    assert f"{len(found.ids)} rows of 6 requests" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match=r"^output: no directory "):
        trace(str(DEMO), data=tmp_path / "p.jsonl", output=tmp_path / "none" / "t", engine=flags)
