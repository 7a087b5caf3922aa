"""The demo model with a real model's experts (bfloat16, 6.3 MB each), loaded on one thread to time its steps."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..cluster.config import EngineConfig
from ..cluster.engine.ranks import make_runner
from ..demo.inflate import inflate
from ..workers.runner import ModelRunner
from .decode import DEMO, FACTOR


def inflated_runner() -> tuple[EngineConfig, ModelRunner]:
    """Write the checkpoint, load it as one rank, remove it; return the rank and its configuration."""
    with tempfile.TemporaryDirectory() as folder:
        inflate(DEMO, Path(folder) / "model", FACTOR)
        config = EngineConfig(
            model=str(Path(folder) / "model"),
            dtype="bfloat16",
            device="cpu",
            num_threads=1,
            max_model_len=1024,
            kv_cache_bytes=128 << 20,
        )
        return config, make_runner(config, 0)
