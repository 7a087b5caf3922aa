"""Kernels compile for GPUs that are not there, and stay within what those have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")


def run(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: this one's kernels are defined for the interpreter
    return subprocess.run(
        [sys.executable, "-m", "penstock.benchmarks.kernel_limits", *arguments],
        env={**os.environ, "TRITON_INTERPRET": interpret}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_kernels_compile_without_spills_for_three_architectures(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    done = run("--quick", "--check", "--json", str(file), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    for row in rows:
        assert row["spilled_bytes"] == 0
        assert 0 < row["registers"] <= 224
        assert row["programs"] >= 2
        assert row["shared_bytes"] <= 96 << 10
    kernels = {row["kernel"] for row in rows if row["architecture"] == "sm_90"}
    assert kernels >= {
        "group_pairs",
        "product",
        "combine",
        "route",
        "pack",
        "unpack",
        "add",
        "count_loads",
        "best_of_part",
        "walk",
        "move",
    }


def test_interpreted_kernels_are_not_said_to_compile() -> None:
    done = run("--quick", interpret="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
