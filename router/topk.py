"""The router seam: take the place of ``torch.topk`` inside a model's own router, and nothing else.

The router's code still scores, gathers, normalises and scales, so one seam serves softmax, sigmoid, biased and scaled
routers alike. Group-limited routers call ``topk`` for their groups first; those calls have another shape or another k
and pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from .routing import Routing

_TOPK = {torch.topk, torch.Tensor.topk}
_AFFINITIES = {
    torch.softmax,
    torch.sigmoid,
    torch.Tensor.softmax,
    torch.Tensor.sigmoid,
    torch.nn.functional.softmax,
    torch.nn.functional.sigmoid,
}
"""What makes affinities of a router's logits."""
_WATCHED = _TOPK | _AFFINITIES


class Selection(Protocol):
    """A policy: from the router's own choice for T rows to the K experts of each."""

    def __call__(self, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (values [T, K], indices [T, K]) in the router's place; the values are new tensors."""
        ...


class _TopKMode(TorchFunctionMode):
    def __init__(self, num_experts: int, top_k: int, selection: Selection | None) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.selection = num_experts, top_k, selection
        self.affinities: torch.Tensor | None = None
        self.hits = 0
        self.in_groups = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in _WATCHED:
            return result
        if func in _AFFINITIES:
            if result.dim() == 2 and result.shape[-1] == self.num_experts:
                self.affinities = result
            return result
        scores = args[0] if args else kwargs["input"]
        k = args[1] if len(args) > 1 else kwargs["k"]
        if scores.dim() != 2 or scores.shape[-1] != self.num_experts or k != self.top_k:
            self.in_groups = True
            return result
        self.hits += 1
        if self.selection is None:
            return result
        values, ids = result
        if self.affinities is None:  # it selects logits, and weighs those it selected
            return self.selection(Routing(scores, scores.softmax(-1), values, ids, in_groups=False))
        return self.selection(Routing(scores, self.affinities, values, ids, self.in_groups))


class RouterSeam:
    """Stands around one router module's forward; free of cost while no selection is installed and not auditing."""

    def __init__(self, router: torch.nn.Module, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.selection: Selection | None = None
        self.audit = False
        self._forward: Callable[..., Any] = router.forward
        router.forward = self._call

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.selection is None and not self.audit:
            return self._forward(*args, **kwargs)
        with _TopKMode(self.num_experts, self.top_k, self.selection) as mode:
            result = self._forward(*args, **kwargs)
        if mode.hits != 1:
            raise ValueError(
                f"model: its router calls topk over {self.num_experts} experts {mode.hits} times, expected once; "
                "its expert selection cannot be steered"
            )
        return result
