"""A config.json that nobody can serve is refused with one line that names the file, and the field at fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from penstock import LLM

from .running_server import DEMO

CONFIG = json.loads((DEMO / "config.json").read_text())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the demo model's directory, less its config.json."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in DEMO.iterdir():
        if file.is_file() and file.name != "config.json":
            (directory / file.name).symlink_to(file)
    return directory


def refusal(model: Path) -> str:
    with pytest.raises(ValueError, match=r"^model: ") as caught:
        LLM(str(model), device="cpu", num_threads=1)
    message = str(caught.value)
    assert "config.json" in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"null", b'"x"', b"3"])
def test_what_is_no_json_object(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    assert f"{model / 'config.json'} " in refusal(model)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", None, "model_type is None"),
        ("model_type", [], r"model_type is \[\]"),
        ("model_type", "perceptron_9", "perceptron_9"),
        ("num_experts", "many", "num_experts.* int"),
        ("num_experts", -1, "number of experts is -1, expected 1 to 65536"),
        ("num_experts", 10**9, "number of experts is 1000000000"),
        ("num_experts_per_tok", 33, "number of experts per token is 33, expected 1 to 32"),
        ("num_experts_per_tok", 0, "no number of experts per token"),
        ("hidden_size", "128", "hidden_size is '128', expected an integer"),
        ("hidden_size", -128, "hidden_size is -128, expected an integer of at least 1"),
        ("head_dim", 1.5, "head_dim is 1.5"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("max_position_embeddings", True, "max_position_embeddings is True"),
        ("vocab_size", {}, "vocab_size is {}"),
        ("rms_norm_eps", "small", "rms_norm_eps"),
        ("dtype", "float99", "dtype is 'float99'"),
        ("dtype", 3, "dtype is 3"),
        ("quantization_config", 3, "quantization_config is 3"),
        ("hidden_act", "swoosh", "qwen3_moe model: KeyError: 'swoosh'"),
        ("decoder_sparse_step", 0, "qwen3_moe model: ZeroDivisionError"),
    ],
)
def test_a_field_that_makes_no_model(model: Path, field: str, value: Any, named: str) -> None:
    changed = {field: value, "num_local_experts": value} if field == "num_experts" else {field: value}
    (model / "config.json").write_text(json.dumps({**CONFIG, **changed}))
    assert re.search(named, refusal(model))


def test_a_field_that_is_missing(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({name: CONFIG[name] for name in CONFIG if name != "model_type"}))
    assert "model_type is missing" in refusal(model)


def test_a_server_refuses_it_before_ray_starts(model: Path, penstock, monkeypatch) -> None:
    monkeypatch.setattr("penstock.cluster.serving.server.LocalRay", lambda *_: pytest.fail("Ray was started"))
    for changed in ({"hidden_act": "swoosh"}, {"dtype": "float16"}, {"vocab_size": -1}):
        (model / "config.json").write_text(json.dumps({**CONFIG, **changed}))
        done = penstock("serve", str(model))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
