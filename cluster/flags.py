"""Command-line flags made from the dataclasses they fill, so that neither can say what the other does not."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, asdict, field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

from cyclopts import Parameter
from docstring_parser import parse_from_object

from ..workers.sampling_params import SamplingParams
from .config import EngineConfig


def _flags(
    name: str,
    source: type,
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
    group: str = "Parameters",
) -> type:
    """Return a dataclass with ``source``'s optional fields, all None: what is not given has no say.

    ``only``: these fields, all when empty.
    """
    docs = {entry.arg_name: entry.description or "" for entry in parse_from_object(source).params}
    hints = get_type_hints(source)
    flags = []
    for spec in fields(source):
        if spec.default is MISSING or spec.name in without or (only and spec.name not in only):
            continue
        default = "" if spec.default in (None, ()) else f" [default: {spec.default}]"
        hint: Any = hints[spec.name] | None
        # A switch that is on needs a flag that turns it off
        negative = None if spec.default is True else ()
        shown = Parameter(help=docs[spec.name] + default, negative=negative, show_default=False, group=group)
        flags.append((spec.name, Annotated[hint, shown], field(default=None)))
    made = make_dataclass(name, flags, kw_only=True)
    made.__module__ = __name__  # cyclopts takes classes of the module `types` for built-in ones
    return made


_LAUNCH = (
    *("cpus_per_rank", "placement_group_strategy", "num_replicas", "min_replicas", "max_replicas"),
    *("target_ongoing_requests", "upscale_delay_s", "downscale_delay_s", "drain_timeout_s"),
)
"""What only Ray acts on."""

EngineFlags = _flags("EngineFlags", EngineConfig)
LocalEngineFlags = _flags(
    "LocalEngineFlags",
    EngineConfig,
    without=("served_model_name", "api_key", "max_body_bytes", *_LAUNCH),  # nobody else asks, and there is no Ray
    group="Engine, with --local",
)
CalibrationFlags = _flags(
    "CalibrationFlags",
    EngineConfig,
    without=(
        *("served_model_name", "api_key", "max_body_bytes", "max_queued_requests", "request_timeout_s", *_LAUNCH),
        *("num_spares", "recovery_timeout_s", "enable_eplb", "num_redundant_experts"),
        *("eplb_window_size", "eplb_step_interval", "eplb_bytes_per_step", "eplb_timeout_s"),
        # what the command itself decides
        *("async_scheduling", "speculation", "draft_len", "max_draft_len", "expert_budget"),
        *("budget_profile", "max_quality_loss", "max_perplexity_increase", "allow_uncalibrated"),
    ),
    group="Engine: as it will be served",
)
TraceEngineFlags = _flags(
    "TraceEngineFlags",
    EngineConfig,
    only=(
        *("tokenizer", "revision", "dtype", "device", "num_threads", "max_model_len", "max_num_seqs"),
        *("max_num_batched_tokens", "block_size", "kv_cache_bytes", "gpu_memory_utilization", "enforce_eager"),
    ),
    group="Engine",
)
SamplingFlags = _flags(
    "SamplingFlags",
    SamplingParams,
    # what one text on a terminal does not show, and what is for programs
    without=(
        *("n", "choice", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids"),
        *("include_stop_str_in_output", "skip_special_tokens"),
    ),
    group="Sampling",
)


def given(flags: Any) -> dict[str, Any]:
    """Return the fields that have a value."""
    return {name: value for name, value in asdict(flags).items() if value is not None}
