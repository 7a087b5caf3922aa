"""The placement file: which ranks hold which experts of a model, as JSON that a person can read and edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..router.balanced import balanced
from ..router.placement import Placement, check_num_ranks, contiguous
from ..workers.loader import EmptyModel, build, inspect, resolve_dtype
from ..workers.model_config import num_experts_of
from .config import EngineConfig


class PlacementFile(BaseModel):
    """What the file says. ``layers`` [L][R]: the experts that each rank holds, per MoE layer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    version: Literal[1]
    method: str
    model_type: str
    num_experts: int = Field(ge=1)
    num_ranks: int = Field(ge=1)
    layers: list[list[list[int]]] = Field(min_length=1)

    @classmethod
    def of(cls, placement: Placement, method: str, model_type: str) -> PlacementFile:
        """Return the file of ``placement``."""
        ranks = range(placement.num_ranks)
        layers = [[placement.experts_of(layer, rank) for rank in ranks] for layer in range(placement.num_layers)]
        return cls(
            version=1,
            method=method,
            model_type=model_type,
            num_experts=placement.num_experts,
            num_ranks=placement.num_ranks,
            layers=layers,
        )

    @classmethod
    def read(cls, path: Path) -> PlacementFile:
        """Return what ``path`` says; raise ``ValueError`` naming ``placement`` if it cannot be read as such a file."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ValueError(
                f"placement: cannot read {path}: {error.strerror}; `penstock place` writes such a file"
            ) from error
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"placement: {path}: {f'{where}: ' if where else ''}{first['msg']}") from error

    def write(self, path: Path) -> None:
        """Write the file, a line for each layer; raise ``ValueError`` naming ``output`` if that cannot be."""
        head = self.model_dump(exclude={"layers"})
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        layers = ",\n".join(f"    {json.dumps(layer)}" for layer in self.layers)
        try:
            path.write_text("\n".join(["{", *lines, '  "layers": [', layers, "  ]", "}", ""]), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"output: cannot write {path}: {error.strerror}") from error

    def placement(self) -> Placement:
        """Return the placement; raise ``ValueError`` for an expert or a rank that is missing or does not exist."""
        holders = tuple(self._holders(number, ranks) for number, ranks in enumerate(self.layers))
        return Placement(self.num_experts, self.num_ranks, holders)

    def _holders(self, layer: int, ranks: list[list[int]]) -> tuple[tuple[int, ...], ...]:
        last = self.num_ranks - 1
        if len(ranks) > self.num_ranks:
            raise ValueError(f"layer {layer} names rank {self.num_ranks}, which does not exist: ranks are 0 to {last}")
        if len(ranks) < self.num_ranks:
            raise ValueError(f"layer {layer} says nothing of rank {len(ranks)}; num_ranks is {self.num_ranks}")
        holders: list[list[int]] = [[] for _ in range(self.num_experts)]
        for rank, experts in enumerate(ranks):
            if not experts:
                raise ValueError(f"layer {layer} gives rank {rank} no expert; every rank must hold one")
            for expert in experts:
                if not 0 <= expert < self.num_experts:
                    raise ValueError(
                        f"layer {layer} gives rank {rank} expert {expert}, which is not in [0, {self.num_experts - 1}]"
                    )
                if rank in holders[expert]:
                    raise ValueError(f"layer {layer} gives rank {rank} expert {expert} twice")
                holders[expert].append(rank)
        for expert, held in enumerate(holders):
            if not held:
                raise ValueError(f"layer {layer} gives expert {expert} to no rank; every expert must be held")
        return tuple(tuple(held) for held in holders)


def placement_of(config: EngineConfig) -> Placement | None:
    """Return the placement that ``config`` names, None if it names none and experts stay where they are.

    Raises ``ValueError`` naming ``placement`` for a file that cannot be read or does not fit model and ranks, or
    ``num_redundant_experts`` for more copies than ranks have places for.
    """
    if config.placement is None:
        return _to_begin_with(config) if config.enable_eplb else None
    path = Path(config.placement).expanduser()
    file = PlacementFile.read(path)
    if file.num_ranks != config.expert_parallel_size:
        raise ValueError(
            f"placement: {path} is for {file.num_ranks} ranks, but expert_parallel_size is "
            f"{config.expert_parallel_size}; set that to {file.num_ranks}, or make a file with `penstock place "
            f"--num-ranks {config.expert_parallel_size}`"
        )
    _, model_config = inspect(config.model, config.revision)
    check_model(
        "placement", path, build(model_config, torch.float32), file.model_type, file.num_experts, len(file.layers)
    )
    try:
        return file.placement()
    except ValueError as error:
        raise ValueError(f"placement: {path}: {error}; mend it, or make one with `penstock place`") from error


def check_ranks(config: EngineConfig) -> None:
    """Raise ``ValueError`` naming the field for a model that cannot be, or for more ranks than it has experts."""
    _, model_config = inspect(config.model, config.revision, config.max_model_len)
    check_num_ranks(num_experts_of(model_config.get_text_config()), config.expert_parallel_size)
    build(model_config, resolve_dtype(model_config, config.dtype))


def _to_begin_with(config: EngineConfig) -> Placement:
    """Return what is served until it is known which experts are hot."""
    _, model_config = inspect(config.model, config.revision)
    model = build(model_config, torch.float32)
    num_layers, num_ranks = len(model.expert_modules), config.expert_parallel_size
    if not config.num_redundant_experts:
        return contiguous(num_layers, model.num_experts, num_ranks)
    return balanced(np.ones((num_layers, model.num_experts)), num_ranks, config.num_redundant_experts)


def check_model(field: str, path: Path, model: EmptyModel, model_type: str, num_experts: int, num_layers: int) -> None:
    """Raise ``ValueError`` naming ``field`` unless what ``path`` was made for is ``model``."""
    own_type, own_layers = model.config.model_type, len(model.expert_modules)
    if model_type != own_type:
        problem = f"is for model type {model_type}, this model is of type {own_type}"
    elif num_experts != model.num_experts:
        problem = f"is for {num_experts} experts, this model has {model.num_experts}"
    elif num_layers != own_layers:
        problem = f"is for {num_layers} MoE layers, this model has {own_layers}"
    else:
        return
    raise ValueError(f"{field}: {path} {problem}; make one for this model")
