"""Load on a running server, made and measured by guidellm; ours is only the choice of what to ask of it."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. Raises ``ValueError`` naming the field."""

    url: str
    model: str | None
    """The first that the server lists when None."""
    prompts: Path
    """JSONL: chats under ``messages``, or texts under ``prompt``."""
    streams: tuple[int, ...]
    """Concurrent streams, one measurement each; empty when ``rates`` is not."""
    rates: tuple[float, ...]
    """Arrivals per second, Poisson, one measurement each."""
    num_requests: int
    """Of each measurement."""
    max_seconds: float | None
    """End of each measurement, if it comes first."""
    max_tokens: int | None
    """Most tokens of an answer."""
    temperature: float
    ignore_eos: bool
    api_key: str | None
    seed: int

    def __post_init__(self) -> None:
        if bool(self.streams) is bool(self.rates):
            raise ValueError("streams: give either streams or rates")
        for name, values in (("streams", self.streams), ("rates", self.rates)):
            for value in values:
                if not value > 0:
                    raise ValueError(f"{name}: {value!r} is not in (0, inf)")
        if self.num_requests < 1:
            raise ValueError(f"num_requests: {self.num_requests} is not in [1, inf)")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds: {self.max_seconds} is not in (0, inf)")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens} is not in [1, inf)")
        if not self.prompts.is_file():
            raise ValueError(f"prompts: {self.prompts} is not a file")

    def scenario(self, output: Path | None) -> dict[str, Any]:
        """Return guidellm's configuration of this load; ``output`` takes its whole report."""
        body: dict[str, Any] = {"temperature": self.temperature}
        if self.temperature > 0:
            body["seed"] = self.seed
        if self.ignore_eos:
            body["ignore_eos"] = True
        backend = {
            "kind": "openai_http",
            "target": self.url,
            "model": self.model or "",
            "request_format": "/v1/chat/completions" if self._is_chat() else "/v1/completions",
            "api_key": self.api_key,
            "max_tokens": self.max_tokens,
            "extras": {"body": body},
        }
        profile: dict[str, Any] = (
            {"kind": "concurrent", "streams": list(self.streams)}
            if self.streams
            else {"kind": "poisson", "rate": list(self.rates)}
        )
        constraints: list[dict[str, Any]] = [{"kind": "max_requests", "count": self.num_requests}]
        if self.max_seconds is not None:
            constraints.append({"kind": "max_duration", "seconds": self.max_seconds})
        spec = {
            "backend": backend,
            "profile": profile,
            "constraints": constraints,
            "data": [{"kind": "json_file", "path": str(self.prompts.resolve())}],
            "seed": {"kind": "static", "value": self.seed},
            "outputs": [{"kind": "console"}, *([{"kind": "json", "path": str(output)}] if output else [])],
        }
        return {"spec": spec}

    def _is_chat(self) -> bool:
        with self.prompts.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        try:
            record = json.loads(first)
        except ValueError as error:
            raise ValueError(f"prompts: {self.prompts} does not start with a line of JSON: {error}") from error
        for name in ("messages", "prompt"):
            if isinstance(record, dict) and name in record:
                return name == "messages"
        raise ValueError(f"prompts: the first line of {self.prompts} has neither messages nor prompt")


def run(load: Load, output: Path | None, arguments: Sequence[str] = ()) -> int:
    """Run guidellm and return its exit code; ``arguments`` are more of its own options.

    It is this environment's, or else a program of its own on the PATH. Raises ``ValueError`` if there is neither.
    """
    program = _guidellm()
    scenario = load.scenario(output)
    # in a file that only we may read: it may hold a key, and other users see command lines
    with tempfile.NamedTemporaryFile("w", prefix="penstock-bench-", suffix=".json") as file:
        json.dump(scenario, file)
        file.flush()
        return subprocess.run([*program, "run", "--config", file.name, *arguments], check=False).returncode


def _guidellm() -> list[str]:
    if importlib.util.find_spec("guidellm") is not None:
        return [sys.executable, "-m", "guidellm"]
    if (program := shutil.which("guidellm")) is not None:
        return [program]
    raise ValueError("bench serve: guidellm is not installed; run: pip install 'penstock[bench]'")
