"""Attention over the pool's blocks compiles for a GPU that is not there, and stays within what it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this system")


def run(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: torch there is told that it has a GPU
    return subprocess.run(
        [sys.executable, "-m", "penstock.benchmarks.attention_limits", *arguments],
        env={**os.environ, "TRITON_INTERPRET": interpret}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch asks a GPU's driver")
def test_it_compiles_for_hopper_without_spills(tmp_path: Path) -> None:
    file = tmp_path / "limits.json"
    done = run("--quick", "--check", "--json", str(file), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    assert document["environment"]["gpu"] is None
    rows = document["rows"]
    kernels = {model: [row["kernel"] for row in rows if row["model"] == model] for model in {r["model"] for r in rows}}
    # Decoding puts parts of a context together afterwards; a group of seven heads is not decoded so
    assert {model: len(names) for model, names in kernels.items()} == {
        "gpt-oss-120b": 3,
        "Qwen2-57B-A14B": 1,
        "heads of 256": 3,
    }
    assert any("sigmoid" in name for name in kernels["gpt-oss-120b"])
    # Nothing else is launched: the pool is not copied for it
    assert all("flex_attention" in name for names in kernels.values() for name in names)
    for row in rows:
        assert row["spilled_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 99 << 10


def test_what_is_interpreted_is_not_said_to_compile() -> None:
    done = run("--quick", interpret="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
