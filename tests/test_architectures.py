"""Every architecture that is called supported gives transformers' own tokens, whole and in shards."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.cluster.speculation.proposal import Proposal
from penstock.router.placement import contiguous
from penstock.workers.architectures import SUPPORTED, check_supported
from penstock.workers.attention import ATTENTION, paged_attention
from penstock.workers.experts import ExpertShard
from penstock.workers.kv_cache import PagedKVCache
from penstock.workers.loader import build, inspect, load
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import generate

MAX_TOKENS = 24


class Oracle:
    """Drafts the right tokens, but for every third, so that acceptance stops at every place of a draft."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts, self.known = texts, []

    def extend(self, token_ids):
        self.known += token_ids

    def propose(self, max_draft_len):
        start = len(self.known)
        text = next(text for text in self.texts if text[:start] == self.known)
        return Proposal(
            [t if i % 3 else (t + 1) % 96 for i, t in enumerate(text[start : start + max_draft_len], start)]
        )


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_tokens_are_those_of_transformers(model_type, checkpoint, reference, monkeypatch):
    directory = checkpoint(model_type)
    config = EngineConfig(
        model=str(directory), max_model_len=128, kv_cache_bytes=8 << 20, max_num_batched_tokens=24, max_num_seqs=8
    )
    ranks = LocalRanks(make_runner(config, 0))
    numbers = random.Random(1)
    prompts = [[numbers.randrange(3, 96) for _ in range(n)] * (1 + n % 2) for n in (1, 6, 20, 33)]
    wanted = [reference(directory, prompt, MAX_TOKENS, ignore_eos=True) for prompt in prompts]
    texts = [prompt + output for prompt, output in zip(prompts, wanted, strict=True)]
    monkeypatch.setattr("penstock.cluster.engine.engine.drafter_factory", lambda name: lambda *_: Oracle(texts))
    for draft_len in (0, 5):
        engine = Engine(EngineConfig(model="x", draft_len=draft_len, max_num_batched_tokens=24, max_num_seqs=8), ranks)
        assert (
            generate(engine, prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)) == wanted
        )
        assert engine.stats().num_failed_steps == 0
        assert (engine.stats().spec_decode_num_accepted_tokens > 20) == (draft_len > 0)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_two_shards_add_up_to_the_whole(model_type, checkpoint):
    directory, config = inspect(str(checkpoint(model_type)))
    num_experts = 8

    def experts_of(num_ranks: int, rank: int) -> torch.nn.Module:
        empty = build(config, torch.float32)
        placement = contiguous(len(empty.expert_modules), num_experts, num_ranks)
        loaded = load(directory, empty, torch.device("cpu"), placement, rank)
        assert loaded.bytes_read < loaded.checkpoint_bytes or num_ranks == 1
        return loaded.expert_modules[-1]

    torch.manual_seed(3)
    hidden, weights = torch.randn(11, 32), torch.rand(11, 2)
    ids = torch.stack([torch.randperm(num_experts)[:2] for _ in range(11)])
    whole, active = ExpertShard(experts_of(1, 0)).run(hidden, ids, weights)
    assert active == len(ids.unique())
    shards = []
    for rank in range(2):
        mine = (ids // 4) == rank
        local = torch.where(mine, ids % 4, 4)
        shards.append(ExpertShard(experts_of(2, rank)).run(hidden, local, weights)[0])
    torch.testing.assert_close(shards[0] + shards[1], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("jamba", "recurrent state"),
        ("lfm2_moe", "recurrent state"),
        ("minimax", "recurrent state"),
        ("qwen3_next", "recurrent state"),
        ("deepseek_v32", "indexer"),
        ("glm_moe_dsa", "indexer"),
        ("llama4_text", "experts interface"),
        ("jetmoe", "experts interface"),
    ],
)
def test_what_is_refused_does_not_run_indeed(model_type, reason, tiny_model, tmp_path, monkeypatch):
    tiny_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^model: architecture '{model_type}' is not supported: .*{reason}.*; supported: afmoe, "
    ):
        make_runner(EngineConfig(model=str(tmp_path)), 0)
    # Past that check, loading or the probing forward finds out too
    monkeypatch.setattr("penstock.workers.loader.check_supported", lambda model_type: None)
    found = "experts interface" if reason == "experts interface" else "(does not run over a paged cache|0 routers)"
    with pytest.raises(ValueError, match=f"^model: .*{found}"):
        make_runner(EngineConfig(model=str(tmp_path)), 0)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("llama", "no Mixture-of-Experts layer"),
        ("qwen3_vl_moe", "no causal language model of that type"),
        ("no_such_type", "no causal language model of that type"),
    ],
)
def test_others_are_refused_with_the_reason_and_the_valid_names(model_type, reason):
    with pytest.raises(ValueError, match=rf"^model: architecture '{model_type}' .*{reason}; supported: afmoe, "):
        check_supported(model_type)


def test_a_type_that_nobody_compared_is_served_with_a_warning(monkeypatch, caplog):
    check_supported("olmoe")
    assert not caplog.records
    monkeypatch.setattr("penstock.workers.architectures.SUPPORTED", ())
    check_supported("olmoe")
    assert [record.getMessage() for record in caplog.records] == [
        "model: the output of architecture 'olmoe' was never compared with transformers' own"
    ]


def test_a_router_that_does_not_select_by_top_k_has_no_seam(checkpoint):
    unsteerable = make_runner(EngineConfig(model=str(checkpoint("phimoe"))), 0)
    assert not unsteerable.info.model.steerable
    assert unsteerable.routers == []
    runner = make_runner(EngineConfig(model=str(checkpoint("olmoe"))), 0)
    assert runner.info.model.steerable
    assert len(runner.routers) == 2


def test_a_router_without_top_k_is_refused_where_steering_is_expected(checkpoint, monkeypatch):
    monkeypatch.setattr("penstock.workers.runner.UNSTEERABLE", {})
    with pytest.raises(ValueError, match=r"^model: its router calls topk over 8 experts 0 times"):
        make_runner(EngineConfig(model=str(checkpoint("phimoe"))), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_topk": [2, 1]}, "its layers differ in the number of experts per token"),
        ({"moe_topk": 0}, "names no number of experts per token"),
        ({"num_experts": 0}, "names no number of experts"),
    ],
)
def test_numbers_of_experts_that_cannot_be_served_are_refused(changes, message, checkpoint, tmp_path):
    shutil.copytree(checkpoint("hunyuan_v1_moe"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        make_runner(EngineConfig(model=str(tmp_path)), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 30.0}, "its attention uses softcap"),
        ({"position_bias": torch.zeros(1)}, "its attention uses position_bias"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "a mask of its own"),
    ],
)
def test_attention_refuses_what_it_does_not_know(arguments, message):
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        paged_attention(torch.nn.Module(), states, states, states, **{"attention_mask": None, **arguments})


def test_windows_come_from_where_masks_are_made():
    from transformers import MixtralConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = MixtralConfig(sliding_window=12)
    config._attn_implementation = ATTENTION
    given = {
        "config": config,
        "inputs_embeds": torch.zeros(1, 5, 8),
        "attention_mask": None,
        "past_key_values": PagedKVCache(4),
    }
    assert create_causal_mask(**given) is None
    assert create_sliding_window_causal_mask(**given) == 12
    with pytest.raises(ValueError, match=r"^model: its attention mask is more than causal"):
        create_causal_mask(**given, and_mask_function=lambda batch, head, query, key: key > 2)
