"""The commands that ask a server, as a user runs them: against a scripted server, and the demo model in process."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.metrics import parse_samples
from penstock.cluster.cli import app
from penstock.cluster.client.bench_serve import Load
from penstock.cluster.client.llm import LLM
from penstock.cluster.client.server_stats import ServerStats, quantile
from penstock.cluster.client_commands import PROMPTS
from penstock.cluster.engine.events import DIED, FAULT, RECOVERY, Event

from .scripted_backend import LoopbackServer, ScriptedBackend
from .served_backend import MODEL, served

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")
COMMAND = str(Path(sys.executable).with_name("penstock"))
DEMO = Path(__file__).parents[1] / "demo" / "model"

OPTIONS = {
    "generate": """
        --allow-uncalibrated --api-key --async-scheduling --block-size --budget-profile --chat --device
        --draft-len --drafter --dtype
        --enable-eplb --enforce-eager --eplb-bytes-per-step --eplb-step-interval --eplb-timeout-s --eplb-window-size
        --expert-budget --expert-parallel-size
        --frequency-penalty --gpu-memory-utilization --ignore-eos --json --kv-cache-bytes
        --load-timeout-s --local --max-draft-len --max-model-len --max-num-batched-tokens
        --max-num-seqs --max-perplexity-increase --max-quality-loss --max-queued-requests
        --max-step-retries --max-tokens --min-p --min-tokens
        --model --no-async-scheduling --num-redundant-experts --num-spares --num-threads --placement --prediction
        --presence-penalty
        --prompt-lookup-max --prompt-lookup-min --recovery-timeout-s
        --repetition-penalty --request-timeout-s --revision --seed --speculation --stats
        --step-timeout-s --stop --stop-token-ids --suffix-store-tokens --system --temperature
        --tokenizer --top-k --top-p --url
    """,
    "stats": "--api-key --json --url",
    "events": "--api-key --json --url",
    "bench serve": """
        --api-key --ignore-eos --max-seconds --max-tokens --model --num-requests --output --prompts --rate --seed
        --streams --temperature --url
    """,
}


@pytest.fixture
def backend(tokenizer: ChatTokenizer) -> ScriptedBackend:
    return ScriptedBackend(tokenizer.vocab_size, script=tokenizer.encode("the stone ☕ turns"))


@pytest.fixture
def server(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> Iterator[LoopbackServer]:
    with served(backend, tokenizer) as running:
        yield running


@pytest.mark.parametrize(("arguments", "stdin"), [(("water wheel",), ""), ((), "water wheel\n")])
def test_the_prompt_comes_from_the_argument_or_from_standard_input(
    server, backend, tokenizer, arguments, stdin, penstock
):
    heard = []
    token = backend.token
    backend.script = None
    backend.token = lambda prompt, *rest: heard.append(list(prompt)) or token(prompt, *rest)
    done = penstock("generate", *arguments, "--url", server.url, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert heard[0] == tokenizer.encode("water wheel")
    assert backend.requests[0].max_tokens == 16


def test_a_prediction_is_sent(server, backend, tokenizer, penstock):
    assert penstock("generate", "water", "--url", server.url, "--prediction", "the stone").returncode == 0
    assert backend.speculation[0].prediction_token_ids == tuple(tokenizer.encode("the stone"))


def test_text_and_nothing_else_is_written_to_standard_output(server, penstock):
    done = penstock("generate", "water", "--url", server.url)
    assert (done.stdout, done.stderr, done.returncode) == ("the stone ☕ turns\n", "", 0)
    done = penstock("generate", "water", "--url", server.url, "--stats", "--seed", "5", "--max-tokens", "40")
    assert done.stdout == "the stone ☕ turns\n"
    assert done.stderr.endswith("tokens/s, 3 of 6 draft tokens accepted, seed 5\n"), done.stderr


def test_a_conversation_is_not_written_as_json(server, penstock):
    done = penstock("generate", "--chat", "--json", "--url", server.url, stdin=None)
    assert (done.returncode, done.stdout) == (2, "")
    assert "json: not in a conversation" in done.stderr


def test_every_sampling_flag_arrives(server, backend, penstock):
    given = {"temperature": 0.5, "top-k": 7, "top-p": 0.9, "min-p": 0.1, "seed": 3, "max-tokens": 4}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    flags += ["--stop", "a", "--stop", "b", "--stop-token-ids", "5", "--stop-token-ids", "6", "--ignore-eos"]
    assert penstock("generate", "water", "--url", server.url, *flags).returncode == 0
    sampling = backend.requests[-1]
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 7, 0.9, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.ignore_eos) == (3, 4, True)
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "b"), (5, 6))


def test_json_is_one_object_with_text_counts_and_statistics(server, backend, tokenizer, penstock):
    done = penstock("generate", "turn", "--chat", "--system", "be a wheel", "--url", server.url, "--json")
    answer = json.loads(done.stdout)
    chat = [{"role": "system", "content": "be a wheel"}, {"role": "user", "content": "turn"}]
    assert answer["text"] == "the stone ☕ turns"
    assert answer["num_prompt_tokens"] == len(tokenizer.encode_chat(chat))
    assert answer["num_output_tokens"] == len(backend.script)
    assert answer["stats"]["seed"] == backend.requests[-1].seed


def test_a_conversation_on_a_terminal_remembers_its_turns(server, backend, tokenizer):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [COMMAND, "generate", "--chat", "--url", server.url], stdin=theirs, stdout=subprocess.PIPE, text=True
    )
    os.close(theirs)
    os.write(ours, b"one\n\ntwo\n\x04")
    said, _ = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    assert said.count("the stone ☕ turns\n") == 2
    turns = ["one", "the stone ☕ turns", "two"]
    chat = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant", "user"), turns, strict=True)]
    room = [200 - len(tokenizer.encode_chat(messages)) for messages in (chat[:1], chat)]
    assert [sampling.max_tokens for sampling in backend.requests] == room


def test_a_reader_of_the_output_who_leaves_is_no_error_of_ours(server, backend):
    backend.script = None
    backend.gate = asyncio.Semaphore(3)
    command = [COMMAND, "generate", "--url", server.url, "water", "--max-tokens", "100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    for _ in range(100):
        backend.gate.release()
    assert process.wait(60) == 1
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--temperature", "9"), 2, "temperature: 9.0 is not a number in [0, 2]"),
        (("--model", "nope"), 2, "model: 'nope' does not exist"),
        (("--system", "x"), 2, "system: only with chat"),
        (("--draft-len", "2"), 2, "draft_len: only with local"),
        (("--local", "somewhere"), 2, "url: not together with local"),
    ],
)
def test_mistakes_end_with_one_line(server, arguments, code, message, penstock):
    done = penstock("generate", "water", "--url", server.url, *arguments)
    assert done.returncode == code
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_server_that_is_not_there_or_cannot_serve_is_named(backend, tokenizer, penstock):
    with served(backend, tokenizer) as server:
        backend.dead = True
        done = penstock("generate", "water", "--url", server.url)
        assert (done.returncode, done.stderr) == (1, "error: rank 1 is gone\n")
        backend.dead, backend.fail_at, backend.failure = False, 1, "the ink has run out"
        done = penstock("generate", "water", "--url", server.url)
        assert (done.returncode, done.stderr) == (1, "error: the ink has run out\n")
    for command in (("generate", "water"), ("stats",)):
        done = penstock(*command, "--url", server.url)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: no answer from {server.url}")


@pytest.mark.parametrize("command", [("generate", "water"), ("stats",), ("events",)])
def test_an_address_without_its_protocol_is_told_what_is_missing(command, penstock):
    done = penstock(*command, "--url", "127.0.0.1:8000")
    assert done.returncode == 2
    assert done.stderr == "error: url: '127.0.0.1:8000' names no protocol; http://127.0.0.1:8000 does\n"


def test_without_a_server_the_model_answers_in_this_process(penstock):
    done = penstock(
        *("generate", "438 + 275", "--chat", "--local", str(DEMO), "--temperature", "0"), *("--num-threads", "1")
    )
    with LLM(str(DEMO), num_threads=1, draft_len=0) as llm:
        expected = llm.chat([{"role": "user", "content": "438 + 275"}], temperature=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{expected.text}\n"
    assert "Answer: 713" in done.stdout


def test_stats_are_readable_and_say_what_metrics_say(server, backend, penstock):
    for seconds in (0.012, 0.018, 0.03):
        backend.latencies.time_to_first_token.observe(seconds)
    shown = penstock("stats", "--url", server.url).stdout
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in shown.splitlines())
    assert lines["models"] == f"{MODEL} (max_model_len 200)"
    assert lines["engine"] == "up"
    assert lines["requests ended"] == "3 stop, 1 abort"
    assert lines["KV blocks"] == "25.0% used"
    assert lines["tokens"] == "0 prompt, 77 generated"
    assert re.fullmatch(r"mean 20\.0 ms, p50 1\d\.\d ms, p99 3\d\.\d ms", lines["time to first token"])
    assert lines["request latency"] == "no observations"
    found = json.loads(penstock("stats", "--url", server.url, "--json").stdout)
    assert found["models"][0]["id"] == MODEL
    assert found["metrics"]['penstock:request_success_total{finished_reason="stop"}'] == 3
    quantiles = found["quantiles"]["penstock:time_to_first_token_seconds"]
    assert 0.01 < quantiles["p50"] < quantiles["p99"] < 0.05


def test_stats_of_a_dead_engine_say_so(server, backend, penstock):
    backend.dead = True
    done = penstock("stats", "--url", server.url)
    assert done.returncode == 0
    assert "down" in done.stdout


def test_events_are_shown_oldest_first(server, backend, penstock):
    assert penstock("events", "--url", server.url).stdout == ""
    backend.past_events += [
        Event(RECOVERY, DIED, "rank 1 is there again", 1e9 + 0.5, 0.31, 1, (1,), 6_300_000, 3),
        Event(FAULT, DIED, "the process of rank 1 died", 1e9, ranks=(1,)),
    ]
    assert penstock("events", "--url", server.url).stdout.splitlines() == [
        "2001-09-09 01:46:40.000  g  fault      died                0.00 s  the process of rank 1 died",
        (
            "2001-09-09 01:46:40.500  g  recovery   died                0.31 s  rank 1 is there again; "
            "6.3 MB of experts loaded; 3 requests replayed"
        ),
    ]
    fault, recovery = map(json.loads, penstock("events", "--url", server.url, "--json").stdout.splitlines())
    assert (fault["kind"], fault["ranks"], recovery["expert_bytes_loaded"]) == ("fault", [1], 6_300_000)
    samples = parse_samples(httpx.get(f"{server.url}/metrics").text)
    assert samples['penstock:faults_total{what="died"}'] == 1
    assert samples['penstock:recoveries_total{what="died"}'] == 1
    assert samples["penstock:recovery_seconds_sum"] == pytest.approx(0.31)
    assert samples["penstock:requests_replayed_total"] == 3
    assert samples["penstock:expert_bytes_loaded_total"] == 6_300_000


def test_stats_call_a_budget_lossy():
    card = {"id": "m", "penstock": {"expert_budget": "experts=5", "lossy": True}}
    assert ("lossy", "verifications keep to experts=5") in ServerStats([card], {}, {}).lines()
    exact = {"id": "m", "penstock": {"expert_budget": None, "lossy": False}}
    for models in ([exact], [{"id": "of another server"}]):
        assert "lossy" not in dict(ServerStats(models, {}, {}).lines())


def test_quantiles_are_those_of_promql():
    buckets = [(0.1, 2.0), (0.2, 6.0), (float("inf"), 8.0)]
    assert quantile(buckets, 0.5) == pytest.approx(0.15)
    assert quantile(buckets, 0.25) == pytest.approx(0.1)
    assert quantile(buckets, 0.99) is None


def _load(**given) -> Load:
    base = {
        "url": "http://127.0.0.1:8000",
        "model": None,
        "prompts": PROMPTS,
        "streams": (1, 8),
        "rates": (),
        "num_requests": 10,
        "max_seconds": None,
        "max_tokens": 32,
        "temperature": 0.0,
        "ignore_eos": False,
        "api_key": None,
        "seed": 0,
    }
    return Load(**{**base, **given})


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"rates": (1.0,)}, "streams: "),
        ({"streams": ()}, "streams: "),
        ({"streams": (0,)}, "streams: 0 "),
        ({"streams": (), "rates": (-1.0,)}, "rates: -1.0 "),
        ({"num_requests": 0}, "num_requests: "),
        ({"max_seconds": 0.0}, "max_seconds: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"prompts": Path("nowhere.jsonl")}, "prompts: "),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(given, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        _load(**given)


def test_the_options_of_the_commands_that_ask(penstock):
    """Scripts of users hold these."""
    for command, options in OPTIONS.items():
        shown = penstock(*command.split(), "--help").stdout
        assert sorted(set(re.findall(r"--[a-z][a-z-]+", shown))) == options.split()


def test_the_lines_of_the_prompts_decide_the_endpoint(tmp_path):
    chat = _load().scenario(None)["spec"]
    assert chat["backend"]["request_format"] == "/v1/chat/completions"
    assert chat["profile"] == {"kind": "concurrent", "streams": [1, 8]}
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "water"}\n')
    load = _load(prompts=texts, streams=(), rates=(2.5,), temperature=1.0, seed=7)
    text = load.scenario(tmp_path / "report.json")["spec"]
    assert text["backend"]["request_format"] == "/v1/completions"
    assert text["backend"]["extras"]["body"] == {"temperature": 1.0, "seed": 7}
    assert text["profile"] == {"kind": "poisson", "rate": [2.5]}
    for wrong in ('{"question": "water"}\n', "water\n"):
        texts.write_text(wrong)
        with pytest.raises(ValueError, match=r"^prompts: "):
            load.scenario(None)


def test_bench_serve_without_its_extra_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"pip install 'penstock\[bench\]'"):
        app(["bench", "serve"])
