"""The engine as a Python object, on the demo model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import penstock
from penstock.cluster.engine.backend import EngineDeadError

DEMO = str(Path(__file__).parents[1] / "demo" / "model")
CHAT = [{"role": "user", "content": "851 - 72"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[penstock.LLM]:
    with penstock.LLM(DEMO, dtype="float32", max_model_len=512, num_threads=1, draft_len=3) as made:
        yield made


def test_strings_and_token_ids_are_the_same_prompt(llm, reference):
    text = "import os\nimport sys\n"
    token_ids = llm.tokenizer.encode(text)
    outputs = [
        *llm.generate([text, token_ids], temperature=0, max_tokens=16),
        *llm.generate(text, temperature=0, max_tokens=16),
    ]
    outputs += llm.generate(token_ids, temperature=0, max_tokens=16)
    assert len(outputs) == 4
    for output in outputs:
        assert output.prompt_token_ids == token_ids
        assert output.token_ids == reference(Path(DEMO), token_ids, 16)
        assert output.text == llm.tokenizer.decode(output.token_ids)
        assert output.finish_reason == "length"
        assert output.stats.num_output_tokens == 16


def test_results_come_in_the_order_of_the_prompts(llm):
    prompts = ["x = 1\n" * 30, "def f", "class A:\n"]
    together = llm.generate(prompts, temperature=0, max_tokens=12)
    assert [output.text for output in together] == [
        llm.generate(p, temperature=0, max_tokens=12)[0].text for p in prompts
    ]


def test_a_chat_ends_with_eos_which_is_no_text(llm):
    answer = llm.chat(CHAT, temperature=0, max_tokens=200)
    assert answer.finish_reason == "stop"
    assert answer.token_ids[-1] in llm._engine.model.eos_token_ids
    assert answer.text.splitlines()[-1].startswith("Answer: ")
    longer = llm.chat(CHAT, temperature=0, max_tokens=200, ignore_eos=True)
    assert longer.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert longer.finish_reason == "length"


def test_a_stop_string_cuts_the_text_and_frees_the_blocks(llm):
    whole = llm.chat(CHAT, temperature=0, max_tokens=200)
    cut = llm.chat(CHAT, temperature=0, max_tokens=200, stop="Answer")
    assert cut.text == whole.text.partition("Answer")[0]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert cut.stats.num_output_tokens == len(cut.token_ids) < len(whole.token_ids)
    assert llm.stats().num_kv_blocks_used == 0


def test_the_seed_that_was_drawn_repeats_the_output(llm):
    first = llm.generate("The ", temperature=1.0, max_tokens=20)[0]
    assert first.seed is not None
    assert llm.generate("The ", temperature=1.0, max_tokens=20, seed=first.seed)[0].token_ids == first.token_ids
    others = {tuple(llm.generate("The ", temperature=1.0, max_tokens=20, seed=s)[0].token_ids) for s in range(4)}
    assert len(others) > 1


def test_nothing_runs_if_one_prompt_is_bad(llm):
    steps = llm.stats().num_steps
    for prompts in ({"import ": 1}, {"import "}, np.array([5, 6]), 5, None):
        with pytest.raises(ValueError, match=r"^prompts: expected a string, a list of token ids or a list of these"):
            llm.generate(prompts, max_tokens=1)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: expected a string or a list of token ids"):
        llm.generate(["import ", np.array([5, 6])], max_tokens=1)
    with pytest.raises(ValueError, match=r"^prompts\[1\]: expected a string or a list of token ids"):
        llm.generate(["import ", 5], max_tokens=1)
    with pytest.raises(ValueError, match=r"^prompt: 600 tokens leave no room"):
        llm.generate([[5], [5] * 600], max_tokens=4)
    with pytest.raises(ValueError, match=r"^unknown sampling parameter max_new_tokens; valid: n, choice, temperature"):
        llm.generate("x", max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^temperature: 3 is not a number in"):
        llm.generate("x", temperature=3)
    assert llm.stats().num_steps == steps


def test_an_unknown_option_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown key 'draft_lenn' \(did you mean draft_len\?\); valid keys: model, "):
        penstock.LLM(DEMO, draft_lenn=3)
    with pytest.raises(ValueError, match=r"^drafter: 'oracle' is not one of ngram"):
        penstock.LLM(DEMO, drafter="oracle")


@pytest.mark.distributed
def test_two_ranks_give_the_same_tokens_as_one(llm):
    alone = llm.generate(["import ", "def main("], temperature=0, max_tokens=16)
    with penstock.LLM(DEMO, dtype="float32", max_model_len=512, num_threads=1, expert_parallel_size=2) as two:
        together = two.generate(["import ", "def main("], temperature=0, max_tokens=16)
        assert two.stats().payload_bytes > 0
        # so Ctrl-C on a terminal, which goes to a whole group, does not end them
        assert all(os.getpgid(process.pid) == process.pid for process in two._engine.ranks.processes)
    with pytest.raises(EngineDeadError, match="closed"):
        two.generate("import ", max_tokens=1)
    assert all(process.poll() is not None for process in two._engine.ranks.processes), "none was started again"
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_bfloat16_holds_half_the_bytes_and_still_does_sums(llm, num_ranks):
    with penstock.LLM(
        DEMO, dtype="bfloat16", max_model_len=512, num_threads=1, expert_parallel_size=num_ranks
    ) as rounded:
        answer = rounded.chat(CHAT, temperature=0, max_tokens=80)
        infos = rounded._engine.ranks.infos
    assert answer.text.splitlines()[-1] == "Answer: 779"
    assert sum(info.expert_bytes for info in infos) * 2 == llm._engine.ranks.infos[0].expert_bytes


def test_outputs_of_each_prompt_come_in_turn(llm):
    asked = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
    outputs = llm.generate(["def f", "import "], n=3, **asked)
    assert [output.choice for output in outputs] == [0, 1, 2, 0, 1, 2]
    assert len({output.text for output in outputs}) == 6
    assert llm.generate("import ", **asked)[0].token_ids == outputs[3].token_ids
    assert llm.generate("import ", choice=2, **asked)[0].token_ids == outputs[5].token_ids
    unseeded = llm.generate(["def f"] * 2, n=2, temperature=1.0, max_tokens=12)
    assert unseeded[0].seed == unseeded[1].seed != unseeded[2].seed == unseeded[3].seed


def test_logprobs_are_of_the_tokens(llm):
    output = llm.generate("import os\n", temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=0)[0]
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    assert "".join(entry.token for entry in output.logprobs) == output.text
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in output.logprobs), (
        "greedy takes the likeliest"
    )
    assert [entry.token_id for entry in output.prompt_logprobs] == output.prompt_token_ids
    assert output.prompt_logprobs[0].logprob is None
    scored = llm.generate("import os\n", temperature=0, max_tokens=0, prompt_logprobs=0)[0]
    assert (scored.text, scored.token_ids, scored.finish_reason) == ("", [], "length")
    for alone, beside in zip(scored.prompt_logprobs, output.prompt_logprobs, strict=True):
        # A step of other rows may round otherwise
        assert replace(alone, logprob=None, rank=None) == replace(beside, logprob=None, rank=None)
        assert alone.logprob == pytest.approx(beside.logprob, abs=1e-4)
        assert alone.rank == pytest.approx(beside.rank, abs=1)
