"""How many operations a step of fixed shape puts on a device: what a GPU's host launches, and a graph holds.

`python -m penstock.benchmarks.step_launches` runs a padded step of the demo model on tensors without numbers, with and
without the kernels for routing, packing and acceptance, and counts: each of torch's operations that computes or moves
something (not those that only look at memory in another way, or take it), each of Triton's launches and each collective
as one. Some of torch's operations launch several kernels: sorts, sums over an index. Experts are Triton's in both.
Likewise a model whose routers are DeepSeek-V3's, in number of experts and in groups, with all else small.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..kernels.device import triton_on
from ..router.budgeted_choice import LayerRanks
from ..router.expert_budget import ExpertBudget
from ..router.placement import contiguous
from ..workers.collectives import Collectives
from ..workers.dispatch import LocalDispatcher
from ..workers.gpu_experts import fused
from ..workers.plan import Bucket
from ..workers.runner import ModelRunner
from ..workers.static_dispatch import StaticAllToAll
from ..workers.static_rows import StaticRows
from ..workers.static_step import StaticStep, StepShape
from .harness import Measurement, Options, Row, Target, run

_MODEL = Path(__file__).parents[1] / "demo" / "model"
_GROUPED = "DeepSeek-V3's router"
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
}
_META = torch.device("meta")
_BUCKET = Bucket(4, 8, 256)
_BLOCK = 16
BUDGETS = (None, "experts=12,scope=request", "experts=12,rank_balance=0.5", "coverage=0.9", "experts=12,scope=global")
_FREE = {"aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.detach", "aten._unsafe_view"}
"""Operations that only take memory, or look at it, and do not say so."""


class Counts(TorchDispatchMode):
    """Operations by the part of the step that asks for them: blocks of experts, layers beside those, or the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "step"
        self.operations: dict[str, Counter[str]] = {part: Counter() for part in ("experts", "layer", "step")}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).rpartition(".")[0]
        if not func.is_view and name not in _FREE:
            self.add(name)
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device == _META for tensor in tensors), f"{name} is not on the device"
        return result

    def add(self, name: str) -> None:
        """Count one operation."""
        self.operations[self.part][name] += 1

    def per_layer(self, part: str, num_layers: int) -> float:
        """Return how many operations of ``part`` a layer has."""
        return sum(self.operations[part].values()) / num_layers


class _Uncoupled(StaticAllToAll):
    """Exchanges with ranks that are not there."""

    counts: Counts

    def _exchange(self, message: torch.Tensor, name: str) -> torch.Tensor:
        self.counts.add("all_to_all")
        return torch.empty_like(message)

    def sum_scores(self, scores: torch.Tensor) -> None:
        """Leave them as they are."""
        self.counts.add("all_reduce")


def runner_without_numbers(model: Path = _MODEL) -> ModelRunner:
    """Return a runner of ``model`` whose tensors have shapes alone, and whose experts are kernels."""
    with triton_on("cpu"):
        runner = ModelRunner(
            model=str(model),
            dtype="float32",
            device="cpu",
            block_size=_BLOCK,
            max_model_len=_BUCKET.num_slots,
            kv_cache_bytes=64 << 20,
        )
    for module in runner.model.modules():
        if hasattr(module, "variance_epsilon"):
            vars(module).pop("forward", None)  # what fuses it on a CPU
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(parameter.to(_META), requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(_META)
    pools = runner.cache._pools
    runner.cache._pools = {layer: (keys.to(_META), values.to(_META)) for layer, (keys, values) in pools.items()}
    runner.device = _META
    modules = [module for module in runner.model.modules() if hasattr(module, "penstock_layer")]
    with triton_on("meta"):
        for shard, module in zip(runner.experts.shards, modules, strict=True):
            shard._fused = fused(module)
    return runner


def save_grouped(directory: Path) -> None:
    """Save a small model with DeepSeek-V3's routers: 8 of 256 experts, in 4 of 8 groups."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("deepseek_v3", **_SMALL)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)


@contextmanager
def _parts(runner: ModelRunner, counts: Counts) -> Iterator[None]:
    """Tell ``counts`` which part of the step runs."""
    blocks = {
        module
        for module in runner.model.modules()
        if any(hasattr(child, "penstock_layer") for child in module.children())
    }
    layers = {module for module in runner.model.modules() if blocks & set(module.children())}
    hooks = []
    for name, modules, around in (("experts", blocks, "layer"), ("layer", layers, "step")):
        for module in modules:
            hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: setattr(counts, "part", name)),
                module.register_forward_hook(lambda *_, around=around: setattr(counts, "part", around)),
            ]
    yield
    for hook in hooks:
        hook.remove()


@contextmanager
def _launches(counts: Counts) -> Iterator[None]:
    """Count launches of Triton's kernels, and launch none."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def launch(function: Any, *_: Any, **__: Any) -> None:
        counts.add(f"triton.{function.fn.__name__.strip('_')}")

    with patch.object(JITFunction, "run", launch), patch.object(InterpretedFunction, "run", launch):
        yield


def count(runner: ModelRunner, budget: str | None, num_ranks: int, *, kernels: bool) -> Counts:
    """Return the operations of one step; ``kernels``: whether those for routing, packing and acceptance take part."""
    counts = Counts()
    num_layers, num_experts = len(runner.experts.shards), runner.experts.num_experts
    owners = torch.zeros(num_experts, dtype=torch.int64, device=_META)
    runner.layers[:] = [LayerRanks(owners, num_ranks, 0)] * num_layers
    runner.experts.dispatcher = LocalDispatcher()
    if num_ranks > 1:
        placement, hidden_bytes = contiguous(num_layers, num_experts, num_ranks), runner.hidden_size * 4
        dispatcher = _Uncoupled(placement, 0, Collectives(), runner.log, _META, hidden_bytes, runner.top_k)
        dispatcher.counts = counts
        runner.experts.dispatcher = dispatcher
    shape = StepShape.of(_BUCKET, None if budget is None else ExpertBudget.parse(budget))
    routers = runner.padded.known_routers if kernels else []
    with ExitStack() as stack:
        if kernels:
            stack.enter_context(triton_on("meta"))
        rows = StaticRows(_BUCKET, _BLOCK, runner.cache.scratch_slot, _META)
        parts = runner._forward, runner.experts, runner.layers, runner.log, routers, runner.cache.pools
        step = StaticStep(shape, rows, *parts)
        stack.enter_context(_parts(runner, counts))
        stack.enter_context(_launches(counts))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(counts)
        step.run()
    return counts


def _rows(name: str, runner: ModelRunner) -> Iterator[Row]:
    num_layers = len(runner.experts.shards)
    for num_ranks, budget in product((1, 8), BUDGETS):
        before, after = (count(runner, budget, num_ranks, kernels=kernels) for kernels in (False, True))
        row: Row = {
            "model": name,
            "ranks": num_ranks,
            "budget": budget or "none",
            "block, torch": before.per_layer("experts", num_layers),
            "block, kernels": after.per_layer("experts", num_layers),
        }
        if name == _MODEL.parent.name:  # what surrounds the other's blocks is no model's
            row["rest of a layer"] = after.per_layer("layer", num_layers)
            row["rest of the step"] = sum(after.operations["step"].values())
        yield row


def measure(options: Options) -> Measurement:
    """Count for each model, number of ranks and budget."""
    rows = list(_rows(_MODEL.parent.name, runner_without_numbers()))
    most = max(float(row["block, kernels"]) for row in rows)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as directory:
        save_grouped(Path(directory))
        grouped = list(_rows(_GROUPED, runner_without_numbers(Path(directory))))
    most_grouped = max(float(row["block, kernels"]) for row in grouped)  # type: ignore[arg-type]
    targets = [
        Target("operations of a block of experts, by kernels", most, at_most=16),
        Target("the same of one with shared experts and groups", most_grouped, at_most=22),
    ]
    return Measurement(rows + grouped, targets, "float32", 1)


def main() -> int:
    """Run from the command line; refuse where Triton is not installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        print("step_launches: Triton is not installed; it comes with the dev extra on Linux", file=sys.stderr)
        return 2
    return run("step_launches", measure)


if __name__ == "__main__":
    sys.exit(main())
