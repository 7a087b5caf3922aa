"""What every benchmark shares: options, environment, a table, a JSON file, and targets that can be missed.

A benchmark is ``python -m penstock.benchmarks.NAME [--quick] [--check] [--json FILE] [--seed N]``. FILE holds
``{benchmark, command, environment, rows, targets}``; rows are flat records. ``--check`` exits with 1 and names each
missed target. Standard library and torch only: GPU machines may have nothing else.

A benchmark may `Options.keep` what it has found so far; the file of a run that is cut short then holds it, and says
that it is ``unfinished``. What a run leaves out itself, for want of time, is listed as ``left_out``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, str | int | float | bool | None]
_PACKAGES = ("torch", "transformers", "triton", "ray", "pyzmq", "msgspec")


@dataclass(frozen=True, slots=True)
class Target:
    """A figure and the bound that it must keep: one of the two."""

    name: str
    figure: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether it keeps it."""
        if self.at_most is not None:
            return self.figure <= self.at_most
        assert self.at_least is not None
        return self.figure >= self.at_least

    @property
    def bound(self) -> str:
        """The bound in words."""
        return f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"

    def record(self) -> dict[str, Any]:
        """Return what a file says of it."""
        kept = {name: value for name, value in asdict(self).items() if value is not None}
        return {**kept, "reached": self.reached}


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run of a benchmark found."""

    rows: list[Row]
    targets: list[Target]
    dtype: str
    threads: int
    """Threads that computed, in each process."""
    left_out: Sequence[str] = ()
    """What was asked for, and there was no time for."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a benchmark is asked for."""

    quick: bool
    """End within two minutes on two cores."""
    seed: int
    given: argparse.Namespace = field(default_factory=argparse.Namespace)
    """Every option, those of this benchmark alone included."""
    keep: Callable[[Measurement], None] = lambda so_far: None
    """Write what has been found so far."""


def environment(dtype: str, threads: int) -> Row:
    """Return the hardware and software of this run."""
    found: Row = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "gpu": _gpu_name(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "dtype": dtype,
        "threads": threads,
    }
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def run(
    name: str,
    measure: Callable[[Options], Measurement],
    arguments: Sequence[str] | None = None,
    *,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Parse the options, measure, print and save; return the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m penstock.benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: ends within two minutes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write environment, rows and targets to FILE")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and schedules")
    add_options(parser)
    given = parser.parse_args(arguments)
    command = f"python -m penstock.benchmarks.{name} {_recorded(arguments)}--seed {given.seed}"

    def write(measured: Measurement, *, unfinished: bool) -> None:
        if given.json:
            _replace(given.json, _document(name, command, measured, unfinished=unfinished))

    measured = measure(Options(given.quick, given.seed, given, partial(write, unfinished=True)))
    write(measured, unfinished=False)
    found = environment(measured.dtype, measured.threads)
    print(", ".join(f"{key} {value}" for key, value in found.items() if value is not None))
    print(table(measured.rows))
    for part in measured.left_out:
        print(f"left out, since time was over: {part}")
    for target in measured.targets:
        verdict = "reached" if target.reached else "MISSED"
        print(f"{verdict}: {target.name}: {target.figure:.2f}, required {target.bound}")
    missed = [target.name for target in measured.targets if not target.reached]
    if given.check and missed:
        print(f"missed: {'; '.join(missed)}", file=sys.stderr)
        return 1
    return 0


def _recorded(arguments: Sequence[str] | None) -> str:
    """Return the options that decide what is measured, but the seed, as a shell takes them."""
    others = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    others.add_argument("--check", action="store_true")
    others.add_argument("--json")
    others.add_argument("--seed")
    _, kept = others.parse_known_args(arguments)
    return f"{shlex.join(kept)} " if kept else ""


def _document(name: str, command: str, measured: Measurement, *, unfinished: bool) -> dict[str, Any]:
    document: dict[str, Any] = {
        "benchmark": name,
        "command": command,
        "environment": environment(measured.dtype, measured.threads),
        "rows": measured.rows,
        "targets": [target.record() for target in measured.targets],
    }
    if measured.left_out:
        document["left_out"] = list(measured.left_out)
    return {**document, "unfinished": True} if unfinished else document


def _replace(file: Path, document: dict[str, Any]) -> None:
    """Write ``file`` in one piece: whoever is cut off meanwhile leaves the one before."""
    whole = file.with_name(f"{file.name}.part")
    whole.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    whole.replace(file)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of ``values`` lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(rows: Sequence[Row]) -> str:
    """Return flat records as a Markdown table."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    lines = [names, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
