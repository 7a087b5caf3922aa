"""A layer's choice of experts under a budget as one call on a CPU, where a torch operation costs more than its work.

`expert_choice.cpp` is compiled where it runs, which takes a g++ and a fraction of a second; without one, callers do
without. What it computes is defined by torch's operations (`router/budgeted_choice.py`), to the bit.

Shapes: T rows, E experts, K experts per row, G groups. Pointers are to contiguous tensors of the named type.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from functools import cache

from .compiled import compile_library

logger = logging.getLogger(__name__)

# A product that is added unrounded would break ties otherwise than torch's operations do
_FLAGS = ("-ffp-contract=off",)
_POINTER, _COUNT, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

SCORES = ("probabilities", "selected", "squared", "survival")
LISTS = ("all", "covering", "most_important", "most_important_of_owners")


class Budget(ctypes.Structure):
    """The rules: ``score`` and ``list`` are places in `SCORES` and `LISTS`.

    ``beyond_part``: share of its worth that an expert beyond its rank's part keeps.
    """

    _fields_ = (
        ("score", _INT),
        ("list", _INT),
        ("coverage", _FLOAT),
        ("substitutes", _INT),
        ("limits_ranks", _INT),
        ("min_rank_share", _FLOAT),
        ("beyond_part", _FLOAT),
        ("experts", _COUNT),
        ("max_ranks", _COUNT),
    )


class Rows(ctypes.Structure):
    """The step's rows: ``budgeted`` and ``valid`` (or None) [T] bool, ``groups`` [T] int64, ``reach`` [T] float32."""

    _fields_ = (
        ("num_rows", _COUNT),
        ("num_groups", _COUNT),
        ("budgeted", _POINTER),
        ("valid", _POINTER),
        ("groups", _POINTER),
        ("reach", _POINTER),
    )


class Ranks(ctypes.Structure):
    """Where experts are: ``owner`` [E] int64."""

    _fields_ = (("num_ranks", _COUNT), ("home", _COUNT), ("owner", _POINTER))


def compile_kernel(*, march: str = "native") -> ctypes.CDLL:
    """Compile the kernel for ``march`` and load it; raise ``OSError`` or ``subprocess.SubprocessError`` if it fails.

    ``expert_worth`` and ``choose_experts`` take addresses of these structures and of tensors; the source says which.
    """
    loaded = compile_library("expert_choice", _FLAGS, march=march)
    loaded.expert_worth.restype = None
    loaded.expert_worth.argtypes = [_POINTER, _POINTER, _COUNT, _COUNT, *[_POINTER] * 3]
    loaded.choose_experts.restype = None
    loaded.choose_experts.argtypes = [*[_POINTER] * 4, _COUNT, _COUNT, _INT, *[_POINTER] * 8]
    return loaded


@cache
def kernel() -> ctypes.CDLL | None:
    """Return the kernel for this processor, compiled once a process; None, and a line in the log, if that fails."""
    try:
        return compile_kernel()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("experts within a budget are chosen by torch's operations, which are slower: %s", error)
        return None
