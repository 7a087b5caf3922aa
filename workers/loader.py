"""Build a transformers model that holds one rank's experts, reading no other expert's bytes.

In two steps: the dense part, which every rank has, and a rank's experts. A process that does not know yet which rank it
will be takes the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..router.placement import Placement
from .architectures import ROUTER_CLASS, check_supported
from .attention import ATTENTION
from .checkpoint import CheckpointReader, resolve
from .config_file import check_sizes, load_config, one_line
from .expert_parallel import EXPERTS
from .gpu_experts import objection
from .model_config import eos_token_ids, longest_context
from .quantization import Weights, check_quantization, is_quantized, open_weights
from .stored_experts import ExpertTensor, await_values, choose_storage, kept_storage, scales_awaited

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

Objection = Callable[[torch.nn.Module, torch.device], str]
"""Why an experts module would not run as our kernels on a device; nothing if it would."""
_EXPERT_KEY = re.compile(r"^(?P<head>.*\.experts\.)(?P<number>\d+)(?P<tail>\..*)$")


@dataclass(frozen=True, slots=True)
class EmptyModel:
    """A model without storage, its experts modules still whole."""

    model: PreTrainedModel
    config: PreTrainedConfig
    dtype: torch.dtype
    expert_modules: list[torch.nn.Module]
    """The experts modules in layer order."""
    routers: list[torch.nn.Module]
    """The routers of ``expert_modules``."""

    @property
    def num_experts(self) -> int:
        """Experts of a MoE layer."""
        return int(self.expert_modules[0].num_experts)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A model that has all but its experts, whose modules are whole and without storage."""

    empty: EmptyModel
    device: torch.device
    found: Any
    """What is missing or does not fit, as transformers tells it; all experts are missing yet."""
    bytes_read: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """One rank's model and what loading it took."""

    model: PreTrainedModel
    config: PreTrainedConfig
    expert_modules: list[torch.nn.Module]
    """The experts modules in layer order, each holding this rank's experts only."""
    routers: list[torch.nn.Module]
    """The routers of ``expert_modules``."""
    bytes_read: int
    checkpoint_bytes: int
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer."""


def inspect(model: str, revision: str | None = None, max_model_len: int | None = None) -> tuple[Path, PreTrainedConfig]:
    """Return the directory and configuration of ``model``; raise ``ValueError`` if it cannot be served.

    That is so too if its contexts are shorter than ``max_model_len``. Reads the headers of the weight files, so that
    what is missing or cut short is known before anything starts.
    """
    directory = resolve(model, revision)
    config = load_config(directory)
    check_supported(config.model_type)
    check_quantization(config)
    check_sizes(directory, config.get_text_config())
    if max_model_len is not None:
        longest_context(config.get_text_config(), max_model_len)
    with CheckpointReader(directory) as reader:
        open_weights(reader, config, torch.float32)
    return directory, config


def resolve_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """Return the type to compute in; ``auto`` takes the checkpoint's, bfloat16 where a quantised one names none."""
    chosen = getattr(torch, dtype) if dtype != "auto" else config.dtype
    if isinstance(chosen, str):
        chosen = getattr(torch, chosen)
    if chosen is None:
        return torch.bfloat16 if is_quantized(config) else torch.float32
    if chosen not in (torch.bfloat16, torch.float32):
        raise ValueError(f"dtype: the checkpoint's {chosen} is not supported; choose bfloat16 or float32")
    return chosen


def build(config: PreTrainedConfig, dtype: torch.dtype) -> EmptyModel:
    """Build the model of ``config`` without storage; raise ``ValueError`` naming ``model`` if that cannot be."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, experts_implementation=EXPERTS
            )
    except Exception as error:  # its code trusts its numbers and names, and raises whatever they lead to
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"model: what config.json says makes no {config.model_type} model: {reason}") from error
    return EmptyModel(model, config, dtype, *_moe_modules(model))


def load(
    directory: Path,
    empty: EmptyModel,
    device: torch.device,
    placement: Placement,
    rank: int,
    *,
    objection: Objection = objection,
) -> LoadedModel:
    """Load ``rank``'s shard of the checkpoint in ``directory`` into ``empty``, which is used up.

    The experts modules are cut to the owned experts, and transformers' own converter fed with lazy slices of just
    those. Raises ``ValueError`` naming ``model`` for missing, unknown or misshapen tensors.
    """
    return load_experts(directory, load_dense(directory, empty, device, objection=objection), placement, rank)


def load_dense(
    directory: Path, empty: EmptyModel, device: torch.device, *, objection: Objection = objection
) -> DenseModel:
    """Load all but the experts into ``empty``, which is used up. What does not fit is left to `load_experts` to say.

    Layers of quantised experts to which there is no ``objection`` are to stay as stored (`stored_experts`).
    """
    with _opened(directory, empty) as source:
        layers: list[list[Any]] = [[] for _ in empty.expert_modules]
        for key, target in source.targets.items():
            if target is not None:
                layers[target.layer].append((target, source.weights.format_of(key)))
        for module, tensors in zip(empty.expert_modules, layers, strict=True):
            if not objection(module, device):
                choose_storage(module, tensors)
        dense = {key: source.weights.lazy(key) for key, target in source.targets.items() if target is None}
        return DenseModel(empty, device, source.convert(dense, device), source.reader.bytes_read)


def load_experts(directory: Path, dense: DenseModel, placement: Placement, rank: int) -> LoadedModel:
    """Load ``rank``'s experts into ``dense``, which is used up; see `load`."""
    empty, model = dense.empty, dense.empty.model
    owned = [placement.experts_of(layer, rank) for layer in range(placement.num_layers)]
    is_kept = [kept_storage(module) is not None for module in empty.expert_modules]
    kept = [module for module, stays in zip(empty.expert_modules, is_kept, strict=True) if stays]
    with _opened(directory, empty) as source:
        weights = source.weights
        for module, numbers in zip(empty.expert_modules, owned, strict=True):
            _shrink(module, placement.num_experts, len(numbers))
        for module in kept:
            await_values(module)

        def values(key: str, layer: int, experts: Sequence[int] | None) -> Any:
            if is_kept[layer] and weights.format_of(key) is not None:
                return weights.stored(key, experts).values
            return weights.lazy(key, experts)

        def scales(key: str, layer: int, experts: Sequence[int] | None) -> Any:
            if is_kept[layer] and weights.format_of(key) is not None:
                return weights.stored(key, experts).scales
            return None

        info = source.convert(_owned(source.targets, owned, values), dense.device)
        if kept:
            with scales_awaited(kept):
                _add(info, source.convert(_owned(source.targets, owned, scales), dense.device))
        bytes_read, total = dense.bytes_read + source.reader.bytes_read, source.reader.total_bytes
    _add(info, dense.found)
    model.mark_tied_weights_as_initialized(info)
    missing = info.missing_keys - set(model.all_tied_weights_keys)
    model._adjust_missing_and_unexpected_keys(info)
    _check(directory, missing, info)
    model._move_missing_keys_from_meta_to_device(info.missing_keys, {"": dense.device}, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model.eval()
    model.requires_grad_(False)
    ends = eos_token_ids(directory, empty.config.get_text_config())
    return LoadedModel(model, empty.config, empty.expert_modules, empty.routers, bytes_read, total, ends)


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint that is open, and where its tensors go."""

    directory: Path
    empty: EmptyModel
    reader: CheckpointReader
    weights: Weights
    mapping: list[Any]
    """transformers' renamings and converters."""
    targets: dict[str, ExpertTensor | None]
    """By name in the checkpoint; None for a tensor that belongs to no layer of experts."""

    def convert(self, tensors: dict[str, Any], device: torch.device) -> Any:
        """Load lazy ``tensors`` by name in the checkpoint; return what transformers found of it."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils.logging import disable_progress_bar

        # Every rank would print one; whoever started the ranks shows their progress
        disable_progress_bar()
        model, dtype = self.empty.model, self.empty.dtype
        settings = LoadStateDictConfig(
            weight_mapping=self.mapping,
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": device},
        )
        try:
            found, _ = convert_and_load_state_dict_in_model(model, tensors, settings)
        except Exception as error:  # the converter raises what safetensors and its operations raise
            raise ValueError(f"model: the weights in {self.directory} cannot be loaded: {error}") from error
        return found


@contextmanager
def _opened(directory: Path, empty: EmptyModel) -> Iterator[_Source]:
    """Open the checkpoint of ``empty``, whose experts modules have the names of their parameters."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    with CheckpointReader(directory) as reader:
        mapping = get_model_conversion_mapping(empty.model)
        weights = open_weights(reader, empty.config, empty.dtype)
        yield _Source(directory, empty, reader, weights, mapping, _targets(weights, empty, mapping))


def _add(info: Any, other: Any) -> None:
    """Make ``info`` that of both loadings: missing is what neither found."""
    info.missing_keys &= other.missing_keys
    info.unexpected_keys |= other.unexpected_keys
    info.mismatched_keys |= other.mismatched_keys
    info.conversion_errors.update(other.conversion_errors)
    info.error_msgs.extend(other.error_msgs)


def _moe_modules(model: torch.nn.Module) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """Return the experts modules and their routers, in layer order."""
    experts, routers = [], []
    for block in model.modules():
        children = list(block.children())
        mine = [child for child in children if _is_experts(child)]
        if not mine:
            continue
        theirs = [child for child in children if ROUTER_CLASS.search(type(child).__name__)]
        if len(mine) != 1 or len(theirs) != 1:
            raise ValueError(f"model: {type(block).__name__} has {len(mine)} experts and {len(theirs)} routers")
        experts += mine
        routers += theirs
    if not experts:
        raise ValueError("model: it has no layer of experts behind transformers' experts interface")
    return experts, routers


def _is_experts(module: torch.nn.Module) -> bool:
    # What transformers' decorator for experts classes sets, in all versions we support
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _shrink(module: torch.nn.Module, num_experts: int, num_local: int) -> None:
    """Cut every per-expert parameter of ``module`` to ``num_local`` experts; it has no storage yet."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] == num_experts:
            cut = torch.empty(num_local, *parameter.shape[1:], dtype=parameter.dtype, device="meta")
            setattr(module, name, torch.nn.Parameter(cut, requires_grad=False))
    module.num_experts = num_local  # type: ignore[assignment]


def _targets(weights: Weights, empty: EmptyModel, mapping: list[Any]) -> dict[str, ExpertTensor | None]:
    """Return for each tensor what it is to a layer of experts."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    num_experts = empty.num_experts
    layers = {id(module): layer for layer, module in enumerate(empty.expert_modules)}
    place_of = {
        f"{path}.{name}": (layers[id(module)], name)
        for path, module in empty.model.named_modules()
        if id(module) in layers
        for name, _ in module.named_parameters(recurse=False)
    }
    parameters = empty.model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    operations = {
        pattern: tuple(type(operation).__name__ for operation in converter.operations)
        for converter in converters
        for pattern in converter.source_patterns
    }

    def target_named(key: str) -> ExpertTensor | None:
        name, pattern = rename_source_key(key, renamings, converters, empty.model.base_model_prefix, parameters)
        return ExpertTensor(*place_of[name], operations.get(pattern or "", ())) if name in place_of else None

    targets: dict[str, ExpertTensor | None] = {}
    of_first: dict[tuple[str, str], ExpertTensor | None] = {}
    for key in weights.keys():  # noqa: SIM118 - no mapping
        numbered = _EXPERT_KEY.match(key)
        if numbered:
            if int(numbered["number"]) >= num_experts:
                raise ValueError(f"model: the weights hold {key}, but config.json names {num_experts} experts")
            alike = numbered["head"], numbered["tail"]
            if alike not in of_first:
                of_first[alike] = target_named(key)
            targets[key] = of_first[alike]  # None: of a layer that the model does not have
        else:
            targets[key] = target_named(key) if weights.shape(key)[:1] == [num_experts] else None
    return targets


def _owned(
    targets: dict[str, ExpertTensor | None],
    owned: list[list[int]],
    read: Callable[[str, int, Sequence[int] | None], Any],
) -> dict[str, Any]:
    """Return each layer's owned experts, renumbered or sliced, as ``read`` (name, layer, rows) gives them."""
    local = [{expert: number for number, expert in enumerate(numbers)} for numbers in owned]
    tensors: dict[str, Any] = {}
    for key, target in targets.items():
        if target is None:
            continue
        name, experts = key, None
        if not (numbered := _EXPERT_KEY.match(key)):
            experts = owned[target.layer]
        elif (number := local[target.layer].get(int(numbered["number"]))) is not None:
            name = f"{numbered['head']}{number}{numbered['tail']}"
        else:
            continue
        tensor = read(key, target.layer, experts)
        if tensor is not None:
            tensors[name] = tensor
    return tensors


def _check(directory: Path, missing: set[str], info: Any) -> None:
    problems = []
    if missing:
        problems.append(f"{len(missing)} tensors are missing, first {min(missing)}")
    if info.mismatched_keys:
        problems.append(
            f"{len(info.mismatched_keys)} have another shape, first {sorted(map(str, info.mismatched_keys))[0]}"
        )
    if info.unexpected_keys:
        problems.append(f"{len(info.unexpected_keys)} are unknown, first {min(info.unexpected_keys)}")
    if info.conversion_errors:
        problems.append(f"{len(info.conversion_errors)} cannot be converted, first {min(info.conversion_errors)}")
    if info.error_msgs:
        problems.append(str(info.error_msgs[0]))
    if problems:
        raise ValueError(f"model: the weights in {directory} do not fit config.json: {'; '.join(problems)}")
