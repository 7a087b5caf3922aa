"""A routing trace: which experts real rows chose, in a safetensors file.

Shapes: N rows, L MoE layers, K experts per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "penstock routing trace 1"
_DTYPES = {"ids": "int16", "weights": "float16", "requests": "int32", "positions": "int32", "is_prompt": "bool"}


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """What the routers of one model chose, row by row; rows are ordered by request and position."""

    model_type: str
    num_experts: int
    ids: np.ndarray
    """[N, L, K] int16: chosen experts."""
    weights: np.ndarray
    """[N, L, K] float16: their weights in the row's sum, as the model's router scaled them."""
    requests: np.ndarray
    """[N] int32: number of the request that a row is of."""
    positions: np.ndarray
    """[N] int32: place of the row's token in its request's text."""
    is_prompt: np.ndarray
    """[N] bool: whether that token is of the prompt; the others were generated."""

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return self.ids.shape[1]

    def select(self, rows: np.ndarray) -> RoutingTrace:
        """Return a trace of some rows: a mask [N], or numbers of rows."""
        return replace(self, **{name: getattr(self, name)[rows] for name in _DTYPES})

    def write(self, path: Path) -> None:
        """Write the trace to ``path``; raise ``ValueError`` naming ``output`` if that cannot be."""
        tensors = {name: np.ascontiguousarray(getattr(self, name), dtype) for name, dtype in _DTYPES.items()}
        metadata = {"format": FORMAT, "model_type": self.model_type, "num_experts": str(self.num_experts)}
        try:
            save_file(tensors, path, metadata)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"output: cannot write {path}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> RoutingTrace:
        """Return the trace in ``path``; raise ``ValueError`` naming ``trace`` if there is none."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"trace: {path} is not a {FORMAT!r}; `penstock trace` writes one")
                found = set(file.keys())
                if missing := sorted(_DTYPES.keys() - found):
                    raise ValueError(f"trace: {path} lacks {', '.join(missing)}")
                tensors = {name: file.get_tensor(name) for name in _DTYPES}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"trace: cannot read {path}: {error}") from error
        try:
            trace = cls(metadata["model_type"], int(metadata["num_experts"]), **tensors)
        except (KeyError, ValueError) as error:
            raise ValueError(f"trace: {path} does not name its model_type and num_experts") from error
        trace._check(path)
        return trace

    def _check(self, path: Path) -> None:
        for name, dtype in _DTYPES.items():
            if (found := getattr(self, name).dtype) != dtype:
                raise ValueError(f"trace: {name} of {path} are {found}, expected {dtype}")
        if self.ids.ndim != 3 or not self.ids.size:
            raise ValueError(f"trace: ids of {path} have shape {list(self.ids.shape)}, expected [rows, layers, top_k]")
        shapes = {
            "weights": self.ids.shape,
            **dict.fromkeys(("requests", "positions", "is_prompt"), self.ids.shape[:1]),
        }
        for name, shape in shapes.items():
            if (found_shape := getattr(self, name).shape) != shape:
                raise ValueError(f"trace: {name} of {path} have shape {list(found_shape)}, expected {list(shape)}")
        low, high = int(self.ids.min()), int(self.ids.max())
        if low < 0 or high >= self.num_experts:
            wrong = low if low < 0 else high
            raise ValueError(f"trace: ids of {path} name expert {wrong}, which is not in [0, {self.num_experts})")
