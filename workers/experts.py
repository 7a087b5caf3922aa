"""The experts of one layer that a rank holds, and their computation for the rows that reached it.

Shapes: N rows, H hidden, K experts per row, E experts held here, F expert intermediate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import linear, silu

from ..kernels.fused_moe import fits, fused_moe
from .gpu_experts import gpu_experts, runs_kernels
from .packed_weights import TiledExperts, each_alone, packed_experts, packs_weights
from .slotted_experts import SlottedExperts
from .stored_experts import kept_storage

_GROUP_ELEMENTS = 1 << 18
"""What the first projections of a group of experts may yield on a CPU: more would leave its caches, and be returned to
the system and faulted in again at every call."""


Tensors = tuple[torch.Tensor, ...]
"""What makes one expert, each contiguous, as ranks hand it to each other."""


class Projection(Protocol):
    """One linear layer of all experts."""

    def __call__(self, rows: torch.Tensor, experts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """From rows [N, I], the experts in their order, and how many rows each has, to [N, O]."""
        ...

    def tensors(self, expert: int) -> Tensors:
        """Return what makes an expert here."""
        ...

    def room(self) -> Tensors:
        """Return memory for what `tensors` gives of one more expert."""
        ...

    def hold(self, experts: Sequence[int | Tensors]) -> None:
        """Hold as many ``experts`` as before in that order: those held so far by number, others by their tensors."""
        ...


FusedExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, int | torch.Tensor]]
"""From rows [N, H], expert ids and weights [N, K] to [N, H] and the number of distinct experts, a tensor on a GPU."""


class ExpertShard:
    """E experts of one layer, taken out of a transformers experts module.

    ``moves``: whether others may take their place. Packed weights (`packed_weights`) are held once: the module's own
    parameters are freed.
    """

    def __init__(self, module: Any, *, moves: bool = False) -> None:
        self.num_experts = int(module.num_experts)
        names = [name for name, _ in module.named_parameters(recurse=False)]
        self.num_bytes = sum(module.get_parameter(name).nbytes for name in names)
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        weight = module.get_parameter(up_name)
        storage = kept_storage(module)
        self.device = weight.device
        packed = packs_weights(weight.dtype, weight.device)
        self._dtype = torch.float32 if packed else weight.dtype if storage is None else storage.dtype
        width = weight.shape[2 if module.is_transposed else 1]
        self._group_rows = max(1, _GROUP_ELEMENTS // width) if weight.device.type == "cpu" else sys.maxsize
        self._activate = module._apply_gate if module.has_gate else module.act_fn
        self._finish = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
        self._fused: FusedExperts | None = None
        self._slotted: SlottedExperts | None = None
        if storage is not None or runs_kernels(weight.device):
            kernels = gpu_experts(module)
            if kernels is not None:
                self._slotted = SlottedExperts(*kernels.args[:2], moves=moves)
                self._fused = partial(kernels, slots=self._slotted.slots)
        if self._slotted is None:
            self._up = _projection(module, up_name, packed=packed)
            self._down = _projection(module, "down_proj", packed=packed)
            if self._finish is None:
                self._fused = _fused(self._up, self._down, self._activate)
        self.bytes_per_expert = sum(tensor.nbytes for tensor in self.tensors(0))
        if packed:
            for name in names:
                setattr(module, name, None)

    @property
    def is_capturable(self) -> bool:
        """Whether `run` leaves the host out, so that a graph can capture it."""
        return self.device.type == "cuda" and self._slotted is not None

    def run(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, int | torch.Tensor]:
        """Return each row's weighted sum over its experts held here [N, H], and how many distinct experts ran.

        ``expert_ids`` [N, K]: local ids, E for "none". ``weights`` [N, K]. Reads each active expert's weights once and
        no others. Sums go in f32 in the order of K, so a row's result does not depend on the rows beside it. On a GPU
        the number is a tensor [], for which the host need not wait.
        """
        if self._fused is not None:
            output, num_active = self._fused(hidden.to(self._dtype), expert_ids, weights)
            return output.to(hidden.dtype), num_active
        n, k = expert_ids.shape
        # numpy: decoding has few rows, and its calls cost a fraction of torch's
        flat_ids = expert_ids.flatten().cpu().numpy()
        counts = np.bincount(flat_ids, minlength=self.num_experts + 1)[: self.num_experts].tolist()
        num_pairs = sum(counts)
        if not num_pairs:
            return torch.zeros_like(hidden), 0
        order = np.argsort(flat_ids, kind="stable")[:num_pairs]  # "none" comes last
        index, row_of = (torch.from_numpy(places).to(hidden.device) for places in (order, order // k))
        rows = hidden.to(self._dtype).index_select(0, row_of)
        active = [expert for expert, count in enumerate(counts) if count]
        results = self._compute(rows, active, [counts[expert] for expert in active])
        if self._finish is not None:
            results = self._finish(results)
        computed = torch.zeros(n * k, hidden.shape[-1], device=hidden.device)
        computed.index_copy_(0, index, results.float())
        weighted = computed.view(n, k, -1) * weights.float().unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden.dtype), len(active)

    def tensors(self, expert: int) -> Tensors:
        """Return what makes an expert: the first projection's tensors, then the second's."""
        if self._slotted is not None:
            return self._slotted.tensors(expert)
        return (*self._up.tensors(expert), *self._down.tensors(expert))

    def room(self) -> Tensors:
        """Return memory for what `tensors` gives of one more expert."""
        if self._slotted is not None:
            return self._slotted.room()
        return (*self._up.room(), *self._down.room())

    def hold(self, experts: Sequence[int | Tensors]) -> list[Tensors]:
        """Hold as many ``experts`` as before in that order: those held so far by number, others by their tensors.

        Between steps, so that nothing reads what is dropped. Return the memory that is free then, of as many experts as
        are others: kernels have theirs copied (`SlottedExperts`), others take their tensors and leave what is dropped.
        """
        if self._slotted is not None:
            return self._slotted.hold(experts)
        stay = {expert for expert in experts if isinstance(expert, int)}
        dropped = [self.tensors(expert) for expert in range(self.num_experts) if expert not in stay]
        cut = len(self._up.tensors(0))
        self._up.hold([expert if isinstance(expert, int) else expert[:cut] for expert in experts])
        self._down.hold([expert if isinstance(expert, int) else expert[cut:] for expert in experts])
        return dropped

    def _compute(self, rows: torch.Tensor, experts: list[int], sizes: list[int]) -> torch.Tensor:
        """Return each expert's results for its rows; those of one expert lie together, ``sizes`` of them."""
        results = []
        start = 0
        for group in self._groups(sizes):
            stop = start + sum(sizes[group])
            # One gate for all experts of a group: at few rows its calls would cost as much as its arithmetic
            gated = self._activate(self._up(rows[start:stop], experts[group], sizes[group]))
            results.append(self._down(gated, experts[group], sizes[group]))
            start = stop
        return torch.cat(results) if len(results) > 1 else results[0]

    def _groups(self, sizes: list[int]) -> Iterator[slice]:
        """Cut the experts into runs of at most ``_group_rows`` rows, or of one expert."""
        start = num_rows = 0
        for end, size in enumerate(sizes):
            if end > start and num_rows + size > self._group_rows:
                yield slice(start, end)
                start, num_rows = end, 0
            num_rows += size
        yield slice(start, len(sizes))


class PlainExperts:
    """A linear layer of E experts, of weights [E, O, I], or [E, I, O] where ``is_transposed``, and biases [E, O]."""

    def __init__(self, weights: torch.Tensor, biases: torch.Tensor | None, *, is_transposed: bool) -> None:
        self._is_transposed = is_transposed
        self._held: list[Tensors] = [(weight,) for weight in weights]
        if biases is not None:
            self._held = [(weight, bias) for (weight,), bias in zip(self._held, biases, strict=True)]
        self.hold(range(len(weights)))

    def __call__(self, rows: torch.Tensor, experts: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return [N, O]: the first ``sizes[0]`` of ``rows`` [N, I] by expert ``experts[0]``, and so on."""
        return each_alone(self._layers, rows, experts, sizes)

    def tensors(self, expert: int) -> Tensors:
        """Return an expert's weight, and its bias if it has one."""
        return self._held[expert]

    def room(self) -> Tensors:
        """Return memory for what `tensors` gives of one more expert."""
        return tuple(torch.empty_like(tensor) for tensor in self._held[0])

    def hold(self, experts: Sequence[int | Tensors]) -> None:
        """Hold ``experts`` in that order: those that it held, by number, and others by their tensors."""
        self._held = [self._held[expert] if isinstance(expert, int) else expert for expert in experts]
        self._layers = [
            partial(linear, weight=weight.t() if self._is_transposed else weight, bias=bias[0] if bias else None)
            for weight, *bias in self._held
        ]


def _projection(module: Any, name: str, *, packed: bool) -> Projection:
    """Return all experts' linear layer; unless ``packed`` it refers to the module's own weights."""
    weights = module.get_parameter(name)
    biases = module.get_parameter(f"{name}_bias") if module.has_bias else None
    if packed:
        return packed_experts(weights.transpose(1, 2) if module.is_transposed else weights, biases)
    return PlainExperts(weights, biases, is_transposed=module.is_transposed)


def _fused(up: Projection, down: Projection, activate: Callable[[torch.Tensor], torch.Tensor]) -> FusedExperts | None:
    """Return the experts as one operation if there is one that computes the same."""
    if not isinstance(up, TiledExperts) or not isinstance(down, TiledExperts):
        return None
    if up.biases is not None or not fits(up.tiled, down.tiled):
        return None
    # Experts name their gate in many ways; what it computes tells
    near = torch.linspace(-9, 7, 6 * down.tiled.num_inputs).view(3, -1)
    inner = torch.cat([near, 100 * near])  # a gate may clamp what is large
    gate, linear_part = inner.chunk(2, dim=-1)
    if not torch.equal(activate(inner), silu(gate) * linear_part):
        return None
    return partial(fused_moe, up.tiled, down.tiled)
