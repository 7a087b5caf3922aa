"""What a placement makes of recorded rows: the ranks they visit, and how many reach each rank.

Shapes: N rows, L MoE layers, K experts per row, E experts, R ranks. ``ids`` [N, L, K] are chosen experts, E for "none".
"Over all homes": each row counts once for every rank that its request might live on.
"""

from __future__ import annotations

import numpy as np

from .placement import Placement


def rows_sent(placement: Placement, ids: np.ndarray, rank: int) -> np.ndarray:
    """Return [N, L]: how many other ranks each row of ``rank`` visits."""
    sent = np.empty(ids.shape[:2], dtype=np.int64)
    for layer in range(placement.num_layers):
        visited, is_visit = _visits(placement.owner_table(layer, rank).numpy(), ids[:, layer], placement.num_ranks)
        sent[:, layer] = (is_visit & (visited != rank)).sum(axis=1)
    return sent


def ranks_visited(placement: Placement, ids: np.ndarray) -> np.ndarray:
    """Return [L]: how many other ranks a row visits, mean over rows and over all homes."""
    num_sent = np.zeros(placement.num_layers)
    for layer in range(placement.num_layers):
        tables, home_of = np.unique(_owner_tables(placement, layer), axis=0, return_inverse=True)
        home_of = home_of.reshape(-1)
        for number, table in enumerate(tables):
            visited, is_visit = _visits(table, ids[:, layer], placement.num_ranks)
            homes = np.flatnonzero(home_of == number)
            num_visits = np.bincount(visited[is_visit], minlength=placement.num_ranks)
            num_sent[layer] += len(homes) * num_visits.sum() - num_visits[homes].sum()
    return num_sent / (len(ids) * placement.num_ranks)


def payload_bytes_per_row(placement: Placement, ids: np.ndarray, hidden_bytes: int) -> float:
    """Return the payload of a row's way through all layers, mean over rows and homes.

    ``hidden_bytes``: of a hidden state, which goes to each rank and comes back.
    """
    return 2 * hidden_bytes * float(ranks_visited(placement, ids).sum())


def rank_loads(placement: Placement, ids: np.ndarray) -> np.ndarray:
    """Return [L, R]: pairs of row and expert that each rank computes, mean over all homes."""
    loads = np.zeros((placement.num_layers, placement.num_ranks))
    for layer, counts in enumerate(expert_loads(ids, placement.num_experts)):
        for table in _owner_tables(placement, layer):
            loads[layer] += np.bincount(table[:-1], weights=counts, minlength=placement.num_ranks)
    return loads / placement.num_ranks


def load_imbalance(placement: Placement, ids: np.ndarray) -> np.ndarray:
    """Return [L]: the load of the busiest rank over the mean of all; 1 is balanced."""
    loads = rank_loads(placement, ids)
    return loads.max(axis=1) / loads.mean(axis=1)


def expert_loads(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Return [L, E] int64: rows that chose each expert."""
    layers = range(ids.shape[1])
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=num_experts + 1)[:num_experts] for layer in layers])


def _owner_tables(placement: Placement, layer: int) -> np.ndarray:
    """Return [R, E + 1]: the owner tables of all ranks."""
    return np.stack([placement.owner_table(layer, rank).numpy() for rank in range(placement.num_ranks)])


def _visits(table: np.ndarray, ids: np.ndarray, num_ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ranks that rows [N, K] visit under an owner table [E + 1], and where one occurs first: both [N, K]."""
    visited = np.sort(table[ids], axis=1)
    is_first = np.ones(visited.shape, dtype=bool)
    is_first[:, 1:] = visited[:, 1:] != visited[:, :-1]
    return visited, is_first & (visited < num_ranks)
