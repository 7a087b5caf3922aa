"""What a rank says of itself once its shard is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Facts about the served model that the coordinator, the server and the user need."""

    architecture: str
    model_type: str
    dtype: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    steerable: bool = True
    """Whether a policy may choose a row's experts instead of the model's own router."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One rank's shard."""

    rank: int
    model: ModelInfo
    num_local_experts: list[int]
    """Experts held, per MoE layer."""
    expert_bytes: int
    """Bytes of expert weights held, all layers."""
    dense_bytes: int
    """Bytes of all other weights held."""
    bytes_read: int
    """Bytes read from the checkpoint's tensors."""
    checkpoint_bytes: int
    """Bytes of all the checkpoint's tensors."""
    num_kv_blocks: int
    kv_block_bytes: int
    load_s: float
    replays_graphs: bool = False
    """Whether steps are to be padded to buckets, so that it can replay them as graphs."""
    most_gathered_slots: int | None = None
    """Context slots that a padded step may gather at most; None where it attends to them in place."""
    bytes_per_expert: list[int] = field(default_factory=list)
    """Bytes that an expert takes here, and between ranks, per MoE layer."""
