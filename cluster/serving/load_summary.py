"""What was loaded, in a few lines for whoever started it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from rich.filesize import decimal

from ...router.expert_budget import ExpertBudget
from ...workers.model_info import RankInfo
from ..calibration.gate import ServedBudgets, describe


def load_summary(infos: Sequence[RankInfo], block_size: int) -> str:
    """Return the model on one line and, on one each, the ranks that hold the same; ``infos`` in rank order."""
    model = infos[0].model
    head = (
        f"{model.architecture}, {model.dtype}, max_model_len {model.max_model_len}; {model.num_experts} experts, "
        f"{model.num_experts_per_tok} per token, in {model.num_moe_layers} of {model.num_layers} layers"
    )
    return "\n".join([head, *(_ranks(list(same), block_size) for _, same in groupby(infos, key=_holdings))])


def rank_summary(nodes: Sequence[str]) -> str:
    """Return on one line which ranks are where; ``nodes``: the addresses of their machines, in rank order."""
    parts = []
    for node, group in groupby(enumerate(nodes), key=lambda entry: entry[1]):
        ranks = [rank for rank, _ in group]
        parts.append(f"{ranks[0]}-{ranks[-1]} on {node}" if len(ranks) > 1 else f"{ranks[0]} on {node}")
    return f"ranks: {', '.join(parts)}"


def budget_summary(served: ServedBudgets, acting: Sequence[ExpertBudget]) -> str:
    """Return a line about each of the budgets that act: what it costs, if that is known and not too much."""
    lines = []
    for budget, entry in zip(served.config.budgets, served.entries, strict=True):
        if budget in acting:
            known = "not calibrated, or more than is allowed" if entry is None else describe(entry)
            lines.append(f"{budget}: {known}; requests with expert_budget off are exact")
    heads = ["lossy: verifications keep to", *["or to"] * (len(lines) - 1)]
    return "\n".join(f"{head} {line}" for head, line in zip(heads, lines, strict=True))


def _holdings(info: RankInfo) -> RankInfo:
    return replace(info, rank=0, load_s=0.0, bytes_read=0, num_local_experts=sorted(set(info.num_local_experts)))


def _ranks(infos: Sequence[RankInfo], block_size: int) -> str:
    first, last = infos[0], infos[-1]
    who = f"rank {first.rank}" if first is last else f"ranks {first.rank}-{last.rank}, each"
    fewest, most = min(first.num_local_experts), max(first.num_local_experts)
    held = str(most) if fewest == most else f"{fewest}-{most}"
    return (
        f"{who}: {held} experts a layer, {decimal(first.expert_bytes)}; all else "
        f"{decimal(first.dense_bytes)}; KV {first.num_kv_blocks} blocks x {block_size} = "
        f"{first.num_kv_blocks * block_size} tokens, {decimal(first.num_kv_blocks * first.kv_block_bytes)}; "
        f"loaded in {max(info.load_s for info in infos):.1f} s"
    )
