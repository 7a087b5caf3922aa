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
    """The rules: ``score`` and ``list`` are places in `SCORES` and `LISTS`."""

    _fields_ = (
        ("score", _INT),
        ("list", _INT),
        ("coverage", _FLOAT),
        ("substitutes", _INT),
        ("limits_ranks", _INT),
        ("min_rank_share", _FLOAT),
        ("experts", _COUNT),
        ("max_ranks", _COUNT),
    )


class Rows(ctypes.Structure):
    """The step's rows: ``budgeted`` and ``unbudgeted`` [T] bool, ``groups`` [T] int64, ``reach`` [T] float32."""

    _fields_ = (
        ("num_rows", _COUNT),
        ("num_groups", _COUNT),
        ("budgeted", _POINTER),
        ("unbudgeted", _POINTER),
        ("groups", _POINTER),
        ("reach", _POINTER),
    )


class Routing(ctypes.Structure):
    """The router's own choice: ``scores``, ``affinities`` [T, E], ``values`` [T, K] float32, ``ids`` [T, K] int64."""

    _fields_ = (
        ("num_experts", _COUNT),
        ("top_k", _COUNT),
        ("in_groups", _INT),
        ("scores", _POINTER),
        ("affinities", _POINTER),
        ("values", _POINTER),
        ("ids", _POINTER),
    )


class Ranks(ctypes.Structure):
    """Where experts are: ``owner`` [E] int64."""

    _fields_ = (("num_ranks", _COUNT), ("home", _COUNT), ("owner", _POINTER))


def compile_kernel(*, march: str = "native") -> ctypes.CDLL:
    """Compile the kernel for ``march`` and load it; raise ``OSError`` or ``subprocess.SubprocessError`` if it fails.

    ``expert_worth(budget, rows, routing, both)`` gives [2, G, E] float32: worth, and whether loaded anyway.
    ``choose_experts(budget, rows, routing, ranks, both, allowed, kept, values, ids)`` takes that, or None for the rows'
    own, and gives ``allowed`` [T, E] bool, ``kept`` [T] float32 and, if the budget substitutes, the choice [T, K].
    """
    loaded = compile_library("expert_choice", _FLAGS, march=march)
    inputs = [ctypes.POINTER(Budget), ctypes.POINTER(Rows), ctypes.POINTER(Routing)]
    loaded.expert_worth.restype = None
    loaded.expert_worth.argtypes = [*inputs, _POINTER]
    loaded.choose_experts.restype = None
    loaded.choose_experts.argtypes = [*inputs, ctypes.POINTER(Ranks), *[_POINTER] * 5]
    return loaded


@cache
def kernel() -> ctypes.CDLL | None:
    """Return the kernel for this processor, compiled once a process; None, and a line in the log, if that fails."""
    try:
        return compile_kernel()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("experts within a budget are chosen by torch's operations, which are slower: %s", error)
        return None
