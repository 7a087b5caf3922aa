"""Where Triton's kernels are tested: on a GPU where there is one, else by Triton's interpreter on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton has no build for this system")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
assert triton.knobs.runtime.interpret == (DEVICE.type == "cpu"), "conftest sets TRITON_INTERPRET where no GPU is"


def release(version: str) -> tuple[int, ...]:
    """Major and minor of a version."""
    return tuple(map(int, version.split(".")[:2]))


if DEVICE.type == "cpu" and release(triton.__version__) < (3, 7) and release(np.__version__) >= (2, 4):
    pytest.skip(
        f"Triton {triton.__version__} interprets no loop over a number with NumPy {np.__version__}: "
        "NumPy < 2.4 or Triton >= 3.7 does",
        allow_module_level=True,
    )


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
