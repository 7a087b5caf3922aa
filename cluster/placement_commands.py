"""The commands that decide where experts lie: `penstock trace`, `penstock place`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from .config import EngineConfig
from .flags import TraceEngineFlags, given

if TYPE_CHECKING:
    from rich.table import Table

    from ..router.placement import Placement
    from ..router.routing_trace import RoutingTrace

Method = Literal["contiguous", "balanced", "affine"]
HELD_OUT = 5
"""One request in so many is kept from the makers of placements, to measure them on."""


def trace(
    model: str,
    /,
    *,
    data: Path,
    output: Path,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    engine: Annotated[TraceEngineFlags, Parameter(name="*")] = TraceEngineFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Record which experts of MODEL the rows of real requests choose, for `penstock place`.

    Parameters
    ----------
    model
        A directory with config.json and safetensors weights, or a model id on the Hugging Face hub.
    data
        JSONL whose lines have `messages` (a chat) or `prompt` (a text).
    output
        File to write: experts and weights of every row, of prompts and of what was generated.
    max_tokens
        Most tokens generated for a prompt.
    temperature
        Of sampling; 0 is greedy.
    seed
        Of sampling.
    """
    from rich.console import Console
    from rich.progress import Progress

    from ..workers.sampling_params import SamplingParams
    from .client.prompt_file import read_prompts
    from .client.trace_run import trace_routing

    config = EngineConfig.from_mapping({"model": model, **given(engine)})
    sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=max_tokens)
    if not output.absolute().parent.is_dir():
        raise ValueError(f"output: no directory {output.parent}")
    prompts = read_prompts(data)
    console = Console(stderr=True, highlight=False)
    with Progress(console=console) as progress:
        task = progress.add_task("requests", total=len(prompts))
        found = trace_routing(config, prompts, sampling, lambda done: progress.update(task, completed=done))
    found.write(output)
    num_prompt = int(found.is_prompt.sum())
    console.print(
        f"{output}: {len(found.ids)} rows of {len(prompts)} requests, {num_prompt} of prompts and "
        f"{len(found.ids) - num_prompt} generated; {found.num_layers} layers, top {found.ids.shape[2]} of "
        f"{found.num_experts} experts"
    )


def place(
    model: str,
    /,
    *,
    trace: Path,
    num_ranks: int,
    method: Method,
    output: Path,
    num_redundant_experts: int = 0,
    max_load_imbalance: float | None = None,
    revision: str | None = None,
) -> None:
    """Decide from a routing trace which ranks hold which experts of MODEL, and write it to a file.

    `penstock serve` takes the file as its placement, with as many ranks.

    Parameters
    ----------
    model
        A directory with config.json and safetensors weights, or a model id on the Hugging Face hub.
    trace
        What `penstock trace` recorded of this model.
    num_ranks
        Ranks to place experts on.
    method
        contiguous (equal runs, as without a file), balanced (every rank gets the same share of the work) or affine
        (experts that rows choose together lie on one rank, so that rows visit fewer).
    output
        File to write.
    num_redundant_experts
        With balanced: further copies of hot experts, in every layer.
    max_load_imbalance
        With affine: the busiest rank's load over the mean, at most. [default: 1.2]
    revision
        Branch, tag or commit on the hub.
    """
    import torch
    from rich.console import Console

    from ..router.routing_trace import RoutingTrace
    from ..workers.loader import build, inspect
    from .placement_file import PlacementFile, check_model

    if num_redundant_experts and method != "balanced":
        raise ValueError(f"num_redundant_experts: only with balanced, not with {method}")
    if max_load_imbalance is not None and method != "affine":
        raise ValueError(f"max_load_imbalance: only with affine, not with {method}")
    _, model_config = inspect(model, revision)
    recorded = RoutingTrace.read(trace)
    check_model(
        "trace",
        trace,
        build(model_config, torch.float32),
        recorded.model_type,
        recorded.num_experts,
        recorded.num_layers,
    )
    if not 1 <= num_ranks <= recorded.num_experts:
        raise ValueError(f"num_ranks: {num_ranks} is not in [1, {recorded.num_experts}], the model's experts")
    known, held_out = _split(recorded)
    made = _make(method, known, num_ranks, num_redundant_experts, max_load_imbalance)
    PlacementFile.of(made, method, recorded.model_type).write(output)
    console = Console(highlight=False)
    console.print(_table({"contiguous": _make("contiguous", known, num_ranks), method: made}, held_out))
    whose = (
        "requests that the placement was not made from" if held_out is not known else "the requests it was made from"
    )
    console.print(f"{len(held_out.ids)} rows of {whose}; written to {output}")


def _split(recorded: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """Return the rows to place by and those to measure on: other requests', or the same where there are few."""
    is_held_out = recorded.requests % HELD_OUT == HELD_OUT - 1
    if not is_held_out.any() or is_held_out.all():
        return recorded, recorded
    return recorded.select(~is_held_out), recorded.select(is_held_out)


def _make(
    method: Method,
    recorded: RoutingTrace,
    num_ranks: int,
    num_redundant_experts: int = 0,
    max_load_imbalance: float | None = None,
) -> Placement:
    from ..router.affine import MAX_LOAD_IMBALANCE, affine
    from ..router.balanced import balanced
    from ..router.placement import contiguous
    from ..router.rank_visits import expert_loads

    num_experts = recorded.num_experts
    if method == "contiguous":
        return contiguous(recorded.num_layers, num_experts, num_ranks)
    if method == "balanced":
        return balanced(expert_loads(recorded.ids, num_experts), num_ranks, num_redundant_experts)
    limit = MAX_LOAD_IMBALANCE if max_load_imbalance is None else max_load_imbalance
    return affine(recorded.ids, num_experts, num_ranks, limit)


def _table(placements: dict[str, Placement], recorded: RoutingTrace) -> Table:
    """Return what placements make of recorded rows, a line each."""
    from rich.table import Table

    from ..router.rank_visits import load_imbalance, ranks_visited

    table = Table("placement", box=None, pad_edge=False)
    for heading in ("other ranks visited, a row and layer", "busiest rank's load over the mean", "worst layer"):
        table.add_column(heading, justify="right")
    for name, placement in placements.items():
        visited, imbalance = ranks_visited(placement, recorded.ids), load_imbalance(placement, recorded.ids)
        table.add_row(name, f"{visited.mean():.3f}", f"{imbalance.mean():.2f}", f"{imbalance.max():.2f}")
    return table
