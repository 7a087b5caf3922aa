from __future__ import annotations

from dataclasses import replace

from penstock.cluster.calibration.gate import ServedBudgets
from penstock.cluster.config import EngineConfig
from penstock.cluster.serving.load_summary import budget_summary, load_summary, rank_summary
from penstock.cluster.serving.resources import rank_order
from penstock.cluster.serving.server import seen_from_here
from penstock.workers.model_info import ModelInfo, RankInfo

from .test_budget_profile import FINE

MODEL = ModelInfo(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    dtype="bfloat16",
    vocab_size=50304,
    hidden_size=2048,
    num_layers=17,
    num_moe_layers=16,
    num_experts=64,
    num_experts_per_tok=8,
    max_model_len=4096,
    eos_token_ids=(2,),
)
RANK = RankInfo(
    rank=0,
    model=MODEL,
    num_local_experts=[32] * 16,
    expert_bytes=6_400_000_000,
    dense_bytes=950_000_000,
    bytes_read=7_350_000_000,
    checkpoint_bytes=13_800_000_000,
    num_kv_blocks=1000,
    kv_block_bytes=2_100_000,
    load_s=12.34,
)


def test_ranks_that_hold_the_same_share_a_line() -> None:
    assert load_summary([RANK, replace(RANK, rank=1, load_s=20.0, bytes_read=1)], 16) == (
        "OlmoeForCausalLM, bfloat16, max_model_len 4096; 64 experts, 8 per token, in 16 of 17 layers\n"
        "ranks 0-1, each: 32 experts a layer, 6.4 GB; all else 950.0 MB; KV 1000 blocks x 16 = 16000 tokens, 2.1 GB; "
        "loaded in 20.0 s"
    )


def test_layers_that_differ_are_a_range() -> None:
    infos = [replace(RANK, num_local_experts=[32, 33] * 8), replace(RANK, rank=1, num_local_experts=[33, 32] * 8)]
    _, both = load_summary(infos, 16).splitlines()
    assert both.startswith("ranks 0-1, each: 32-33 experts a layer, ")


def test_ranks_that_differ_have_lines_of_their_own() -> None:
    infos = [RANK, replace(RANK, rank=1, num_kv_blocks=500), replace(RANK, rank=2, num_kv_blocks=500)]
    _, first, others = load_summary(infos, 16).splitlines()
    assert first.startswith("rank 0: 32 experts")
    assert others.startswith("ranks 1-2, each: ")
    assert "KV 500 blocks x 16 = 8000 tokens" in others


def test_ranks_of_a_machine_are_neighbours_and_machines_go_by_address() -> None:
    nodes = ["10.0.0.10", "10.0.0.9", "10.0.0.10", "10.0.0.9", "10.0.0.9"]
    order = rank_order(nodes)
    assert order == [1, 3, 4, 0, 2]
    assert rank_summary([nodes[i] for i in order]) == "ranks: 0-2 on 10.0.0.9, 3-4 on 10.0.0.10"
    assert rank_summary(["fd00::1"]) == "ranks: 0 on fd00::1"


def test_a_budget_is_called_lossy() -> None:
    config = EngineConfig(model="m", expert_budget="experts=5,scope=request")
    known = budget_summary(ServedBudgets(config, (FINE,)), config.budgets)
    assert known.startswith("lossy: verifications keep to experts=5,scope=request: 25 % fewer experts a verification")
    assert "0.4 points of exact match lost" in known
    assert "not calibrated" in budget_summary(ServedBudgets(config, (None,)), config.budgets)
    several = replace(config, expert_budget=("experts=8", "experts=5,scope=request"))
    lines = budget_summary(ServedBudgets(several, (None, FINE)), several.budgets).splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["lossy", "or to experts=5,scope=request"]
    assert len(budget_summary(ServedBudgets(several, (None, FINE)), several.budgets[1:]).splitlines()) == 1


def test_the_address_shown_is_one_that_can_be_asked() -> None:
    assert seen_from_here("0.0.0.0", "10.0.0.1", True) == ("10.0.0.1", False)
    assert seen_from_here("127.0.0.1", "10.0.0.1", True) == ("127.0.0.1", True)
    assert seen_from_here("127.0.0.1", "10.0.0.1", False) == ("127.0.0.1", False)
    assert seen_from_here("10.0.0.1", "10.0.0.1", True) == ("10.0.0.1", False)
