"""Multi-head latent attention over latents as they are kept, in steps that read the KV pool in place.

A layer keeps of a token a latent c and a part p with its position, both for all heads. transformers' ``expand_kv``
makes each head's key (U c, p) and value V c of every token of a context, in every step. But for a query (a, b), its
product with (U c, p) is that of (a U, b) with (c, p), and a sum of V c is V times a sum of c. So queries can be taken
to latents, attend to those as one head's keys and values, and their outputs be taken back: "absorbed", DeepSeek-V2
(arXiv:2405.04434, section 2.1.2).

A layer is known by what it computes: its ``expand_kv`` for random latents, and the whole of it in both ways over a
context of random latents.

Shapes: R requests, N rows of each, S slots, C numbers of a latent, P of a part with the position, D of U's queries,
V of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .kv_cache import PagedKVCache
from .rows import PackedRows

_PROBES = 16
"""Latents that are expanded, at sizes of a quarter to four."""
_ROUNDINGS = 8
"""Of the type, by which a layer's output may differ, as a share of its size."""
_LEAST_TOLERANCE = 1e-4


class Absorbed(NamedTuple):
    """The two parts of a layer's weight that makes keys and values of latents; views of it."""

    to_keys: torch.Tensor
    """[heads, D, C]"""
    to_values: torch.Tensor
    """[heads, V, C]"""


def into_latents(query: torch.Tensor, absorbed: Absorbed) -> torch.Tensor:
    """Return queries [R, heads, N, C + P] over latents for ``query`` [R, heads, N, D + P] over keys."""
    width = absorbed.to_keys.shape[1]
    plain, positioned = query.split([width, query.shape[-1] - width], dim=-1)
    return torch.cat([torch.einsum("rhnd,hdc->rhnc", plain, absorbed.to_keys), positioned], dim=-1)


def out_of_latents(output: torch.Tensor, absorbed: Absorbed) -> torch.Tensor:
    """Return sums of values [R, heads, N, V] for ``output`` [R, heads, N, C], the same sums of latents."""
    return torch.einsum("rhnc,hvc->rhnv", output, absorbed.to_values)


def absorb(module: nn.Module, latent_width: int, position_width: int) -> Absorbed | None:
    """Return the weight by which ``module.expand_kv`` makes keys and values; None if that is not what it does."""
    like = next(module.parameters())
    latents, positions = (_random(_PROBES, width).to(like) for width in (latent_width, position_width))
    expand: Any = module.expand_kv
    keys, values = expand(latents, positions)
    if keys.shape[:-1] != values.shape[:-1]:
        return None
    num_heads, key_width, value_width = keys.shape[1], keys.shape[-1] - position_width, values.shape[-1]
    for child in module.children():
        shape = (num_heads * (key_width + value_width), latent_width)
        if not isinstance(child, nn.Linear) or child.weight.shape != shape:
            continue
        absorbed = Absorbed(*child.weight.unflatten(0, (num_heads, -1)).split([key_width, value_width], dim=1))
        wide = latents.float()
        expected = [torch.einsum("bzsc,hdc->bhsd", wide, part.float()).to(like) for part in absorbed]
        expected[0] = torch.cat([expected[0], positions.expand(-1, num_heads, -1, -1)], dim=-1)
        if all(_is_close(*pair) for pair in zip((keys, values), expected, strict=True)):
            return absorbed
    return None


def _random(num_rows: int, width: int) -> torch.Tensor:
    """Return [1, 1, num_rows, width], the same in every process."""
    rows = torch.randn(1, 1, num_rows, width, generator=torch.Generator().manual_seed(width))
    return rows * torch.logspace(-2, 2, num_rows, base=2)[:, None]


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether roundings explain the difference: to the type, of both, and of parts of sums that a GPU rounds to it."""
    size = expected.float().abs().amax(dim=-1, keepdim=True)
    tolerance = max(2 * torch.finfo(found.dtype).eps, 1e-5)
    return found.shape == expected.shape and bool(((found.float() - expected.float()).abs() <= tolerance * size).all())


def _as_kept(latents: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for ``expand_kv``."""
    return latents, positions


class LatentLayers:
    """All layers of ``model`` that keep latents; `active` lets them attend to those as they are.

    Raises ``ValueError`` saying why they cannot.
    """

    def __init__(self, model: nn.Module, cache: PagedKVCache) -> None:
        self._cache = cache
        modules = [module for module in model.modules() if hasattr(module, "expand_kv")]
        if len(modules) != len(cache.widths):
            raise ValueError("the model makes keys and values of what it keeps of a token, in a way of its own")
        self._absorbed: dict[Any, Absorbed] = {}
        for layer, (module, (width, latent_width)) in enumerate(zip(modules, cache.widths, strict=True)):
            absorbed = absorb(module, latent_width, width - latent_width)
            if absorbed is None:
                raise ValueError(f"layer {layer} makes keys and values of latents in a way of its own")
            self._absorbed[module] = absorbed

    @contextmanager
    def active(self) -> Iterator[None]:
        """Leave latents as they are, in steps that read the pool in place."""
        for module, absorbed in self._absorbed.items():
            module.expand_kv, module.penstock_absorbed = _as_kept, absorbed
        try:
            yield
        finally:
            for module in self._absorbed:
                del module.expand_kv, module.penstock_absorbed

    def prove(self, forward: Callable[..., object], gathered: PackedRows, in_place: PackedRows) -> None:
        """Run the layers over ``gathered`` contexts and again ``in_place``; raise ``ValueError`` if two differ.

        The rows are the same, and what they read of the pool is overwritten.
        """
        slots = gathered.gather_slots.unique()
        for states in self._cache.pools:
            states[slots] = _random(len(slots), states.shape[-1])[0].transpose(0, 1).to(states)
        differences: list[torch.Tensor] = []

        def again(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._cache.rows, rows = in_place, self._cache.rows
            with self.active():
                found, *_ = module.forward(*args, **kwargs)
            self._cache.rows = rows
            expected = output[0].float()
            differences.append((found.float() - expected).norm() / expected.norm())

        hooks = [module.register_forward_hook(again, with_kwargs=True) for module in self._absorbed]
        try:
            forward(gathered)
        finally:
            for hook in hooks:
                hook.remove()
            for states in self._cache.pools:
                states[slots] = 0
        most = max(_LEAST_TOLERANCE, _ROUNDINGS * torch.finfo(self._cache.pools[0].dtype).eps)
        for layer, difference in enumerate(torch.stack(differences).tolist()):
            if not difference <= most:
                raise ValueError(
                    f"layer {layer} attends to latents in a way of its own: they differ by {difference:.2g}"
                )
