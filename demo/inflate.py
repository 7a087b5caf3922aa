"""Inflation: the same function at a real model's cost.

Every intermediate unit of every expert is copied n times and the down projection divided by n, so the experts' sum is
unchanged while n times the bytes are read for it. The copies are real data: pages of zeros could be shared.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..workers.checkpoint import CheckpointReader
from ..workers.config_file import load_config

_SIZE_FIELD = {"qwen3_moe": "moe_intermediate_size", "qwen2_moe": "moe_intermediate_size", "olmoe": "intermediate_size"}
_SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Inflated:
    """What was written."""

    num_experts: int
    expert_bytes: int
    """Bytes of all experts of all layers."""


def inflate(source: Path, target: Path, factor: int) -> Inflated:
    """Write ``source``'s checkpoint to ``target`` with experts ``factor`` times as wide.

    Raises ``ValueError`` naming the argument. Tokenizer files are copied.
    """
    source, target = Path(source), Path(target)
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor: {factor!r} is not an integer in [1, inf)")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"target: {target} exists and is not an empty directory")
    try:
        config = load_config(source)
    except ValueError as error:
        raise ValueError(f"source: {str(error).removeprefix('model: ')}") from error
    if config.model_type not in _SIZE_FIELD:
        raise ValueError(f"source: architecture {config.model_type!r} is not one of {', '.join(_SIZE_FIELD)}")
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw[_SIZE_FIELD[config.model_type]] *= factor
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    return _write(source, target, factor)


def _write(source: Path, target: Path, factor: int) -> Inflated:
    """Write the weights in shards of about a gigabyte, so that no more than one is in memory."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    names: list[str] = []
    total = expert_bytes = 0
    experts: set[int] = set()

    def flush() -> None:
        names.append(f"model-{len(names) + 1:05d}.safetensors")
        save_file(shard, target / names[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, names[-1]))
        shard.clear()

    with CheckpointReader(source) as reader:
        for key in sorted(reader.keys()):
            tensor = reader.slice(key)[...]
            if ".experts." in key:
                tensor = _inflate_tensor(key, tensor, factor)
                expert_bytes += tensor.nbytes
                experts.add(_expert_count(key, tensor))
            total += tensor.nbytes
            shard[key] = tensor
            if sum(t.nbytes for t in shard.values()) >= _SHARD_BYTES:
                flush()
    if shard:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return Inflated(max(experts), expert_bytes)


def _inflate_tensor(key: str, tensor: torch.Tensor, factor: int) -> torch.Tensor:
    """Return one tensor of the experts, wider: [.., I, H] gate or up, [E, 2I, H] both, [.., H, I] down."""
    if "down_proj" in key:
        return (tensor.float() / factor).repeat_interleave(factor, dim=-1).to(tensor.dtype).contiguous()
    if "gate_up_proj" in key:
        gate, up = tensor.chunk(2, dim=-2)
        halves = [half.repeat_interleave(factor, dim=-2) for half in (gate, up)]
        return torch.cat(halves, dim=-2).contiguous()
    if "gate_proj" in key or "up_proj" in key:
        return tensor.repeat_interleave(factor, dim=-2).contiguous()
    raise ValueError(f"source: no rule to inflate {key}")


def _expert_count(key: str, tensor: torch.Tensor) -> int:
    """Return how many experts ``key`` shows there are at least."""
    after = key.split(".experts.")[1].split(".")[0]
    return int(after) + 1 if after.isdigit() else tensor.shape[0]
