"""The file that calibration writes, and the gate in front of every server that reads it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock.cluster.calibration.fingerprint import model_fingerprint
from penstock.cluster.calibration.gate import check_budget_profile, describe
from penstock.cluster.calibration.profile import (
    FILE_NAME,
    BudgetProfile,
    CalibratedBudget,
    Conditions,
    read_profile,
    write_profile,
)
from penstock.cluster.client import llm as llm_module
from penstock.cluster.client import local_client
from penstock.cluster.config import EngineConfig
from penstock.cluster.serving import server
from penstock.cluster.serving.app import build_app

CONDITIONS = Conditions(
    draft_len=7,
    drafter="ngram",
    max_num_seqs=4,
    num_ranks=1,
    placement_sha256=None,
    dtype="float32",
    max_tokens=256,
    data="data.jsonl",
    data_sha256="ab",
    num_records=600,
)
FINE = CalibratedBudget(
    budget="experts=5,scope=request,score=squared",
    conditions=CONDITIONS,
    num_pairs=500,
    reference_exact_match=0.9,
    exact_match=0.896,
    exact_match_loss=0.004,
    exact_match_loss_interval=(-0.004, 0.012),
    num_tokens=9000,
    next_token_agreement=0.97,
    perplexity_ratio=1.01,
    reference_experts_per_layer=6.0,
    experts_per_layer=4.5,
    kept_weight=0.95,
    reference_tokens_per_step=1.8,
    tokens_per_step=1.7,
)
WORSE = replace(FINE, budget="experts=3,scope=request", exact_match=0.8, exact_match_loss=0.1)
UNSURE = replace(FINE, budget="coverage=0.5,scope=request", perplexity_ratio=1.05)
SHARED = replace(FINE, budget="experts=6")
UNTRIED = replace(FINE, budget="experts=7,scope=request", kept_weight=None)
SILENT = replace(FINE, budget="coverage=0.7,scope=request", num_tokens=0)
OWNERS = replace(FINE, budget="experts=6,scope=owner", conditions=replace(CONDITIONS, num_ranks=2))
EVEN = replace(OWNERS, budget="experts=5,scope=request,rank_balance=0.5")


@pytest.fixture
def model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_moe"), directory)
    budgets = [FINE, WORSE, UNSURE, SHARED, UNTRIED, SILENT, OWNERS, EVEN]
    found = BudgetProfile(model="model", fingerprint=model_fingerprint(directory), budgets=budgets)
    write_profile(found, directory / FILE_NAME)
    return directory


def config_of(model: Path, **options: Any) -> EngineConfig:
    return EngineConfig.from_mapping(
        {"model": str(model), "expert_budget": "experts=5,scope=request", "max_num_seqs": 4, **options}
    )


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path: Path) -> None:
    blind = replace(
        FINE,
        num_pairs=0,
        reference_exact_match=None,
        exact_match=None,
        exact_match_loss=None,
        exact_match_loss_interval=None,
        kept_weight=None,
    )
    profile = BudgetProfile(model="m", fingerprint="f", budgets=[WORSE, blind])
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile


def test_a_later_calibration_replaces_what_was_measured_alike() -> None:
    profile = BudgetProfile(model="m", fingerprint="f", budgets=[FINE, WORSE])
    again, other = replace(FINE, num_pairs=9), replace(FINE, conditions=replace(CONDITIONS, draft_len=3))
    assert profile.with_budgets([again, other]).budgets == [again, WORSE, other]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda found: found.update(version=2),
            r"is of version 2, expected 1; write it again with `penstock calibrate`",
        ),
        (lambda found: found.update(extra=1), "extra: Unexpected keyword argument"),
        (lambda found: found["budgets"][0].pop("num_pairs"), r"budgets\.0\.num_pairs: Field required"),
        (lambda found: found["budgets"][0].update(perplexity_ratio="1"), r"budgets\.0\.perplexity_ratio: .*number"),
        (lambda found: found["budgets"][0].update(budget="experts=x"), "expert_budget: 'x' is no value of experts"),
        (lambda found: found["budgets"][0]["conditions"].update(x=1), r"budgets\.0\.conditions\.x: Unexpected"),
    ],
)
def test_a_file_that_is_no_profile_is_refused(
    model: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    file = model / FILE_NAME
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"^budget_profile: .*{message}"):
        check_budget_profile(config_of(model))


@pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
def test_nonsense_is_refused(model: Path, text: str) -> None:
    (model / FILE_NAME).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"^budget_profile: .* is not a profile"):
        check_budget_profile(config_of(model))


def test_the_loss_is_of_tasks_where_the_model_can_do_them_and_of_tokens_else() -> None:
    assert FINE.quality_loss == 0.004
    assert replace(FINE, reference_exact_match=0.39).quality_loss == pytest.approx(0.03)
    assert replace(FINE, num_pairs=99).quality_loss == pytest.approx(0.03), "too few to tell"
    assert replace(FINE, reference_exact_match=None, exact_match_loss=None).quality_loss == pytest.approx(0.03)
    assert "25 % fewer experts" in describe(FINE)
    assert "0.4 points of exact match lost (95 % CI -0.4 to 1.2, 500 pairs)" in describe(FINE)
    assert "3.0 % of 9000 next tokens changed" in describe(replace(FINE, reference_exact_match=0.1))


# --- the gate --------------------------------------------------------------------------------------------------------


def test_a_calibrated_budget_is_served(model: Path, tmp_path: Path) -> None:
    assert check_budget_profile(config_of(model)).entries == (FINE,)
    assert check_budget_profile(config_of(model, expert_budget=" scope=request,experts=5")).entries == (FINE,)
    assert check_budget_profile(config_of(model, max_num_seqs=64)).entries == (FINE,), "each request has its own list"
    (model / FILE_NAME).rename(tmp_path / "elsewhere.json")
    assert check_budget_profile(config_of(model, budget_profile=str(tmp_path / "elsewhere.json"))).entries == (FINE,)


def test_a_requests_even_list_serves_any_number_of_requests(model: Path) -> None:
    config = config_of(model, expert_budget=EVEN.budget, expert_parallel_size=2, max_num_seqs=64)
    assert check_budget_profile(config).entries == (EVEN,)


@pytest.mark.parametrize("budget", [None, "experts=8", "coverage=1", "max_ranks_per_row=1"])
def test_what_can_change_nothing_needs_no_profile(model: Path, budget: str | None) -> None:
    (model / FILE_NAME).unlink()
    assert not any(check_budget_profile(config_of(model, expert_budget=budget)).entries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"expert_budget": "experts=4"},
            (
                r"expert_budget: experts=4 is not in .*, which has: experts=5,scope=request, .*; measure it with "
                r"`penstock calibrate .* --data FILE.jsonl --budget experts=4`"
            ),
        ),
        ({"expert_budget": "experts=1"}, r"expert_budget: experts 1 is not in \[2, 8\]"),
        (
            {"expert_budget": "experts=3,scope=request"},
            (
                r"expert_budget: experts=3,scope=request has 10.0 points of exact match lost .*: more than "
                r"max_quality_loss = 0.01 allows; within it: experts=5,scope=request, experts=6"
            ),
        ),
        (
            {"expert_budget": "coverage=0.5,scope=request"},
            r"expert_budget: .* has perplexity \+5.0 %: more than max_perplexity_increase = 0.02 allows",
        ),
        ({"max_quality_loss": 0.001}, "expert_budget: .* within it: none calibrated"),
        ({"max_draft_len": 8}, "max_draft_len: 8 is more than the 7 tokens that .* --draft-len 8"),
        ({"drafter": "suffix"}, "drafter: suffix is not ngram, which .* was calibrated with.* --drafter suffix"),
        (
            {"expert_budget": "experts=7,scope=request"},
            "expert_budget: no draft was verified when experts=7,scope=request was calibrated",
        ),
        (
            {"expert_budget": "coverage=0.7,scope=request"},
            "expert_budget: no draft was verified when coverage=0.7,scope=request was calibrated",
        ),
        ({"draft_len": 9}, "draft_len: 9 is more than the 7 tokens"),
        (
            {"expert_budget": "experts=6", "max_num_seqs": 5},
            "max_num_seqs: 5 requests may share a list .* for 4; choose scope=request.* --max-num-seqs 5",
        ),
        (
            {"expert_budget": "experts=6,scope=owner", "expert_parallel_size": 2, "placement": __file__},
            "placement: .*test_budget_profile.py is not what experts=6,scope=owner was calibrated with, or measure it",
        ),
        (
            {"expert_budget": EVEN.budget, "expert_parallel_size": 2, "enable_eplb": True},
            "enable_eplb: it moves experts",
        ),
        (
            {"expert_budget": "experts=6,scope=owner", "expert_parallel_size": 2, "enable_eplb": True},
            "enable_eplb: it moves experts, and experts=6,scope=owner was calibrated where they stay",
        ),
        ({"expert_budget": "experts=6,scope=owner,score=selected"}, "expert_budget: .* is not in"),
        ({"expert_budget": "experts=6,scope=owner"}, "expert_parallel_size: 1 is not 2, the number of ranks"),
        ({"expert_budget": EVEN.budget}, "expert_parallel_size: 1 is not 2, the number of ranks"),
    ],
)
def test_others_are_refused_with_what_to_do(model: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_budget_profile(config_of(model, **options))


def test_a_lone_request_has_a_ranks_list_to_itself(model: Path) -> None:
    lone = config_of(model, expert_budget="experts=5", max_num_seqs=1)
    assert check_budget_profile(lone).entries == (FINE,)
    with pytest.raises(ValueError, match=r"^expert_budget: experts=5 is not in"):
        check_budget_profile(replace(lone, max_num_seqs=2))
    served = check_budget_profile(config_of(model, expert_budget="experts=6", speculation="off", max_draft_len=9))
    assert served.entries == (SHARED,)


def test_a_hint_names_only_what_may_be_served(model: Path) -> None:
    for options, within in (
        ({}, "experts=5,scope=request, experts=6"),
        ({"max_num_seqs": 5}, "experts=5,scope=request"),
    ):
        with pytest.raises(ValueError, match=f"allows; within it: {within}$"):
            check_budget_profile(config_of(model, expert_budget="experts=3,scope=request", **options))


LEAST = replace(FINE, budget="experts=7,scope=request,score=selected", exact_match_loss=0.0, experts_per_layer=5.0)
IDLE = replace(FINE, budget="experts=7,scope=request,score=probabilities", experts_per_layer=4.9)
RANKS = replace(
    FINE,
    budget="max_ranks_per_row=1,scope=request",
    experts_per_layer=4.0,
    conditions=replace(CONDITIONS, num_ranks=4),
)


def test_auto_is_every_budget_that_may_be_served_and_is_worth_it(model: Path) -> None:
    budgets = [WORSE, IDLE, FINE, UNTRIED, LEAST, RANKS, replace(FINE, budget="experts=8")]
    profile = BudgetProfile(model="model", fingerprint=model_fingerprint(model), budgets=budgets)
    write_profile(profile, model / FILE_NAME)
    auto = config_of(model, expert_budget="auto")
    served = check_budget_profile(auto)
    assert served.entries == (LEAST, FINE), "none that loses as much as another and saves less"
    assert served.config == replace(auto, expert_budget=(str(LEAST.parsed), str(FINE.parsed)))
    assert [entry.budget for entry in served.known] == [LEAST.parsed, FINE.parsed]
    assert served.known[1].level.experts_kept(8) == pytest.approx(0.75)
    assert check_budget_profile(replace(auto, expert_parallel_size=4)).entries == (LEAST, RANKS, FINE)
    fixed = check_budget_profile(replace(auto, draft_len=3))
    assert (fixed.entries, fixed.config.budgets) == ((LEAST,), (LEAST.parsed,))
    with pytest.raises(ValueError, match=r"^expert_budget: none in .* may be served as configured; .* --draft-len 9"):
        check_budget_profile(replace(auto, draft_len=9))
    (model / FILE_NAME).unlink()
    with pytest.raises(ValueError, match=r"^expert_budget: nothing is known of what any budget costs"):
        check_budget_profile(replace(auto, allow_uncalibrated=True))


def test_of_several_budgets_each_is_checked(model: Path) -> None:
    several = ("experts=6", "experts=5,scope=request")
    served = check_budget_profile(config_of(model, expert_budget=several))
    assert served.entries == (SHARED, FINE)
    with pytest.raises(ValueError, match=r"^expert_budget: experts=3,scope=request has 10.0 points"):
        check_budget_profile(config_of(model, expert_budget=[*several, "experts=3,scope=request"]))


def test_a_profile_is_of_one_model(model: Path) -> None:
    (model / FILE_NAME).rename(model / "kept.json")
    with pytest.raises(ValueError, match=r"^expert_budget: .* there is no .*expert_budgets.json; write it with `penst"):
        check_budget_profile(config_of(model))
    (model / "kept.json").rename(model / FILE_NAME)
    weights = next(model.glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ValueError, match=r"^budget_profile: .* is of another model \(model\) or of other weights"):
        check_budget_profile(config_of(model))


def test_what_is_not_known_may_be_served_when_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    (model / FILE_NAME).unlink()
    with caplog.at_level(logging.WARNING):
        assert not any(check_budget_profile(config_of(model, allow_uncalibrated=True)).entries)
    assert "serving experts=5,scope=request all the same (allow_uncalibrated): expert_budget: nothing" in caplog.text
    with pytest.raises(ValueError, match=r"^expert_budget: experts 1 is not in"):
        check_budget_profile(config_of(model, expert_budget="experts=1", allow_uncalibrated=True))


@pytest.mark.parametrize("way", ["LLM", "LocalClient", "build_app", "run_server"])
def test_every_way_to_start_asks_before_anything_starts(
    model: Path, monkeypatch: pytest.MonkeyPatch, way: str, tokenizer: Any
) -> None:
    def start(*_: Any) -> Any:
        raise AssertionError("ranks were started")

    for place in (llm_module, local_client):
        monkeypatch.setattr(place, "make_ranks", start)
    monkeypatch.setattr(server, "LocalRay", start)
    options = {"expert_budget": "experts=4", "tokenizer": tokenizer.source}
    config = config_of(model, **options)
    ways: dict[str, Callable[[], Any]] = {
        "LLM": lambda: penstock.LLM(str(model), **options),
        "LocalClient": lambda: local_client.LocalClient(config),
        "build_app": lambda: build_app(config),
        "run_server": lambda: server.run_server(config, host="127.0.0.1", port=0),
    }
    with pytest.raises(ValueError, match=r"^expert_budget: experts=4 is not in"):
        ways[way]()
