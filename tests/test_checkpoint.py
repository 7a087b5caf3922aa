from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.router.placement import Placement, contiguous
from penstock.workers.architectures import SUPPORTED
from penstock.workers.checkpoint import INDEX, SINGLE, CheckpointReader, LazyTensor, resolve
from penstock.workers.loader import LoadedModel, build, inspect, load, load_dense, resolve_dtype

from .uneven_placement import owned_by_name, uneven

MODEL_TYPES = SUPPORTED
NUM_EXPERTS = 8


def load_rank(
    directory: Path, placement: Callable[[int], Placement] = lambda n: contiguous(n, NUM_EXPERTS, 1), rank: int = 0
) -> LoadedModel:
    """``placement``: by the number of MoE layers."""
    directory, config = inspect(str(directory))
    empty = build(config, resolve_dtype(config, "auto"))
    return load(directory, empty, torch.device("cpu"), placement(len(empty.expert_modules)), rank)


def halves(num_layers: int) -> Placement:
    return contiguous(num_layers, NUM_EXPERTS, 2)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        merged.update(load_file(file))
    return merged


def rewrite(source: Path, target: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A checkpoint of one file with these tensors and ``source``'s config, changed as said."""
    target.mkdir(exist_ok=True)
    raw = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(raw))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, target / SINGLE, metadata={"format": "pt"})
    return target


def full_state(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_two_ranks_hold_and_read_their_halves(checkpoint: Callable[[str], Path], model_type: str) -> None:
    directory = checkpoint(model_type)
    full = full_state(directory)
    saved = tensors_of(directory)
    checkpoint_bytes = sum(tensor.nbytes for tensor in saved.values())
    in_file = sum(tensor.nbytes for name, tensor in full.items() if ".experts." in name)
    model, config = inspect(str(directory))
    dense = load_dense(model, build(config, resolve_dtype(config, "auto")), torch.device("cpu"))
    assert dense.bytes_read == checkpoint_bytes - in_file, "a spare has all but the experts"
    # Uneven and out of order too: nothing may rely on equal contiguous runs
    for make in (halves, uneven):
        for rank in range(2):
            loaded = load_rank(directory, make, rank)
            num_layers = len(loaded.expert_modules)
            owned = owned_by_name(loaded, make(num_layers), rank)
            state = loaded.model.state_dict()
            assert state.keys() == full.keys()
            for name, tensor in state.items():
                assert torch.equal(tensor, full[name][owned[name]] if name in owned else full[name]), name
            expert_bytes = sum(p.nbytes for module in loaded.expert_modules for p in module.parameters())
            num_held = sum(len(make(num_layers).experts_of(layer, rank)) for layer in range(num_layers))
            assert expert_bytes * NUM_EXPERTS * num_layers == in_file * num_held
            assert loaded.bytes_read == checkpoint_bytes - in_file + expert_bytes
            assert loaded.bytes_read < loaded.checkpoint_bytes == checkpoint_bytes
            assert not any(tensor.is_meta for tensor in (*loaded.model.parameters(), *loaded.model.buffers()))


def test_buffers_outside_the_checkpoint_are_computed(checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    directory = checkpoint("qwen3_moe")
    expected = dict(AutoModelForCausalLM.from_pretrained(directory).named_buffers())
    buffers = dict(load_rank(directory, halves, 1).model.named_buffers())
    assert buffers.keys() == expected.keys()
    assert any(name.endswith("inv_freq") for name in buffers)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name]), name


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_stacked_experts_are_sliced(checkpoint: Callable[[str], Path], tmp_path: Path, model_type: str) -> None:
    directory = checkpoint(model_type)
    full = full_state(directory)
    assert any(name.endswith(".experts.gate_up_proj") for name in full)
    stacked = rewrite(directory, tmp_path / "stacked", full)
    in_file = sum(tensor.nbytes for name, tensor in full.items() if ".experts." in name)
    for rank in range(2):
        loaded = load_rank(stacked, uneven, rank)
        owned = owned_by_name(loaded, uneven(len(loaded.expert_modules)), rank)
        for name, tensor in loaded.model.state_dict().items():
            assert torch.equal(tensor, full[name][owned[name]] if name in owned else full[name]), name
        held = sum(full[name][numbers].nbytes for name, numbers in owned.items())
        assert held < in_file
        assert loaded.bytes_read == loaded.checkpoint_bytes - in_file + held


def test_bfloat16_weights_are_read_as_they_are_stored(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("olmoe")
    halved = {name: tensor.bfloat16() for name, tensor in tensors_of(source).items()}
    directory = rewrite(source, tmp_path / "bf16", halved, dtype="bfloat16")
    loaded = load_rank(directory)
    assert loaded.bytes_read == loaded.checkpoint_bytes == sum(tensor.nbytes for tensor in halved.values())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}


def test_tied_embeddings_need_no_head(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("qwen3_moe")
    tensors = tensors_of(source)
    head = tensors.pop("lm_head.weight")
    directory = rewrite(source, tmp_path / "tied", tensors, tie_word_embeddings=True)
    loaded = load_rank(directory)
    model: Any = loaded.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, head)
    assert loaded.bytes_read == loaded.checkpoint_bytes
    with pytest.raises(ValueError, match=r"^model: .*1 tensors are missing, first lm_head\.weight"):
        load_rank(rewrite(source, tmp_path / "untied", tensors))


class Broken:
    """Ways to spoil a good checkpoint, each with what the error must say."""

    @staticmethod
    def no_config(directory: Path) -> str:
        (directory / "config.json").unlink()
        return "no config.json"

    @staticmethod
    def bad_json(directory: Path) -> str:
        (directory / "config.json").write_text('{"model_type": ')
        return "config.json"

    @staticmethod
    def unknown_architecture(directory: Path) -> str:
        (directory / "config.json").write_text('{"model_type": "perceptron_9"}')
        return "perceptron_9"

    @staticmethod
    def dense_architecture(directory: Path) -> str:
        (directory / "config.json").write_text('{"model_type": "llama"}')
        return "'llama' is not supported: it has no Mixture-of-Experts layer; supported: .*qwen3_moe"

    @staticmethod
    def recurrent_architecture(directory: Path) -> str:
        (directory / "config.json").write_text('{"model_type": "qwen3_next"}')
        return "'qwen3_next' is not supported: it keeps a recurrent state"

    @staticmethod
    def quantised(directory: Path) -> str:
        raw = json.loads((directory / "config.json").read_text())
        raw["quantization_config"] = {"quant_method": "awq", "bits": 4}
        (directory / "config.json").write_text(json.dumps(raw))
        return "quantisation 'awq' is not supported; supported: fp8, mxfp4"

    @staticmethod
    def missing_shard(directory: Path) -> str:
        shard = sorted(directory.glob("model-*.safetensors"))[1]
        shard.unlink()
        return f"lacks 1 weight files, first {re.escape(shard.name)}"

    @staticmethod
    def truncated_shard(directory: Path) -> str:
        shard = sorted(directory.glob("model-*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-10])
        return re.escape(shard.name)

    @staticmethod
    def empty_shard(directory: Path) -> str:
        shard = sorted(directory.glob("model-*.safetensors"))[0]
        shard.write_bytes(b"")
        return re.escape(shard.name)

    @staticmethod
    def index_is_no_json(directory: Path) -> str:
        (directory / INDEX).write_text("weights")
        return "is not a safetensors index"

    @staticmethod
    def index_without_a_map(directory: Path) -> str:
        (directory / INDEX).write_text('{"metadata": {}}')
        return "is not a safetensors index"

    @staticmethod
    def index_of_numbers(directory: Path) -> str:
        (directory / INDEX).write_text('{"weight_map": {"lm_head.weight": 1}}')
        return "is not a safetensors index"

    @staticmethod
    def index_is_unreadable(directory: Path) -> str:
        (directory / INDEX).write_bytes(b"\xff\xfe{}")
        return "is not a safetensors index"

    @staticmethod
    def only_pickles(directory: Path) -> str:
        for file in directory.glob("*.safetensors*"):
            file.unlink()
        (directory / "pytorch_model.bin").write_bytes(b"x")
        return "only safetensors are loaded"

    @staticmethod
    def no_such_end(directory: Path) -> str:
        (directory / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
        return "'</s>' ends an answer; expected token ids"


@pytest.mark.parametrize("way", [name for name in vars(Broken) if not name.startswith("_")])
def test_a_broken_checkpoint_is_refused_by_name(checkpoint: Callable[[str], Path], tmp_path: Path, way: str) -> None:
    directory = tmp_path / "broken"
    shutil.copytree(checkpoint("qwen3_moe"), directory)
    expected = getattr(Broken, way)(directory)
    with pytest.raises(ValueError, match=f"(?s)^model: .*{expected}"):
        load_rank(directory)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.update({"lm_head.weight": torch.zeros(96, 31)}), r"lm_head\.weight"),
        (lambda t: t.pop("model.norm.weight"), r"1 tensors are missing, first model\.norm\.weight"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(3)}), r"1 are unknown, first model\.extra\.weight"),
        (lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"), r"model\.layers\.1\.mlp\.experts"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.2.down_proj.weight": torch.zeros(32, 23)}),
            r"model\.layers\.0\.mlp\.experts",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if ".layers.1.mlp.experts." in k and "down_proj" in k],
            r"model\.layers\.1\.mlp\.experts\.down_proj",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.8.up_proj.weight": torch.zeros(24, 32)}),
            r"model\.layers\.0\.mlp\.experts\.8\.up_proj",
        ),
    ],
    ids=["shape", "missing", "unknown", "missing expert", "expert shape", "missing projection", "ninth expert"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    checkpoint: Callable[[str], Path], tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], expected: str
) -> None:
    tensors = tensors_of(checkpoint("qwen3_moe"))
    change(tensors)
    directory = rewrite(checkpoint("qwen3_moe"), tmp_path / "changed", tensors)
    with pytest.raises(ValueError, match=f"(?s)^model: .*{expected}"):
        load_rank(directory)


@pytest.mark.parametrize(
    "model", ["/no/such/directory", "./nothing", "a/b/c", "no spaces allowed", "nobody/nothing-at-all"]
)
def test_a_model_that_cannot_be_found_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"^model: "):
        resolve(model)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("")
    with pytest.raises(ValueError, match=r"^model: .*weights is a file"):
        resolve(str(tmp_path / "weights"))
    assert resolve(str(tmp_path)) == tmp_path


def test_the_dtype_of_a_checkpoint(checkpoint: Callable[[str], Path]) -> None:
    _, config = inspect(str(checkpoint("olmoe")))
    assert resolve_dtype(config, "auto") == torch.float32
    assert resolve_dtype(config, "bfloat16") == torch.bfloat16
    config.dtype = torch.float16
    with pytest.raises(ValueError, match=r"^dtype: .*float16 is not supported"):
        resolve_dtype(config, "auto")


def test_lazy_tensors_read_only_their_experts(tmp_path: Path) -> None:
    weights = torch.arange(6 * 4.0).reshape(6, 4)
    save_file({"w": weights}, tmp_path / SINGLE)
    with CheckpointReader(tmp_path) as reader:
        assert reader.total_bytes == 6 * 4 * 4
        some = LazyTensor(reader, "w", [0, 1, 4])
        assert some.get_shape() == [3, 4]
        assert some.get_dtype() == "F32"
        assert reader.bytes_read == 0
        assert torch.equal(some[...], weights[[0, 1, 4]])
        assert reader.bytes_read == 3 * 4 * 4
        assert torch.equal(LazyTensor(reader, "w")[...], weights)
        assert reader.bytes_read == 9 * 4 * 4


def test_a_hub_id_is_loaded_from_the_hub_cache(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own client finds the snapshot, offline; what the index does not name is not needed."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(checkpoint("qwen3_moe"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    directory, config = inspect("somebody/tiny")
    assert directory == repository / "snapshots" / commit
    assert config.model_type == "qwen3_moe"
    with pytest.raises(ValueError, match=r"^model: 'somebody/unknown' is not a directory and could not be fetched"):
        inspect("somebody/unknown")
