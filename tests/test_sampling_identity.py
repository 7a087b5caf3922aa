"""Penalties, bias and minimum lengths do not let the draft show, and log-probabilities are the model's own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import RequestOutput
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.kernels.philox import gumbel
from penstock.workers.plan import Logprobs
from penstock.workers.sampling_params import SamplingParams

from .tiny_configs import EOS, VOCAB
from .tiny_engine import DRAFT_LENS, FailingRanks, config_of, controller_of, faulty_ranks

MODELS = ("qwen3_moe", "mixtral", "deepseek_v3", "granitemoe")
MAX_TOKENS = 30
STOPS = (7, 11)
BIAS = {5: 3.0, 7: 6.0, 30: -100.0, EOS: 4.0}
SEEDED = {"temperature": 1.2, "top_p": 0.9, "seed": 99}
ADJUSTED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.8, "frequency_penalty": 0.6},
    {"frequency_penalty": -1.5},
    {"logit_bias": BIAS, "min_tokens": 12, "stop_token_ids": STOPS},
    {"allowed_token_ids": (5, 6, 7, 8, 9, EOS), "min_tokens": 4},
    {"repetition_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": BIAS, "min_tokens": 9, "stop_token_ids": STOPS},
]


def config_for(directory: Path, num_ranks: int = 1) -> EngineConfig:
    # Few rows a step, so that prompts come in chunks beside decoding requests
    return config_of(directory, num_ranks, max_num_batched_tokens=24, max_num_seqs=8, block_size=4)


def transformers_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=MODELS)
def served(request, checkpoint: Callable[[str], Path]) -> tuple[LocalRanks, EngineConfig, Any]:
    directory = checkpoint(request.param)
    settings = config_for(directory)
    return LocalRanks(make_runner(settings, 0)), settings, transformers_model(directory)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    made = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (3, 9, 40)]
    return [*made, made[1] * 4]


def run(ranks: Any, config: EngineConfig, draft_len: Any, samplings: list[SamplingParams]) -> list[RequestOutput]:
    """Serve ``prompts()`` together and return each one's whole output as one."""
    engine = Engine(config, ranks, controller=controller_of(draft_len))
    for i, (prompt, sampling) in enumerate(zip(prompts(), samplings, strict=True)):
        engine.add_request(str(i), prompt, sampling)
    outputs: dict[str, list[RequestOutput]] = {str(i): [] for i in range(len(samplings))}
    while engine.has_requests:
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.scheduler.check_integrity()
    return [whole(parts) for parts in outputs.values()]


def whole(parts: list[RequestOutput]) -> RequestOutput:
    logprobs = Logprobs([], [], [])
    for part in parts:
        if part.logprobs is not None:
            assert len(part.logprobs) == len(part.token_ids)
            logprobs.extend(part.logprobs)
    assert all(part.prompt_logprobs is None for part in parts[1:])
    return RequestOutput(
        parts[0].request_id,
        0,
        [token for part in parts for token in part.token_ids],
        parts[-1].finish_reason,
        parts[-1].stop_token_id,
        logprobs=logprobs,
        prompt_logprobs=parts[0].prompt_logprobs,
    )


def expected_tokens(model: Any, prompt: list[int], sampling: SamplingParams) -> list[int]:
    """Decode one token at a time from whole forward passes, every rule spelled out."""
    tokens = list(prompt)
    ends = {EOS, *sampling.stop_token_ids}
    while len(tokens) - len(prompt) < (sampling.max_tokens or 0):
        with torch.inference_mode():
            values = model(torch.tensor([tokens])).logits[0, -1].tolist()
        output = Counter(tokens[len(prompt) :])
        for v in range(VOCAB):
            if sampling.allowed_token_ids is not None and v not in sampling.allowed_token_ids:
                values[v] = -math.inf
            if v in ends and output.total() < sampling.min_tokens:
                values[v] = -math.inf
            values[v] += sampling.logit_bias.get(v, 0.0)
            if v in tokens:
                values[v] *= sampling.repetition_penalty if values[v] < 0 else 1 / sampling.repetition_penalty
            values[v] -= sampling.frequency_penalty * output[v] + sampling.presence_penalty * (output[v] > 0)
        row = torch.tensor(values)
        if sampling.temperature:
            row = row / sampling.temperature
            ordered, ids = torch.sort(row, descending=True, stable=True)
            mass = ordered.softmax(-1)
            row[ids[mass.cumsum(-1) - mass >= sampling.top_p]] = -math.inf
            row = row + gumbel(sampling.seed or 0, sampling.choice, len(tokens), torch.arange(VOCAB))
        tokens.append(int(row.argmax()))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("decoding", [{"temperature": 0}, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("adjusted", range(len(ADJUSTED)))
def test_adjusted_tokens_do_not_depend_on_the_draft(served, adjusted, decoding):
    ranks, config, model = served
    given = {**ADJUSTED[adjusted], **decoding, "max_tokens": MAX_TOKENS}
    samplings = [SamplingParams(choice=i, **given) for i in range(len(prompts()))]
    plain = [SamplingParams(max_tokens=MAX_TOKENS, **decoding)] * len(samplings)
    wanted = [expected_tokens(model, prompt, s) for prompt, s in zip(prompts(), samplings, strict=True)]
    for draft_len in (0, "changing"):
        assert [output.token_ids for output in run(ranks, config, draft_len, samplings)] == wanted
    assert [output.token_ids for output in run(ranks, config, 0, plain)] != wanted, "the adjustments must matter"


def test_texts_survive_lost_steps_and_mix_with_plain_requests(served):
    ranks, config, model = served
    given = {**ADJUSTED[-1], **SEEDED, "max_tokens": MAX_TOKENS}
    samplings = [
        SamplingParams(**given),
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=2, prompt_logprobs=1),
        SamplingParams(**given),
        SamplingParams(max_tokens=MAX_TOKENS, **SEEDED),
    ]
    wanted = [expected_tokens(model, prompt, s) for prompt, s in zip(prompts(), samplings, strict=True)]
    failing = FailingRanks(ranks, lambda call: call % 3 == 0)
    outputs = run(failing, config, 3, samplings)
    assert failing.calls > 6
    assert [output.token_ids for output in outputs] == wanted
    check_logprobs(model, prompts()[1], samplings[1], outputs[1])


def check_logprobs(model: Any, prompt: list[int], sampling: SamplingParams, output: RequestOutput) -> None:
    """Compare with ``log_softmax`` of one forward pass over everything."""
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + output.token_ids])).logits[0].log_softmax(-1)
    for start, tokens, logprobs, num_top in [
        (0, prompt[1:], output.prompt_logprobs, sampling.prompt_logprobs),
        (len(prompt) - 1, output.token_ids, output.logprobs, sampling.logprobs),
    ]:
        if num_top is None:
            continue
        assert logprobs is not None
        assert [ids[0] for ids in logprobs.token_ids] == tokens
        for i, token in enumerate(tokens):
            row = expected[start + i]
            assert logprobs.values[i] == pytest.approx(row[logprobs.token_ids[i]].tolist(), abs=1e-4)
            top = row.topk(num_top).values.tolist() if num_top else []
            assert logprobs.values[i][1:] == pytest.approx(top, abs=1e-4)
            assert (row > row[token] + 1e-4).sum() < logprobs.ranks[i] <= (row > row[token] - 1e-4).sum() + 1


@pytest.mark.parametrize("decoding", [{"temperature": 0}, {**SEEDED, "repetition_penalty": 1.4}], ids=["greedy", "adj"])
@pytest.mark.parametrize("draft_len", DRAFT_LENS)
def test_logprobs_are_those_of_transformers(served, draft_len, decoding):
    ranks, config, model = served
    # 0 reports the token alone; 40 prompt tokens are more than one chunk
    counts = [(0, 0), (20, 3), (5, 5), (None, 2)]
    samplings = [
        SamplingParams(max_tokens=MAX_TOKENS, logprobs=k, prompt_logprobs=p, ignore_eos=True, **decoding)
        for k, p in counts
    ]
    outputs = run(ranks, config, draft_len, samplings)
    for prompt, sampling, output in zip(prompts(), samplings, outputs, strict=True):
        assert len(output.token_ids) == MAX_TOKENS
        check_logprobs(model, prompt, sampling, output)


def test_a_prompt_may_be_scored_without_generating(served):
    ranks, config, model = served
    samplings = [SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2)] * len(prompts())
    for prompt, output in zip(prompts(), run(ranks, config, 3, samplings), strict=True):
        assert (output.token_ids, output.finish_reason) == ([], "length")
        check_logprobs(model, prompt, samplings[0], output)


def test_a_prompt_of_one_token_has_no_logprobs_and_one_may_fill_the_context(served):
    ranks, config, _ = served
    engine = Engine(config, ranks)
    scoring = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    engine.add_request("one", [5], scoring)
    engine.add_request("full", [5] * 160, scoring)
    sizes = {}
    while engine.has_requests:
        sizes.update({o.request_id: len(o.prompt_logprobs) for o in engine.step() if o.prompt_logprobs is not None})
    assert sizes == {"one": 0, "full": 159}
    with pytest.raises(ValueError, match="prompt: 160 tokens leave no room"):
        engine.add_request("more", [5] * 160, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))


def test_choices_differ_and_each_is_always_the_same(served):
    ranks, config, model = served
    sampling = SamplingParams(temperature=1.0, seed=4, n=4, max_tokens=MAX_TOKENS)
    choices = sampling.choices()
    assert [c.choice for c in choices] == [0, 1, 2, 3]
    together = [output.token_ids for output in run(ranks, config, 3, choices)]
    wanted = [expected_tokens(model, prompt, c) for prompt, c in zip(prompts(), choices, strict=True)]
    assert together == wanted
    first = [expected_tokens(model, prompts()[0], c) for c in choices]
    assert len({tuple(tokens) for tokens in first}) == 4


@pytest.mark.parametrize("penalty", [0.5, 1.3, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(served, penalty):
    ranks, config, model = served
    outputs = run(
        ranks,
        config,
        3,
        [SamplingParams(temperature=0, max_tokens=MAX_TOKENS, repetition_penalty=penalty)] * len(prompts()),
    )
    for prompt, output in zip(prompts(), outputs, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
                repetition_penalty=penalty,
            )
        assert output.token_ids == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 2}, "n: 2 is not 1"),
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias: {VOCAB} is not in \\[0, {VOCAB - 1}\\]"),
        ({"allowed_token_ids": (VOCAB,)}, "allowed_token_ids: "),
        ({"stop_token_ids": (VOCAB,)}, "stop_token_ids: "),
        ({"allowed_token_ids": (EOS, 9), "stop_token_ids": (9,), "min_tokens": 1}, "allowed_token_ids: expected one"),
        ({"stop_token_ids": tuple(range(VOCAB)), "min_tokens": 1}, "stop_token_ids: expected fewer"),
    ],
)
def test_what_the_model_cannot_do_is_refused(served, given, message):
    ranks, config, _ = served
    with pytest.raises(ValueError, match=f"^{message}"):
        Engine(config, ranks).add_request("a", [5], SamplingParams(temperature=0, max_tokens=4, **given))


@pytest.mark.distributed
def test_ranks_in_other_processes_are_told_all_of_it(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("qwen3_moe")
    model, config = transformers_model(directory), config_for(directory, 2)
    samplings = [
        SamplingParams(**given, **SEEDED, max_tokens=MAX_TOKENS, logprobs=2, prompt_logprobs=1)
        for given in ADJUSTED[2:]
    ]
    wanted = [expected_tokens(model, prompt, s) for prompt, s in zip(prompts(), samplings, strict=True)]
    with faulty_ranks(config) as ranks:
        outputs = run(ranks, config, 3, samplings)
    assert [output.token_ids for output in outputs] == wanted
    for prompt, sampling, output in zip(prompts(), samplings, outputs, strict=True):
        check_logprobs(model, prompt, sampling, output)
