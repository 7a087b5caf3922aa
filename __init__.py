"""Penstock: expert-parallel serving of Mixture-of-Experts language models, built around speculation that pays.

The public names load on first use, so that importing the package costs neither torch nor Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster.client.connect import connect
    from .cluster.client.llm import LLM, Completion
    from .cluster.config import EngineConfig
    from .cluster.serving.app import build_app
    from .workers.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "EngineConfig", "SamplingParams", "__version__", "build_app", "connect"]

_HOMES = {
    "LLM": ".cluster.client.llm",
    "Completion": ".cluster.client.llm",
    "EngineConfig": ".cluster.config",
    "SamplingParams": ".workers.sampling_params",
    "build_app": ".cluster.serving.app",
    "connect": ".cluster.client.connect",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
