"""Placements made from made-up choices: of another map in every layer, whatever the model would choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from penstock.cluster.placement_file import PlacementFile
from penstock.router.affine import affine
from penstock.router.balanced import balanced
from penstock.router.placement import Placement, contiguous
from penstock.router.rank_visits import expert_loads
from penstock.workers.loader import build, inspect


def random_ids(num_rows: int, num_layers: int, top_k: int, num_experts: int, seed: int) -> np.ndarray:
    """[N, L, K]: distinct experts, some of a layer chosen far more often than others."""
    generator = np.random.default_rng(seed)
    scores = generator.gumbel(size=(num_rows, num_layers, num_experts))
    scores += 1.5 * generator.normal(size=(num_layers, num_experts))
    return np.argsort(-scores, axis=2)[:, :, :top_k].astype(np.int16)


def random_placement(method: str, num_layers: int, num_experts: int, num_ranks: int) -> Placement:
    """``balanced`` has three replicas in every layer."""
    ids = random_ids(200, num_layers, 3, num_experts, seed=num_experts)
    if method == "contiguous":
        return contiguous(num_layers, num_experts, num_ranks)
    if method == "affine":
        return affine(ids, num_experts, num_ranks)
    return balanced(expert_loads(ids, num_experts), num_ranks, 3)


def write_placement(directory: Path, num_ranks: int, method: str, path: Path) -> Placement:
    """Write such a placement of the model in ``directory`` to ``path``, and return it."""
    _, config = inspect(str(directory))
    empty = build(config, torch.float32)
    placement = random_placement(method, len(empty.expert_modules), empty.num_experts, num_ranks)
    PlacementFile.of(placement, method, config.model_type).write(path)
    return placement
