"""Compute the experts of one rank for the rows that reached it.

Shapes: N rows, H hidden, K experts per row, E experts held here, F expert intermediate.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear


def _project(module: torch.nn.Module, name: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return linear(rows, weight.t() if module.is_transposed else weight, bias)


def run_experts(
    module: torch.nn.Module, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Return each row's weighted sum over its experts held here [N, H], and how many distinct experts ran.

    ``module``: a transformers experts module cut to E experts. ``expert_ids`` [N, K]: local ids, E for "none".
    ``weights`` [N, K]. Reads each active expert's weights once and no others. Sums go in f32 in the order of K, so a
    row's result does not depend on the rows beside it.
    """
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    n, k = expert_ids.shape
    flat_ids = expert_ids.reshape(-1)
    counts = torch.bincount(flat_ids, minlength=num_experts + 1)[:num_experts].tolist()
    order = torch.argsort(flat_ids, stable=True)
    sorted_rows = hidden[torch.div(order, k, rounding_mode="floor")]
    computed = hidden.new_zeros(n * k, hidden.shape[-1])  # in expert order; "none" comes last and stays zero
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    start = active = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        active += 1
        inner = _project(module, up_name, expert, sorted_rows[start : start + count])
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)  # type: ignore[operator]
        result = _project(module, "down_proj", expert, inner)
        if getattr(module, "has_post_expert_norm", False):
            result = module.post_expert_norm(result)  # type: ignore[operator]
        computed[start : start + count] = result
        start += count
    place = torch.empty_like(order)
    place[order] = torch.arange(n * k, device=order.device)
    weighted = computed[place].view(n, k, hidden.shape[-1]).float() * weights.float().unsqueeze(-1)
    return weighted.sum(dim=1).to(hidden.dtype), active
