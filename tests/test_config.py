from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.config import EngineConfig
from penstock.workers.sampling_params import SamplingParams, TokenSampling


def test_defaults_stand() -> None:
    config = EngineConfig(model="m")
    assert config.model_name == config.tokenizer_source == "m"
    assert config.expert_parallel_size == 1
    assert config.threads_per_rank >= 1
    config = EngineConfig(model="m", served_model_name="s", tokenizer="t", num_threads=3)
    assert (config.model_name, config.tokenizer_source, config.threads_per_rank) == ("s", "t", 3)
    with pytest.raises(FrozenInstanceError):
        config.model = "n"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "", "model: expected a directory or a hub id"),
        ("model", 3, "model: expected str, got 3"),
        ("tokenizer", 3, "tokenizer: expected str or null, got 3"),
        ("dtype", "float16", "dtype: 'float16' is not one of auto, bfloat16, float32"),
        ("device", "tpu", "device: 'tpu' is not one of auto, cpu, cuda"),
        ("expert_parallel_size", 0, r"expert_parallel_size: 0 is not in \[1, 1024\]"),
        ("expert_parallel_size", 2.0, "expert_parallel_size: expected int, got 2.0"),
        ("expert_parallel_size", True, "expert_parallel_size: expected int, got True"),
        ("expert_parallel_size", "2", "expert_parallel_size: expected int, got '2'"),
        ("expert_parallel_size", None, "expert_parallel_size: expected int, got None"),
        ("num_threads", 0, r"num_threads: 0 is not in \[1, 1024\]"),
        ("max_model_len", 0, r"max_model_len: 0 is not in \[1, inf\)"),
        ("max_num_seqs", 5000, r"max_num_seqs: 5000 is not in \[1, 4096\]"),
        ("max_num_batched_tokens", 0, "max_num_batched_tokens: 0 is not in"),
        ("max_queued_requests", 0, r"max_queued_requests: 0 is not in \[1, 1.04858e\+06\]"),
        ("request_timeout_s", 0, r"request_timeout_s: 0 is not in \[0.001, 604800\]"),
        ("block_size", -1, "block_size: -1 is not in"),
        ("kv_cache_bytes", 0, "kv_cache_bytes: 0 is not in"),
        ("draft_len", -1, r"draft_len: -1 is not in \[0, 64\]"),
        ("draft_len", 65, r"draft_len: 65 is not in \[0, 64\]"),
        ("prompt_lookup_max", 33, "prompt_lookup_max: 33 is not in"),
        ("prompt_lookup_min", 4, r"prompt_lookup_min: 4 is not in \[1, prompt_lookup_max=3\]"),
        ("step_timeout_s", 0, r"step_timeout_s: 0 is not in \[0.1, 86400\]"),
        ("step_timeout_s", math.nan, "step_timeout_s: nan is not in"),
        ("step_timeout_s", math.inf, "step_timeout_s: inf is not in"),
        ("step_timeout_s", False, "step_timeout_s: expected float, got False"),
        ("load_timeout_s", "1", "load_timeout_s: expected float, got '1'"),
        ("placement_group_strategy", "STRICT_SPREAD", "placement_group_strategy: 'STRICT_SPREAD' is not one of PACK, "),
        ("num_replicas", 0, r"num_replicas: 0 is not in \[1, 1024\]"),
        ("min_replicas", 2, "min_replicas: only beside max_replicas"),
        ("target_ongoing_requests", 2, "target_ongoing_requests: only beside max_replicas"),
        ("drain_timeout_s", -1, r"drain_timeout_s: -1 is not in \[0, 86400\]"),
        ("max_step_retries", -1, r"max_step_retries: -1 is not in \[0, 100\]"),
        ("enable_eplb", True, "enable_eplb: only with expert_parallel_size above 1"),
        ("enable_eplb", 1, "enable_eplb: expected bool, got 1"),
        ("num_redundant_experts", 4, "num_redundant_experts: only beside enable_eplb"),
        ("num_redundant_experts", -1, "num_redundant_experts: -1 is not in"),
        ("eplb_window_size", 0, "eplb_window_size: 0 is not in"),
        ("eplb_step_interval", 0, "eplb_step_interval: 0 is not in"),
        ("eplb_bytes_per_step", 0, "eplb_bytes_per_step: 0 is not in"),
        ("eplb_timeout_s", 0, r"eplb_timeout_s: 0 is not in \[0.1, 86400\]"),
    ],
)
def test_bad_values_are_refused_by_field_and_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        EngineConfig.from_mapping({"model": "m", field: value})


@pytest.mark.parametrize(
    "values",
    [
        {"step_timeout_s": 5},
        {"max_model_len": None},
        {"num_threads": 1024},
        {"draft_len": 0},
        {"draft_len": 64},
        {"prompt_lookup_max": 1},
    ],
)
def test_the_ends_of_ranges_are_inside(values: dict[str, Any]) -> None:
    config = EngineConfig.from_mapping({"model": "m", **values})
    for name, value in values.items():
        assert getattr(config, name) == value
    assert isinstance(config.step_timeout_s, float)


def test_a_placement_file_says_itself_which_experts_have_copies() -> None:
    values = {"model": "m", "expert_parallel_size": 2, "enable_eplb": True, "placement": "p.json"}
    assert EngineConfig.from_mapping(values).enable_eplb
    with pytest.raises(ValueError, match=r"^num_redundant_experts: not beside placement"):
        EngineConfig.from_mapping({**values, "num_redundant_experts": 2})


def test_budgets_are_one_or_several_or_auto() -> None:
    one = EngineConfig(model="m", expert_budget="experts=5")
    assert (one.budget_names, [str(budget) for budget in one.budgets]) == (("experts=5",), ["experts=5"])
    several = EngineConfig.from_mapping({"model": "m", "expert_budget": ["experts=5", "coverage=0.9"]})
    assert [str(budget) for budget in several.budgets] == ["experts=5", "coverage=0.9"]
    fixed = EngineConfig(model="m", expert_budget=("experts=5", "coverage=0.9"), draft_len=3)
    assert [str(budget) for budget in fixed.budgets] == ["experts=5"], "others than shadow choose none"
    assert EngineConfig(model="m", expert_budget="auto").budget_names == ("auto",)
    assert EngineConfig(model="m").budgets == EngineConfig(model="m", expert_budget=()).budgets == ()
    for bad, message in (
        (["auto", "experts=5"], "auto stands for all that were calibrated, so it stands alone"),
        (["experts=5", "experts=5,scope=source"], "experts=5 is given twice"),
        ([5], "expected text such as experts=20, got 5"),
        (5, "expected tuple or str or null, got 5"),
    ):
        with pytest.raises(ValueError, match=f"^expert_budget: {message}"):
            EngineConfig.from_mapping({"model": "m", "expert_budget": bad})


def test_the_number_of_gangs_is_fixed_or_varies() -> None:
    one, three = EngineConfig(model="m"), EngineConfig(model="m", num_replicas=3)
    assert (one.fewest_replicas, one.most_replicas) == (1, 1)
    assert (three.fewest_replicas, three.most_replicas) == (3, 3)
    varying = EngineConfig(model="m", max_replicas=4, max_num_seqs=10, expert_parallel_size=2)
    assert (varying.fewest_replicas, varying.most_replicas, varying.target_requests_per_replica) == (1, 4, 10)
    told = EngineConfig(model="m", min_replicas=2, max_replicas=4, target_ongoing_requests=7)
    assert (told.fewest_replicas, told.most_replicas, told.target_requests_per_replica) == (2, 4, 7)
    with pytest.raises(ValueError, match=r"^min_replicas: 3 is not in \[1, max_replicas=2\]"):
        EngineConfig(model="m", min_replicas=3, max_replicas=2)
    with pytest.raises(ValueError, match=r"^num_replicas: not beside max_replicas"):
        EngineConfig(model="m", num_replicas=2, max_replicas=2)


def test_an_unknown_key_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'max_num_seq' \(did you mean max_num_seqs\?\)") as caught:
        EngineConfig.from_mapping({"model": "m", "max_num_seq": 3})
    for spec in fields(EngineConfig):
        assert spec.name in str(caught.value)
    with pytest.raises(ValueError, match="unknown key 7; valid keys: "):
        EngineConfig.from_mapping({"model": "m", 7: 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"^model: missing"):
        EngineConfig.from_mapping({"draft_len": 1})


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: some/where\ndraft_len: 5\nstep_timeout_s: 9\ntokenizer: null\n")
    config = EngineConfig.from_yaml(path)
    assert (config.model, config.draft_len, config.step_timeout_s, config.tokenizer) == ("some/where", 5, 9.0, None)
    assert EngineConfig.from_yaml(path, draft_len=0, model="m") == EngineConfig(
        model="m", draft_len=0, step_timeout_s=9.0
    )
    assert EngineConfig.from_yaml(str(path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "config: .*is not valid YAML"),
        ("- model", "config: .*holds a list, expected a mapping"),
        ("just words", "config: .*holds a str, expected a mapping"),
        ("", "model: missing"),
        ("model: m\ndraft_len: 3\ndraft_len: 5", "draft_len: .* has it 2 times"),
        ("model: m\ndraft_length: 3", "unknown key 'draft_length'"),
        ("model: m\ndraft_len: three", "draft_len: expected int or null, got 'three'"),
        ("model: m\nexpert_parallel_size: yes", "expert_parallel_size: expected int, got True"),
    ],
)
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)^{message}"):
        EngineConfig.from_yaml(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^config: cannot read .*none\.yaml"):
        EngineConfig.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"^config: "):
        EngineConfig.from_yaml(tmp_path / "binary.yaml")


def test_every_field_has_a_docstring_and_numbers_have_bounds() -> None:
    import ast
    import inspect
    import textwrap

    (body,) = ast.parse(textwrap.dedent(inspect.getsource(EngineConfig))).body
    assert isinstance(body, ast.ClassDef)
    documented = {
        node.target.id
        for node, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert documented == {spec.name for spec in fields(EngineConfig)}
    for spec in fields(EngineConfig):
        if "int" in str(spec.type) or "float" in str(spec.type):
            assert spec.metadata["low"] is not None, spec.name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", math.inf),
        ("seed", -1),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("stop", (3,)),
        ("stop", 3),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1.5,)),
        ("stop_token_ids", 3),
        ("ignore_eos", "no"),
    ],
)
def test_bad_sampling_is_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        SamplingParams(**{field: value})


def test_sampling_params_say_what_a_rank_needs() -> None:
    params = SamplingParams.from_kwargs(temperature=1, top_k=-1, seed=5, choice=2, stop="end", stop_token_ids=[4])
    assert (params.stop, params.stop_token_ids) == (("end",), (4,))
    assert params.token_sampling() == TokenSampling(temperature=1.0, top_k=0, seed=5, choice=2)
    assert SamplingParams(temperature=0).token_sampling() == TokenSampling()
    with pytest.raises(AssertionError):
        SamplingParams(temperature=1.0).token_sampling()
    with pytest.raises(
        ValueError, match=r"^unknown sampling parameter beams, best_of; valid: n, choice, temperature, "
    ):
        SamplingParams.from_kwargs(best_of=3, beams=4)


def test_a_model_may_have_several_names(tmp_path: Path) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text("model: m\nserved_model_name: [a, b]\n")
    config = EngineConfig.from_yaml(path)
    assert (config.model_names, config.model_name) == (("a", "b"), "a")
    assert EngineConfig(model="m", served_model_name="a").model_names == ("a",)
    assert EngineConfig(model="m", served_model_name=()).model_names == ("m",)
    for bad in ("", ["a", ""], ["a", 5], 5):
        with pytest.raises(ValueError, match=r"^served_model_name: expected"):
            EngineConfig.from_mapping({"model": "m", "served_model_name": bad})


@pytest.mark.parametrize("key", ["two words", "caf\u00e9", "line\n", 12345, "", True])
def test_a_key_is_not_shown(key: Any) -> None:
    assert "sesame" not in repr(EngineConfig(model="m", api_key="sesame"))
    with pytest.raises(ValueError, match=r"^api_key: expected") as caught:
        EngineConfig.from_mapping({"model": "m", "api_key": key})
    assert not str(key) or str(key) not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("choice", -1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {3.0: 1.0}),
        ("logit_bias", [3]),
        ("allowed_token_ids", ()),
        ("allowed_token_ids", (-1,)),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("skip_special_tokens", 1),
        ("include_stop_str_in_output", None),
    ],
)
def test_bad_choices_of_tokens_are_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        SamplingParams(**{field: value})


def test_ranks_are_told_of_adjustments_only_if_there_are_any() -> None:
    assert SamplingParams(temperature=0, stop_token_ids=(3,), logprobs=1).token_sampling().adjustments is None
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(3,), logit_bias={"7": 1, 8: -2.5})
    adjustments = params.token_sampling(num_prompt_tokens=10, eos_token_ids=(1, 2)).adjustments
    assert adjustments is not None
    assert (adjustments.late_token_ids, adjustments.late_from) == ((1, 2, 3), 12)
    assert adjustments.logit_bias == ((7, 1.0), (8, -2.5))
    assert not adjustments.has_penalties
    with pytest.raises(ValueError, match=r"^min_tokens: 3 is not in \[0, max_tokens=2\]"):
        SamplingParams(min_tokens=3, max_tokens=2)
    with pytest.raises(ValueError, match=r"^max_tokens: 0 is not an integer in \[1, "):
        SamplingParams(max_tokens=0)
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0


@pytest.mark.parametrize("speculation", ["off", "cascade", "shadow"])
def test_a_draft_length_that_nothing_would_draft_is_refused(speculation: str) -> None:
    with pytest.raises(ValueError, match=f"^draft_len: only beside speculation auto or fixed; under {speculation} "):
        EngineConfig(model="m", speculation=speculation, draft_len=3)
    for one in ("auto", "fixed"):
        assert EngineConfig(model="m", speculation=one, draft_len=3).fixed_draft_len == 3
