"""A runner whose tensors have no numbers: whatever asks the device for one fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penstock.router.budgeted_choice import LayerRanks
from penstock.workers import runner as runners
from penstock.workers.runner import ModelRunner

from .static_steps import runner_of


class OnTheDevice(TorchDispatchMode):
    """Records operations; none may read or make a tensor on another device than the one that stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{func} is not on the device"
        self.operations.append((str(func), [tuple(tensor.shape) for tensor in tensors]))
        return result


@pytest.fixture
def blind_runner(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> ModelRunner:
    """A runner whose tensors have shapes and no numbers: whoever asks for one gets an error, as a captured graph does.

    Experts are those of a device: a kernel that counts there, here by its shapes.
    """
    monkeypatch.setattr(runners, "fuse_norms", lambda *given: None)  # a CPU's
    runner = runner_of(checkpoint(request.param))
    if runner.cache.keeps_latents:
        runner.padded._absorb_latents()
    for module in runner.model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else tensor.to("meta")  # type: ignore[assignment]
    runner.cache._pools = {
        layer: (keys.to("meta"), values.to("meta")) for layer, (keys, values) in runner.cache._pools.items()
    }
    runner.cache._latents = {layer: both.to("meta") for layer, both in runner.cache._latents.items()}
    runner.device = runner.padded._device = torch.device("meta")
    runner.padded.last_tokens = runner.padded.last_tokens.to("meta")
    runner.layers[:] = [LayerRanks(layer.owner.to("meta"), layer.num_ranks, layer.home) for layer in runner.layers]
    for shard in runner.experts.shards:
        monkeypatch.setattr(shard, "run", lambda hidden, ids, weights: (hidden + weights.sum(1, True), ids.sum()))
    return runner
