from __future__ import annotations

import pytest

from penstock.router.placement import Placement, contiguous


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(1, 1), (8, 1), (8, 2), (8, 3), (60, 8), (7, 7), (128, 5)])
def test_contiguous_gives_every_expert_to_one_rank_in_equal_runs(num_experts: int, num_ranks: int) -> None:
    placement = contiguous(num_experts, num_ranks)
    held = [placement.experts_of(rank) for rank in range(num_ranks)]
    assert [expert for run in held for expert in run] == list(range(num_experts))
    sizes = [len(run) for run in held]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_tables_agree_with_the_map_and_give_the_sentinel_to_nobody() -> None:
    placement = Placement(6, 3, (2, 0, 2, 1, 0, 2))
    assert placement.experts_of(0) == [1, 4]
    assert placement.experts_of(2) == [0, 2, 5]
    assert placement.owner_table().tolist() == [2, 0, 2, 1, 0, 2, 3]
    assert placement.local_ids().tolist()[:6] == [0, 0, 1, 0, 1, 2]
    assert len(placement.local_ids()) == 7
    for expert in range(6):
        owner, local = placement.owner_table()[expert], placement.local_ids()[expert]
        assert placement.experts_of(int(owner))[int(local)] == expert


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 0), (8, 9), (4, -1)])
def test_a_rank_without_experts_is_refused(num_experts: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"^expert_parallel_size: {num_ranks} is not in \[1, {num_experts}\]"):
        contiguous(num_experts, num_ranks)
