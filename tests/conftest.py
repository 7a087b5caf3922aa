"""Checkpoints that the tests make, transformers' own output for them, the API over a scripted engine, the command."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .tiny_configs import settings_of

# Before torch is imported: more threads than cores make tiny tensors slow
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before Triton is imported: kernels are defined for its interpreter or for a GPU
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    import httpx

    from penstock.cluster.api.chat_tokenizer import ChatTokenizer
    from penstock.cluster.engine.engine import Engine
    from penstock.cluster.engine.ranks import LocalRanks
    from penstock.cluster.transport.process_ranks import ProcessRanks
    from penstock.workers.runner import ModelRunner

    from .scripted_backend import ScriptedBackend

SMALL: dict[str, Any] = {"block_size": 4, "max_model_len": 96, "kv_cache_bytes": 1 << 20}
"""What `make_engine` gives an engine unless told otherwise."""


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs kernels where they are, if that is on a GPU, and begin with the servers.

    Their tests take longest, and where files are tested two at a time one file ends last.
    """
    for item in items:
        device = getattr(item.getparent(pytest.Module).obj, "DEVICE", None)  # type: ignore[union-attr]
        if getattr(device, "type", "cpu") == "cuda":
            item.add_marker("gpu")
    items.sort(key=lambda item: item.get_closest_marker("serve") is None)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """Return transformers' model of a type, tiny, with random f32 weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(model_type: str) -> Any:
        torch.manual_seed(7)
        config = AutoConfig.for_model(model_type, **settings_of(model_type))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    return make


@pytest.fixture(scope="session")
def checkpoint(tiny_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a tiny random f32 checkpoint of a model type, made on first use."""
    made: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in made:
            import torch

            from penstock.workers.architectures import objection

            if reason := objection(model_type):
                pytest.skip(f"{model_type}: {reason}")
            model = tiny_model(model_type)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):  # zero when fresh
                    buffer.uniform_(-0.2, 0.2)
            for name, parameter in model.named_parameters():
                # Zero or tiny when fresh, and then nothing would be tested
                if name.endswith((".sinks", "_bias")) and "vision" not in name:
                    torch.nn.init.normal_(parameter, std=0.5)
            made[model_type] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(made[model_type], max_shard_size="60KB")
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def process_ranks() -> type[ProcessRanks]:
    """Return ranks in processes of their own, which need what a bare GPU machine lacks: msgspec and zmq."""
    pytest.importorskip("msgspec")
    pytest.importorskip("zmq")
    from penstock.cluster.transport.process_ranks import ProcessRanks

    return ProcessRanks


@pytest.fixture(scope="module")
def runner(checkpoint: Callable[[str], Path]) -> ModelRunner:
    """Return one loaded rank for all engines of a module's tests (`make_engine`)."""
    from penstock.cluster.engine.ranks import make_runner

    from .tiny_engine import config_of

    return make_runner(config_of(checkpoint("qwen3_moe"), **SMALL), 0)


@pytest.fixture
def make_engine(checkpoint: Callable[[str], Path], runner: ModelRunner) -> Callable[..., Engine]:
    """Return what makes an engine over ``runner``, of `EngineConfig`'s options; ``wrap`` puts ranks around it."""
    from penstock.cluster.engine.engine import Engine
    from penstock.cluster.engine.ranks import LocalRanks

    from .tiny_engine import config_of

    def make(wrap: Callable[[LocalRanks], Any] = lambda ranks: ranks, controller: Any = None, **options: Any) -> Engine:
        runner.generation = -1  # a new engine starts at a generation that the rank has not seen
        config = config_of(checkpoint("qwen3_moe"), **{**SMALL, **options})
        return Engine(config, wrap(LocalRanks(runner)), controller=controller)

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[..., list[int]]:
    """Return transformers' greedy continuation of a prompt."""
    models: dict[Path, object] = {}

    def generate(directory: Path, prompt: list[int], max_new_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        import torch
        from transformers import AutoModelForCausalLM

        if directory not in models:
            models[directory] = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        model = models[directory]
        ids = torch.tensor([prompt])
        stop = {"eos_token_id": 10**6} if ignore_eos else {}
        with torch.inference_mode():
            out = model.generate(  # type: ignore[attr-defined]
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, **stop
            )
        return out[0, len(prompt) :].tolist()

    return generate


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Return a small tokenizer with a chat template; some of its tokens are parts of characters."""
    from .scripted_backend import save_tokenizer

    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def backend(tokenizer: ChatTokenizer) -> ScriptedBackend:
    """Return an engine without a model: its pace, text and failures are the test's."""
    from .scripted_backend import ScriptedBackend

    return ScriptedBackend(tokenizer.vocab_size)


@pytest.fixture
async def http(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of the application over ``backend``, in this process."""
    from penstock.cluster.api.openai_api import create_app
    from penstock.cluster.api.serving_state import ServingState

    from .openai_app import NAMES, client_of

    async with client_of(create_app(await ServingState.create(backend, tokenizer, NAMES, "/the/root"))) as client:
        yield client


class Terminal(io.StringIO):
    """Standard input of a user who types nothing."""

    def isatty(self) -> bool:
        return True


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def penstock(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command in this process: starting one for each would take most of the time."""
    from penstock.cluster.cli import main

    monkeypatch.setattr("penstock.cluster.cli.interruptible", lambda: None)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, stdin: str | None = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["penstock", *arguments])
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run
