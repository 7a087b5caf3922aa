"""A rank that computes with Triton's kernels, interpreted: the program that `test_static_kernels` starts."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from penstock.cluster.transport.process_ranks import parent_is_gone, read_settings
from penstock.cluster.transport.rank_loop import run_rank
from penstock.kernels.device import triton_on

if __name__ == "__main__":
    with triton_on("cpu"):
        run_rank(read_settings(), parent_is_gone)
