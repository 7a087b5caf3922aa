"""Where Triton's kernels run."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def has_triton(device: torch.device) -> bool:
    """Return whether ``device`` computes with the kernels written in Triton, which only those that do so import."""
    return device.type == "cuda" and _is_installed()


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
