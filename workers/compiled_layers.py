"""The dense part of decoder layers by torch's compiler, for steps that run as graphs.

transformers writes a layer as dozens of small operations (norms, rotary positions, residuals), and a GPU spends more on
launching and on passing their results through memory than on reading weights. Inductor fuses them. What is ours stays
out: routers, experts, the pool's writes and attention are called between compiled parts, as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from . import attention
from .kv_cache import PagedKVCache

logger = logging.getLogger(__name__)
Backend = str | Callable[..., Any]
"""As ``torch.compile`` takes it."""
_MOST_VARIANTS = 64
"""Of one piece of code: kinds of layers that share it, and one row or more."""


class CompiledLayers:
    """All decoder layers of ``model``, as they are and compiled; `active` says where which run.

    ``opaque``: the modules that are ours to compute, routers and experts. Layers of a kind share a variant, and so do
    all numbers of rows above one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        opaque: Iterable[torch.nn.Module],
        cache: PagedKVCache,
        backend: Backend = "inductor",
    ) -> None:
        disable: Any = torch.compiler.disable
        for module in opaque:
            module.forward = disable(module.forward)
        cache.update = disable(cache.update)  # type: ignore[method-assign]
        attention.keep_whole()
        self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._eager: list[Callable[..., Any]] = [layer.forward for layer in self._layers]
        self._compiled = [torch.compile(forward, dynamic=True, backend=backend) for forward in self._eager]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run the compiled layers; what they meet for the first time is compiled, which takes seconds."""
        settings: Any = torch._dynamo.config
        # Layers differ in their index, which is no reason to compile another one
        variants = settings.patch(
            allow_unspec_int_on_nn_module=True, recompile_limit=_MOST_VARIANTS, fail_on_recompile_limit_hit=True
        )
        self._use(self._compiled)
        try:
            with variants:
                yield
        finally:
            self._use(self._eager)

    def _use(self, forwards: Iterable[Callable[..., Any]]) -> None:
        for layer, forward in zip(self._layers, forwards, strict=True):
            layer.forward = forward
