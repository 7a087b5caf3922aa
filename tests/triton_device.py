"""Where Triton's kernels are tested: on a GPU where there is one, else by Triton's interpreter on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
assert DEVICE.type == "cuda" or os.environ["TRITON_INTERPRET"] == "1"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in f32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def chosen(num_rows: int, num_experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """[T, K] distinct ids of each row; one id more than there are experts is "none"."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(num_experts + 1, generator=generator)[:top_k] for _ in range(num_rows)]
    return torch.stack(rows).to(DEVICE)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill what is allocated and not written with NaN, or the largest number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
