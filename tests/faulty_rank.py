"""A rank that fails planted steps: the program that `test_identity` starts instead of the real one.

In generation 0, rank 1 fails step 4 after its collectives have run. With PENSTOCK_TEST_FAIL_EARLY it fails step 2
before them too, which leaves rank 0 in a collective that nobody will join. With PENSTOCK_TEST_LAUNCHED ranks launch
steps behind those that they have not finished, as on a device that computes by itself; each leaves a byte for such a
step in the file of that name and its rank.
"""

from __future__ import annotations

import os
from pathlib import Path

from penstock.cluster.engine.ranks import make_runner
from penstock.cluster.transport.process_ranks import parent_is_gone, read_settings
from penstock.cluster.transport.rank_loop import run_rank


def make_faulty(config, rank, placement, dense):
    runner = make_runner(config, rank, placement, dense)
    launch, finish = runner.launch, runner.finish
    launched = os.environ.get("PENSTOCK_TEST_LAUNCHED")
    runner.is_asynchronous = launched is not None

    def is_planted(plan):
        return rank == 1 and plan.generation == 0

    def faulty_launch(plan, behind=None):
        if is_planted(plan) and plan.step_id == 2 and os.environ.get("PENSTOCK_TEST_FAIL_EARLY"):
            raise RuntimeError("planted before the collectives")
        if launched is not None and behind is not None:
            with Path(f"{launched}.{rank}").open("a") as file:
                file.write(".")
        return launch(plan, behind)

    def faulty_finish(step):
        result = finish(step)
        if is_planted(step.plan) and step.plan.step_id == 4:
            raise RuntimeError("planted after the collectives")
        return result

    runner.launch, runner.finish = faulty_launch, faulty_finish
    return runner


if __name__ == "__main__":
    run_rank(read_settings(), parent_is_gone, make_faulty)
