"""Whole models decoding on one GPU: beside transformers' `generate`, beside the memory, and rows beside one row.

`python -m penstock.benchmarks.gpu_decode` needs a CUDA device, torch, Triton and transformers, and nothing else. Models
have published shapes and random weights (`model_shapes`, `random_model`), in bfloat16; the inflated demo has real text.
One model after the other; ``--model`` takes one, ``--batches`` some, so that a run fits the time there is. Each row is
kept when it is found (``--json``), and with ``--budget-s`` no batch begins when time is over.

``decode``: requests served whole, greedily, each of ``--context`` prompt tokens; a step is the time from one token to
the next, in steps of the whole batch. transformers' is `generate` with its static cache and its compiler, over the very
same weights, in turns with ours once more (``penstock_over_it``); its step is likewise from logits to logits. It comes
last, since it compiles for minutes. ``step``: the rank's step with fixed
plans, ``draft_len`` + 1 rows of each request, since random weights accept no drafts; with and without graphs, and under
budgets of a share of the distinct experts that the rows read without one. ``demo``: tokens per second of whole
requests, prompts included. Medians by CUDA events; what runs first, captures and compiles is left out.

The roofline is the fewest bytes that a step must read (`step_bytes`) at the rate of a copy on this GPU. ``device_ms``
is the step's graph replayed back to back, with no host between; ``host_share`` is what the step takes beyond it.
``--profile FILE`` writes torch's profiler's table of steps of one row. ``--list`` says what each model needs of a GPU's
memory, by the function that leaves models out (`model_needs`), and takes no GPU.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from .. import demo
from . import model_needs, time_budget
from .harness import Measurement, Options, Row, Target, run
from .inflated_decode import NAME as INFLATED
from .inflated_decode import InflatedDemo
from .model_needs import needs_of
from .model_shapes import SHAPES
from .random_model import SKEWS
from .replayed_time import copy_rate
from .time_budget import TimeBudget
from .whole_model import SHARES, Bench, WholeModel

QUICK_MODEL = "OLMoE-1B-7B"
LEAST_SHARE, AIM_SHARE = 0.35, 0.60
LEAST_OVER_PEER = 3.0
MOST_HOST = 0.05
MOST_OVER_BYTES = 1.2
LEAST_SAVED = 0.4
ROWS = 8
_DEMO = Path(demo.__file__).parent / "model"
_BATCHES = (1, 2, 4, 8, 16, 32)


def measure(options: Options) -> Measurement:
    """Measure the models that were asked for, one after the other."""
    if options.given.list:
        dtype = str(model_needs.DTYPE).removeprefix("torch.")
        return Measurement(list(model_needs.rows(_DEMO, max(_BATCHES))), [], dtype, 1)
    device = torch.device("cuda")
    bench = bench_of(options, device, copy_rate(device))
    named = options.given.model or (QUICK_MODEL if options.quick else None)
    rows: list[Row] = []
    tables: list[str] = []

    def measured() -> Measurement:
        found = [*rows, *growth(rows)]
        return Measurement(found, targets(found), str(bench.dtype).removeprefix("torch."), 1, bench.budget.left_out)

    def has_room(name: str) -> bool:
        reason = needs_of(name, _DEMO).objection(torch.cuda.mem_get_info(device)[0])
        if reason is not None:
            print(f"{name}: {reason}", file=sys.stderr)
        return reason is None

    def take(found: Iterable[Row]) -> None:
        for row in found:
            rows.append(row)
            print(row, file=sys.stderr)
            options.keep(measured())

    for shape in SHAPES:
        if named not in (None, shape.name):
            continue
        if not has_room(shape.name) or not bench.budget.allows(shape.name):
            continue
        model = WholeModel(shape, bench)
        take(model.rows())
        if options.given.profile and bench.budget.allows(f"{shape.name}, profile"):
            row, table = model.profile()
            take([row])
            tables.append(f"{shape.name}\n{table}")
            options.given.profile.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
        take(model.peer_rows())
        del model
        _let_go()
    if named in (None, INFLATED) and has_room(INFLATED) and bench.budget.allows(INFLATED):
        take(InflatedDemo(_DEMO, bench).rows())
    return measured()


def bench_of(options: Options, device: torch.device, copy_gb_per_s: float) -> Bench:
    """Return how to measure, as the options say."""
    given = options.given
    batches, draft_lens = ((1, 8), (0, 7)) if options.quick else (_BATCHES, (0, 1, 3, 7))
    return Bench(
        device=device,
        copy_gb_per_s=copy_gb_per_s,
        skew=SKEWS[given.skew],
        batches=given.batches or batches,
        draft_lens=given.draft_lens or draft_lens,
        context=given.context,
        rounds=2 if options.quick else 3,
        seed=options.seed,
        peer=not given.no_peer,
        budget=TimeBudget(given.budget_s),
    )


def _let_go() -> None:
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


def growth(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield, per model, what eight rows of one request take over one row: time, experts, bytes; and under budgets.

    ``saved``: the share of the growth that a budget takes back.
    """
    steps = [row for row in rows if row["part"] == "step" and row["batch"] == 1 and row["graph"]]
    for model in dict.fromkeys(row["model"] for row in steps):
        own = {(row["draft_len"], row["budget"]): row for row in steps if row["model"] == model}
        one, many = own.get((0, "none")), own.get((ROWS - 1, "none"))
        if one is None or many is None:
            continue
        for (draft_len, budget), row in own.items():
            if draft_len != ROWS - 1:
                continue
            extra_ms = _number(many, "step_ms") - _number(one, "step_ms")
            yield {
                "part": "growth",
                "model": model,
                "stored_as": row["stored_as"],
                "batch": 1,
                "draft_len": draft_len,
                "budget": budget,
                "experts": row["experts"],
                "time_over_one_row": _number(row, "step_ms") / _number(one, "step_ms"),
                "experts_over_one_row": _number(row, "experts") / _number(one, "experts"),
                "bytes_over_one_row": _number(row, "gb") / _number(one, "gb"),
                "saved": (_number(many, "step_ms") - _number(row, "step_ms")) / extra_ms if extra_ms > 0 else 0.0,
            }


def targets(rows: Sequence[Row]) -> list[Target]:
    """Return what the rows say of each target; one of which nothing was measured is left out."""
    single = [row for row in rows if row["part"] == "decode" and row["batch"] == 1 and "step_ms" in row]
    ours = [row for row in single if row["engine"] == "penstock"]
    others = [row for row in single if row["engine"] == "transformers"]
    over_peer = [_number(row, "penstock_over_it") for row in others if "penstock_over_it" in row]
    grown = [row for row in rows if row["part"] == "growth"]
    plain = [row for row in grown if row["budget"] == "none"]
    halved = [_number(row, "saved") for row in grown if row["budget"] == f"{SHARES[-1]:.0%}"]
    found = []
    if ours:
        shares = [_number(row, "share_of_roofline") for row in ours]
        name = f"share of the roofline, decoding at batch 1, least of the models (aim {AIM_SHARE:.0%})"
        found.append(Target(name, min(shares), at_least=LEAST_SHARE))
    if over_peer:
        name = "tokens/s at batch 1 over transformers' generate, least of the models"
        found.append(Target(name, min(over_peer), at_least=LEAST_OVER_PEER))
    if hosts := [_number(row, "host_share") for row in ours if "host_share" in row]:
        name = "host's share of a step at batch 1 with graphs, largest of the models"
        found.append(Target(name, max(hosts), at_most=MOST_HOST))
    if plain:
        times = [_number(row, "time_over_one_row") for row in plain]
        over_bytes = [time / _number(row, "bytes_over_one_row") for time, row in zip(times, plain, strict=True)]
        name = (
            f"time of {ROWS} rows over 1 row ({min(times):.2f} to {max(times):.2f}, median "
            f"{statistics.median(times):.2f}) over what their bytes grow by, largest of the models"
        )
        found.append(Target(name, max(over_bytes), at_most=MOST_OVER_BYTES))
    if halved:
        name = f"share of that growth that a budget of {SHARES[-1]:.0%} of the experts saves, least of the models"
        found.append(Target(name, min(halved), at_least=LEAST_SAVED))
    return found


def _number(row: Row, name: str) -> float:
    return float(row[name])  # type: ignore[arg-type]


def _numbers(low: int, high: int) -> object:
    def parse(text: str) -> tuple[int, ...]:
        numbers = tuple(map(int, text.split(",")))
        if not all(low <= number <= high for number in numbers):
            raise argparse.ArgumentTypeError(f"{text} is not of numbers in [{low}, {high}]")
        return numbers

    return parse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark alone takes."""
    names = [*(shape.name for shape in SHAPES), INFLATED]
    parser.add_argument("--list", action="store_true", help="say what models need of a GPU, which need not be there")
    parser.add_argument("--model", choices=names, help="only this one")
    parser.add_argument("--batches", type=_numbers(1, 64), metavar="N,N", help="requests at once")  # type: ignore[arg-type]
    parser.add_argument("--draft-lens", type=_numbers(0, 7), metavar="N,N", help="drafts of each")  # type: ignore[arg-type]
    parser.add_argument("--context", type=int, default=512, metavar="N", help="prompt tokens, of random models")
    parser.add_argument("--skew", choices=list(SKEWS), default="demo", help="of random routers")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out: it compiles for minutes")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="profile too, and write the tables to FILE")
    time_budget.add_option(parser)


def main() -> int:
    """Run from the command line; refuse where there is no GPU, unless none is needed."""
    if "--list" not in sys.argv[1:] and not torch.cuda.is_available():
        print("gpu_decode: there is no CUDA device here, and a CPU's figures would say nothing of one", file=sys.stderr)
        return 2
    return run("gpu_decode", measure, add_options=add_options)


if __name__ == "__main__":
    sys.exit(main())
