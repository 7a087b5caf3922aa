"""A process that is asked one line of JSON at a time and answers each with one; what a benchmark compares with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

STOP_S = 60.0


class PeerProcess:
    """Runs ``command`` until the ``with`` block ends; entering waits for the first answer, which says it is ready.

    What it prints beside JSON objects is passed over: libraries print, too. Raises ``RuntimeError`` if it ends early.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command, self._environment = list(command), environment

    def __enter__(self) -> PeerProcess:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
        )
        self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def ask(self, question: Any) -> dict[str, Any]:
        """Return the answer to a question that JSON can say."""
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self._command[:3])} ended with code {self._process.wait()}")
