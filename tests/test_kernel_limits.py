"""Triton's kernels compiled for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_compile_within_the_limits_of_three_architectures(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "penstock.benchmarks.kernel_limits", "--quick", "--check", "--json", str(report)]
    done = subprocess.run(
        command,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(report.read_text())["rows"]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    kernels = {"group_pairs", "product", "combine", "route", "pack", "add", "best_of_part", "best_of_all", "walk"}
    assert {row["kernel"] for row in rows if row["architecture"] == "sm_90"} == kernels
