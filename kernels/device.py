"""Where Triton's kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

_kinds = {"cuda"}


def has_triton(device: torch.device) -> bool:
    """Return whether ``device`` computes with the kernels written in Triton, which only those that do so import."""
    return device.type in _kinds and _is_installed()


@contextmanager
def triton_on(kind: str) -> Iterator[None]:
    """Let devices of this ``kind`` compute with Triton's kernels meanwhile.

    A CPU does where Triton interprets them (TRITON_INTERPRET), which takes thousands of times as long: for tests.
    """
    added = {kind} - _kinds
    _kinds.update(added)
    try:
        yield
    finally:
        _kinds.difference_update(added)


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
