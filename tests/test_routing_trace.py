from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from penstock.cluster.client.prompt_file import read_prompts
from penstock.cluster.client.trace_run import TracingRanks, trace_routing
from penstock.cluster.config import EngineConfig
from penstock.router.routing_trace import FORMAT, RoutingTrace
from penstock.workers.sampling_params import SamplingParams

DEMO = Path(__file__).parents[1] / "demo" / "model"


def small_trace() -> RoutingTrace:
    generator = np.random.default_rng(0)
    ids = np.argsort(generator.random((6, 2, 8)), axis=2)[:, :, :3].astype(np.int16)
    return RoutingTrace(
        model_type="olmoe",
        num_experts=8,
        ids=ids,
        weights=generator.random((6, 2, 3)).astype(np.float16),
        requests=np.array([0, 0, 0, 1, 1, 2], dtype=np.int32),
        positions=np.array([0, 1, 2, 0, 1, 0], dtype=np.int32),
        is_prompt=np.array([True, True, False, True, False, True]),
    )


FIELDS = ("ids", "weights", "requests", "positions", "is_prompt")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    trace = small_trace()
    trace.write(tmp_path / "t")
    again = RoutingTrace.read(tmp_path / "t")
    assert (again.model_type, again.num_experts, again.num_layers) == ("olmoe", 8, 2)
    for name in FIELDS:
        assert getattr(again, name).dtype == getattr(trace, name).dtype
        assert np.array_equal(getattr(again, name), getattr(trace, name))
    generated = again.select(~again.is_prompt)
    assert generated.requests.tolist() == [0, 1]
    assert np.array_equal(generated.ids, trace.ids[[2, 4]])


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^output: cannot write .*nowhere"):
        small_trace().write(tmp_path / "nowhere" / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("ids"), "lacks ids"),
        (lambda t, m: t.pop("positions"), "lacks positions"),
        (lambda t, m: m.pop("format"), "is not a 'penstock routing trace 1'"),
        (lambda t, m: m.update(format="penstock routing trace 9"), "is not a 'penstock routing trace 1'"),
        (lambda t, m: m.pop("model_type"), "does not name its model_type and num_experts"),
        (lambda t, m: m.pop("num_experts"), "does not name its model_type and num_experts"),
        (lambda t, m: m.update(num_experts="many"), "does not name its model_type and num_experts"),
        (lambda t, m: t.update(ids=t["ids"].astype(np.int64)), "ids of .* are int64, expected int16"),
        (lambda t, m: t.update(ids=t["ids"][:, 0]), r"ids of .* shape \[6, 3\], expected \[rows, layers, top_k\]"),
        (lambda t, m: t.update(ids=t["ids"][:0]), r"ids of .* shape \[0, 2, 3\]"),
        (lambda t, m: t.update(weights=t["weights"][:5]), r"weights of .* shape \[5, 2, 3\], expected \[6, 2, 3\]"),
        (lambda t, m: t.update(requests=t["requests"][1:]), r"requests of .* shape \[5\], expected \[6\]"),
        (lambda t, m: m.update(num_experts="7"), r"ids of .* name expert 7, which is not in \[0, 7\)"),
        (lambda t, m: t.update(ids=t["ids"] - np.int16(1)), r"ids of .* name expert -1, which is not in \[0, 8\)"),
    ],
)
def test_a_bad_file_is_refused_by_what_is_wrong(
    tmp_path: Path, change: Callable[[dict[str, Any], dict[str, str]], None], message: str
) -> None:
    small_trace().write(tmp_path / "good")
    tensors = load_file(tmp_path / "good")
    metadata = {"format": FORMAT, "model_type": "olmoe", "num_experts": "8"}
    change(tensors, metadata)
    save_file(tensors, tmp_path / "bad", metadata)
    with pytest.raises(ValueError, match=rf"(?s)^trace: .*{message}"):
        RoutingTrace.read(tmp_path / "bad")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^trace: cannot read .*nowhere"):
        RoutingTrace.read(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not tensors at all")
    with pytest.raises(ValueError, match=r"^trace: cannot read .*text"):
        RoutingTrace.read(tmp_path / "text")


def test_prompts_of_both_kinds_are_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "import os"}\n\n{"messages": [{"role": "user", "content": "1 + 2"}], "answer": "3"}\n')
    assert read_prompts(path) == ["import os", [{"role": "user", "content": "1 + 2"}]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2 of .* is not JSON"),
        ('{"prompt": ""}', "line 1 of .* has neither messages nor a prompt"),
        ('{"text": "a"}', "line 1 of .* has neither messages nor a prompt"),
        ('["a"]', "line 1 of .* has neither messages nor a prompt"),
        ('{"messages": []}', "line 1 of .* has neither messages nor a prompt"),
        ('{"messages": ["a"]}', "line 1 of .* has neither messages nor a prompt"),
        ('{"prompt": 5}', "line 1 of .* has neither messages nor a prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^data: .*{message}"):
        read_prompts(path)
    with pytest.raises(ValueError, match=r"^data: cannot read .*none"):
        read_prompts(tmp_path / "none")


def reference_choices(texts: list[list[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Experts and weights [T, L, K] of every token of ``texts``, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, experts_implementation="eager").eval()
    seen: list[tuple[torch.Tensor, ...]] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    choices = []
    for text in texts:
        seen.clear()
        with torch.inference_mode():
            model(torch.tensor([text]))
        choices.append(tuple(torch.stack([inputs[i] for inputs in seen], dim=1) for i in (1, 2)))
    return choices


def test_a_trace_holds_the_choices_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, several requests a step, preempted ones: each row once, with transformers' own choice."""
    from penstock.cluster.api.chat_tokenizer import ChatTokenizer
    from penstock.cluster.client.llm import LLM

    prompts: list[Any] = [
        "import os\nimport sys\n" * 3,
        [{"role": "user", "content": "438 + 275"}],
        "def main(self):\n",
    ]
    options: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "num_threads": 1, "max_model_len": 96, "block_size": 4,
        "max_num_seqs": 3, "max_num_batched_tokens": 16,
    }  # fmt: skip
    # A pool of little more than one request, so that the later ones are preempted and computed again
    probe = EngineConfig(model=str(DEMO), kv_cache_bytes=8 << 20, **options)
    config = EngineConfig(model=str(DEMO), kv_cache_bytes=_pool_bytes(probe, 28), **options)
    num_computed: list[int] = []
    finish = TracingRanks.trace

    def counted(ranks: TracingRanks, prompt_lens: list[int]) -> RoutingTrace:
        num_computed.append(sum(len(rows.ids) for rows in ranks._rows))
        return finish(ranks, prompt_lens)

    monkeypatch.setattr(TracingRanks, "trace", counted)
    num_done: list[int] = []
    trace = trace_routing(config, prompts, SamplingParams(temperature=0, max_tokens=24), num_done.append)
    assert num_done[-1] == 3
    assert num_computed[0] > len(trace.ids), "none was preempted"
    tokenizer = ChatTokenizer(str(DEMO))
    token_ids = [tokenizer.encode_chat(p) if isinstance(p, list) else tokenizer.encode(p) for p in prompts]
    with LLM(str(DEMO), kv_cache_bytes=8 << 20, **options) as llm:
        outputs = [done.token_ids for done in llm.generate(token_ids, temperature=0, max_tokens=24)]
    assert (trace.model_type, trace.num_experts) == ("qwen3_moe", 32)
    texts = [prompt + output[:-1] for prompt, output in zip(token_ids, outputs, strict=True)]
    assert trace.requests.tolist() == [r for r, text in enumerate(texts) for _ in text]
    assert trace.positions.tolist() == [p for text in texts for p in range(len(text))]
    assert trace.is_prompt.tolist() == [
        p < len(prompt) for prompt, text in zip(token_ids, texts, strict=True) for p in range(len(text))
    ]
    for request, (ids, weights) in enumerate(reference_choices(texts)):
        mine = trace.select(trace.requests == request)
        assert np.array_equal(mine.ids, ids.numpy())
        assert np.allclose(mine.weights, weights.numpy(), atol=2e-3)


def _pool_bytes(config: EngineConfig, num_blocks: int) -> int:
    from penstock.cluster.engine.ranks import make_runner

    return num_blocks * make_runner(config, 0).info.kv_block_bytes


def test_a_prompt_that_cannot_be_served_is_named() -> None:
    config = EngineConfig(
        model=str(DEMO), device="cpu", num_threads=1, max_model_len=32, max_num_seqs=2, kv_cache_bytes=1 << 20
    )
    sampling = SamplingParams(temperature=0, max_tokens=4)
    with pytest.raises(ValueError, match=r"^data: prompt 2: prompt: \d+ tokens leave no room"):
        trace_routing(config, ["a", "import os\n" * 30], sampling)
    with pytest.raises(ValueError, match=r"^data: prompt 1: messages\[0\]"):
        trace_routing(config, [[{"role": "user"}]], sampling)
