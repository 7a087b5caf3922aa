from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.demo.inflate import inflate

IDS = [[5, 17, 60, 33, 8, 71, 11, 44, 19, 83]]


def logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor(IDS)).logits


def expert_bytes(directory: Path) -> int:
    from safetensors.torch import load_file

    return sum(
        tensor.nbytes
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if ".experts." in name
    )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("factor", [1, 3])
def test_the_function_stays_and_the_bytes_grow(
    checkpoint: Callable[[str], Path], tmp_path: Path, model_type: str, factor: int
) -> None:
    source, target = checkpoint(model_type), tmp_path / "wide"
    result = inflate(source, target, factor)
    assert result.num_experts == 8
    assert result.expert_bytes == expert_bytes(target) == factor * expert_bytes(source)
    torch.testing.assert_close(logits(target), logits(source), rtol=1e-5, atol=1e-4)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in target.glob("*.safetensors")}


def test_stacked_experts_are_inflated_too(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    source, stacked = checkpoint("qwen3_moe"), tmp_path / "stacked"
    stacked.mkdir()
    shutil.copyfile(source / "config.json", stacked / "config.json")
    state = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    save_file(state, stacked / "model.safetensors", metadata={"format": "pt"})
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    result = inflate(stacked, tmp_path / "wide", 3)
    assert result.num_experts == 8
    assert result.expert_bytes == 3 * expert_bytes(source)
    torch.testing.assert_close(logits(tmp_path / "wide"), logits(source), rtol=1e-5, atol=1e-4)


def test_the_tokenizer_comes_along_and_the_source_stays(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("olmoe"), source)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    inflate(source, tmp_path / "wide", 2)
    assert (tmp_path / "wide" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "wide" / "chat_template.jinja").exists()
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert config["intermediate_size"] == 2 * json.loads(before["config.json"])["intermediate_size"]


def test_errors_name_the_argument(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    good = checkpoint("qwen3_moe")
    for factor in (0, -2, 2.5):
        with pytest.raises(ValueError, match=rf"^factor: {factor} is not an integer in \[1, inf\)"):
            inflate(good, tmp_path / "a", factor)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match=r"^target: .*full exists and is not an empty directory"):
        inflate(good, tmp_path / "full", 2)
    with pytest.raises(ValueError, match=r"^source: architecture 'mixtral' is not one of qwen3_moe"):
        inflate(checkpoint("mixtral"), tmp_path / "a", 2)
    assert not (tmp_path / "a").exists(), "nothing is written for a source that is refused"


def test_a_target_that_is_a_file_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^target: "):
        inflate(checkpoint("qwen3_moe"), tmp_path / "file", 2)


def test_a_source_that_is_not_there_is_refused_by_that_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^source: .*no config\.json"):
        inflate(tmp_path / "nothing", tmp_path / "a", 2)
