from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import ABORT, LENGTH, STOP
from penstock.kernels.philox import gumbel
from penstock.workers.sampler import filter_logits
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import GREEDY, PROMPTS, Published, drain, generate


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draft_len": 0},
        {"draft_len": 7, "max_num_batched_tokens": 9, "max_num_seqs": 8},
        {"speculation": "off"},
        {"speculation": "cascade"},
        {"speculation": "shadow", "drafter": "suffix", "max_num_batched_tokens": 9, "max_num_seqs": 8},
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    make_engine: Callable[..., Engine],
    checkpoint: Callable[[str], Path],
    reference: Callable[..., list[int]],
    options: dict[str, Any],
) -> None:
    expected = [reference(checkpoint("qwen3_moe"), prompt, 20, ignore_eos=True) for prompt in PROMPTS]
    engine = make_engine(**options)
    assert generate(engine, PROMPTS, GREEDY) == expected
    assert generate(engine, PROMPTS, GREEDY) == expected, "what it has learned changes nothing"


def test_an_abort_frees_blocks_and_leaves_the_others_alone(make_engine: Callable[..., Engine]) -> None:
    alone = [generate(make_engine(), [prompt], GREEDY)[0] for prompt in PROMPTS[:3]]
    engine, tokens = make_engine(max_num_seqs=3), Published()
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, GREEDY)
    for _ in range(3):
        tokens.take(engine.step())
    used = engine.stats().num_kv_blocks_used
    held = len(engine.scheduler.running[0][1].blocks)
    stats = engine.abort("1")
    assert stats is not None
    assert stats.num_output_tokens == len(tokens["1"]) > 0
    assert engine.stats().num_kv_blocks_used == used - held < used
    engine.scheduler.check_integrity()
    assert engine.abort("4") is not None, "a waiting one"
    assert engine.abort("1") is None
    assert engine.abort("nobody") is None
    seen = list(tokens["1"])
    drain(engine, tokens)
    assert [tokens["0"], tokens["2"]] == [alone[0], alone[2]]
    assert tokens["1"] == seen == alone[1][: len(seen)]
    assert "4" not in tokens
    assert engine.stats().num_requests_finished == {ABORT: 2, LENGTH: 3}


def test_a_requests_own_counts_add_up(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(draft_len=4)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, replace(GREEDY, max_tokens=30))
    tokens = drain(engine)
    every = [tokens.ended[str(index)].stats for index in range(len(PROMPTS))]
    for prompt, stats in zip(PROMPTS, every, strict=True):
        assert stats is not None
        assert (stats.num_prompt_tokens, stats.num_output_tokens) == (len(prompt), 30)
        # Each step that yields tokens yields one of its own, unless the limit cut it off
        assert stats.num_steps + stats.num_accepted_tokens in (30, 31)
        assert 0 <= stats.queue_s <= stats.ttft_s <= stats.total_s
    total = engine.stats()
    assert sum(s.num_draft_tokens for s in every if s) == total.spec_decode_num_draft_tokens
    assert sum(s.num_accepted_tokens for s in every if s) == total.spec_decode_num_accepted_tokens


@pytest.mark.parametrize("draft_len", [0, 6])
def test_the_first_of_eos_stop_token_and_limit_ends_a_request(
    make_engine: Callable[..., Engine], draft_len: int
) -> None:
    free = generate(make_engine(draft_len=draft_len), [PROMPTS[0]], GREEDY)[0]
    model = make_engine().model
    assert model.eos_token_ids == (2,)

    def run(sampling: SamplingParams, eos: int = 2) -> tuple[list[int], str | None, int | None]:
        engine = make_engine(draft_len=draft_len)
        engine.model = replace(model, eos_token_ids=(eos,))
        engine.add_request("a", PROMPTS[0], sampling)
        tokens = drain(engine)
        return tokens["a"], tokens.ended["a"].finish_reason, tokens.ended["a"].stop_token_id

    for at in (0, 7):
        token = free[at]
        first = free.index(token)
        cut = (free[: first + 1], STOP, token)
        assert run(replace(GREEDY, stop_token_ids=(95, token))) == cut
        assert run(replace(GREEDY, ignore_eos=False), eos=token) == cut
        assert run(GREEDY, eos=token) == (free, LENGTH, None)
        assert run(replace(GREEDY, max_tokens=first + 1), eos=token) == (free[: first + 1], LENGTH, None)
        # A stop token in the last place is a stop
        assert run(replace(GREEDY, max_tokens=first + 1, stop_token_ids=(token,))) == cut
    for max_tokens in (1, 6):
        assert run(replace(GREEDY, max_tokens=max_tokens)) == (free[:max_tokens], LENGTH, None)


def test_without_max_tokens_a_request_runs_to_max_model_len(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(draft_len=5)
    (tokens,) = generate(engine, [PROMPTS[1]], replace(GREEDY, max_tokens=None))
    assert len(PROMPTS[1]) + len(tokens) == engine.model.max_model_len


def test_seeded_sampling_depends_on_seed_and_text_alone(make_engine: Callable[..., Engine]) -> None:
    sampling = SamplingParams(temperature=0.9, top_k=20, top_p=0.95, seed=11, max_tokens=12, ignore_eos=True)
    alone = [generate(make_engine(draft_len=0), [prompt], sampling)[0] for prompt in PROMPTS]
    for draft_len, chunk in [(0, 5), (3, 512), (3, 11), (7, 512), (7, 5)]:
        engine = make_engine(draft_len=draft_len, max_num_batched_tokens=chunk, max_num_seqs=5)
        assert generate(engine, PROMPTS, sampling) == alone, (draft_len, chunk)
    assert generate(make_engine(), PROMPTS, replace(sampling, seed=12)) != alone
    greedy = generate(make_engine(), PROMPTS, GREEDY)
    assert alone != [tokens[:12] for tokens in greedy]


def test_sampled_tokens_are_the_argmax_with_the_noise_of_their_position(
    make_engine: Callable[..., Engine], checkpoint: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    sampling = SamplingParams(temperature=0.8, top_k=30, seed=2**40 + 5, max_tokens=12, ignore_eos=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), dtype=torch.float32).eval()
    for prompt, tokens in zip(PROMPTS, generate(make_engine(), PROMPTS, sampling), strict=True):
        text = torch.tensor([prompt + tokens])
        with torch.inference_mode():
            logits = model(text).logits[0]
        for position in range(len(prompt), text.shape[1]):
            noise = gumbel(2**40 + 5, 0, position, torch.arange(96))
            scores = filter_logits(logits[position - 1 : position], [sampling.token_sampling()])[0] + noise
            assert int(scores.argmax()) == int(text[0, position])


def test_a_seed_is_drawn_and_repeats_the_output(make_engine: Callable[..., Engine]) -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    engine = make_engine()
    drawn = [engine.add_request(str(i), PROMPTS[0], sampling) for i in range(2)]
    tokens = drain(engine)
    assert drawn[0].seed != drawn[1].seed
    assert tokens["0"] != tokens["1"]
    assert generate(make_engine(draft_len=0), [PROMPTS[0]], drawn[0]) == [tokens["0"]]


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], GREEDY, "prompt: it has no tokens"),
        ([96], GREEDY, r"prompt: token ids must be integers in \[0, 95\]"),
        ([-1], GREEDY, "prompt: token ids"),
        ([True], GREEDY, "prompt: token ids"),
        ([1.0], GREEDY, "prompt: token ids"),
        ([1] * 96, GREEDY, "prompt: 96 tokens leave no room for output; max_model_len is 96"),
        ([1] * 80, GREEDY, r"max_tokens: 20 is not in \[1, 16\]"),
        ([1], replace(GREEDY, stop_token_ids=(96,)), r"stop_token_ids: 96 is not in \[0, 95\]"),
        ([1], replace(GREEDY, stop_token_ids=(96,), max_tokens=None), r"stop_token_ids: 96 is not in \[0, 95\]"),
    ],
    ids=["empty", "high", "negative", "bool", "float", "long", "max_tokens", "stop", "stop without limit"],
)
def test_a_request_that_cannot_be_served_is_refused_by_field(
    make_engine: Callable[..., Engine], prompt: list[Any], sampling: SamplingParams, message: str
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=f"^{message}"):
        engine.add_request("a", prompt, sampling)
    assert not engine.has_requests
    assert not engine.scheduler.waiting


def test_a_request_id_is_used_once_at_a_time(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.add_request("a", PROMPTS[0], GREEDY)
    with pytest.raises(ValueError, match=r"^request_id: 'a' is in use"):
        engine.add_request("a", PROMPTS[1], GREEDY)
    first = drain(engine)["a"]
    engine.add_request("a", PROMPTS[0], GREEDY)
    assert drain(engine)["a"] == first


def test_an_unknown_drafter_is_refused_at_the_start(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ValueError, match=r"^drafter: 'oracle'"):
        make_engine(drafter="oracle")


@pytest.mark.parametrize("num_known", [1, 7, 19])
def test_a_request_that_another_engine_had_begun_goes_on_with_the_same_tokens(
    make_engine: Callable[..., Engine], num_known: int
) -> None:
    sampling = replace(GREEDY, temperature=1.0, seed=8, frequency_penalty=0.5, logprobs=1, min_tokens=3)
    whole = generate(make_engine(), PROMPTS[:2], sampling)
    engine, published = make_engine(), Published()
    for index, prompt in enumerate(PROMPTS[:2]):
        engine.add_request(str(index), prompt, sampling, output_token_ids=whole[index][:num_known])
        published[str(index)] = whole[index][:num_known]
    drain(engine, published)
    assert [published["0"], published["1"]] == whole
    stats = published.ended["0"].stats
    assert stats is not None
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (len(PROMPTS[0]), len(whole[0]))
    assert engine.stats().num_generation_tokens == sum(map(len, whole)) - 2 * num_known
    assert engine.counters.num_resumed == 2
