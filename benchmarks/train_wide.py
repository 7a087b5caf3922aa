"""Train a model of many experts for counts of its routing: `python -m penstock.benchmarks.train_wide`.

The demo model's recipe, data and number of parameters, but 128 experts a layer of which a token uses eight, and one
process. It is trained for a fraction of the demo model's time, by steps, so that a seed gives the same model again on
the same machine; `benchmarks/budget_traffic` counts with it what needs more ranks than the demo model has experts for.
Nothing of it is committed but those counts. An interrupted run continues.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import cyclopts

from ..demo.corpus import load
from ..demo.export import write_model
from ..demo.net import CONFIG
from ..demo.train import FOLDER, Budget, run

NUM_EXPERTS = 128
TOP_K = 8
INTERMEDIATE_SIZE = 16
STEPS = 1500
ROWS = 6
"""Rows of 256 tokens in a step."""
WIDE_FOLDER = FOLDER / "wide"
MODEL = WIDE_FOLDER / "model"
_REPORT_S = 60.0

app = cyclopts.App(help=__doc__)


@app.default
def train(*, steps: int = STEPS, seed: int = 0, folder: Path = WIDE_FOLDER) -> None:
    """Train for ``steps`` steps and write the model to ``folder``/model."""
    config = copy.deepcopy(CONFIG)
    config.num_experts, config.num_experts_per_tok = NUM_EXPERTS, TOP_K
    config.moe_intermediate_size = INTERMEDIATE_SIZE
    load(folder, seed)
    (folder / "rendezvous").unlink(missing_ok=True)
    run(0, Budget(steps, None, seed, num_ranks=1, rows_per_rank=ROWS), folder, _REPORT_S, config)
    write_model(folder, folder / "model", config)


if __name__ == "__main__":
    sys.exit(app())
