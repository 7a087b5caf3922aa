"""Where a rank computes."""

from __future__ import annotations

import torch


def resolve_device(device: str, rank: int) -> torch.device:
    """Return where ``rank`` computes; raise ``ValueError`` for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available on this machine; choose cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")
