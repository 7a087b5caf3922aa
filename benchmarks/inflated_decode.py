"""The inflated demo model end to end: real text, real drafts, the experts of a real model's size."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..cluster.config import EngineConfig
from ..cluster.engine.ranks import make_runner
from ..demo import prompts
from ..demo.inflate import inflate
from ..demo.records import FAMILIES
from ..router.expert_budget import ExpertBudget
from ..workers.config_file import load_config
from .generate_peer import GeneratePeer
from .harness import Row
from .step_bytes import ByteCounter
from .watched_serving import Served, serve
from .whole_model import SHARES, Bench, figures

NAME = "inflated-demo"
FACTOR = 128
_MAX_MODEL_LEN = 1024
_MAX_TOKENS = 64
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Way:
    """How prompts are served."""

    draft_len: int
    graphs: bool
    share: float | None = None
    budget: ExpertBudget | None = None


class InflatedDemo:
    """``model``: the demo's directory; ``factor``: how many times as wide its experts are made."""

    def __init__(self, model: Path, bench: Bench, factor: int = FACTOR, max_tokens: int = _MAX_TOKENS) -> None:
        self._bench, self._max_tokens = bench, max_tokens
        tokenizer = ChatTokenizer(str(model))
        records = [record for turn in zip(*map(prompts.load, FAMILIES), strict=True) for record in turn]
        self._prompts = [
            tokenizer.encode_chat([{"role": "user", "content": record.messages[0].content}])
            for record in records[: max(bench.batches)]
        ]
        with tempfile.TemporaryDirectory() as folder:
            inflate(model, Path(folder) / "model", factor)
            config = load_config(Path(folder) / "model")
            token_bytes = 2 * config.num_hidden_layers * config.hidden_size * bench.dtype.itemsize
            self._config = EngineConfig(
                model=str(Path(folder) / "model"),
                dtype=str(bench.dtype).removeprefix("torch."),
                device=bench.device.type,
                num_threads=1,
                block_size=_BLOCK_SIZE,
                max_model_len=_MAX_MODEL_LEN,
                max_num_seqs=max(bench.batches),
                kv_cache_bytes=(max(bench.batches) + 1) * _MAX_MODEL_LEN * token_bytes,
            )
            self.runner = make_runner(self._config, 0)
        self._bytes = ByteCounter(self.runner)
        self._peer = GeneratePeer(config, self.runner.model, bench.device) if bench.peer else None

    def rows(self) -> Iterator[Row]:
        """Measure batch by batch."""
        for batch in self._bench.batches:
            if self._bench.budget.allows(f"{NAME}, batch {batch}"):
                yield from self._batch(batch)
                self.runner.padded.graphs.clear()

    def _batch(self, batch: int) -> Iterator[Row]:
        bench, chosen = self._bench, self._prompts[:batch]
        ways = [Way(draft_len, graphs) for draft_len in bench.draft_lens for graphs in (True, False)]
        first = {way: self._serve(chosen, way) for way in ways}
        ways += [
            way for draft_len in bench.draft_lens for way in self._budgeted(first[Way(draft_len, True)], draft_len)
        ]
        for way in ways[len(first) :]:
            self._serve(chosen, way)
        served: dict[Way, list[Served]] = {way: [] for way in ways}
        theirs: list[float] = []
        if self._peer is not None:
            self._peer.generate(chosen, self._max_tokens)
        for _ in range(bench.rounds):
            for way in ways:
                served[way].append(self._serve(chosen, way))
            if self._peer is not None:
                theirs.append(self._peer.generate(chosen, self._max_tokens).wall_s)
        for way in ways:
            yield self._row(batch, way, served[way])
        if theirs:
            wall_s = statistics.median(theirs)
            yield {
                **self._named(batch, 0),
                "engine": "transformers",
                "tokens_per_s": round(batch * self._max_tokens / wall_s, 1),
            }

    def _budgeted(self, served: Served, draft_len: int) -> Iterator[Way]:
        """Yield the ways that leave out some of the experts that the same drafts read without a budget."""
        model = self.runner.info.model
        verified = [statistics.fmean(step.experts) for step, _ in served.steps if step.num_rows > len(step.contexts)]
        for share in SHARES if draft_len and verified else ():
            distinct = statistics.fmean(verified)
            kept = max(model.num_experts_per_tok, math.ceil(share * distinct))
            if kept < distinct:
                yield Way(draft_len, True, share, ExpertBudget(experts=kept))

    def _serve(self, chosen: list[list[int]], way: Way) -> Served:
        budget = None if way.budget is None else str(way.budget)
        config = replace(self._config, draft_len=way.draft_len, expert_budget=budget)
        return serve(config, self.runner, chosen, self._max_tokens, graphs=way.graphs)

    def _named(self, batch: int, draft_len: int) -> Row:
        dtype = str(self._bench.dtype).removeprefix("torch.")
        return {"part": "demo", "model": NAME, "stored_as": dtype, "batch": batch, "draft_len": draft_len}

    def _row(self, batch: int, way: Way, served: list[Served]) -> Row:
        timed = [pair for one in served for pair in one.steps]
        row: Row = {
            **self._named(batch, way.draft_len),
            "engine": "penstock",
            "graph": way.graphs,
            "budget": "none" if way.share is None else f"{way.share:.0%}",
            "budget_experts": None if way.budget is None else way.budget.experts,
            "tokens_per_s": round(statistics.median(one.num_tokens / one.wall_s for one in served), 1),
            "steps": len(timed),
        }
        if timed:  # steps of the whole batch: requests that drafted well end before others
            row["rows"] = round(statistics.fmean(step.num_rows for step, _ in timed), 1)
            seconds = statistics.median(spent for _, spent in timed)
            read = [self._bytes.of(step.experts, step.contexts, step.num_rows).total for step, _ in timed]
            row |= figures(
                seconds, [step.experts for step, _ in timed], statistics.fmean(read), self._bench.copy_gb_per_s
            )
        return row
