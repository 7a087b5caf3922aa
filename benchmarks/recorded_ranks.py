"""Ranks that compute every row once: exact tokens and counts for any number of policies, at a price list's time.

What a row yields, and which experts it visits, depends on the tokens before it alone: not on the step that it runs in,
its neighbours, or the rank. So transformers' own model computes each row when it is first asked for, and policies that
ask again are answered from memory. Engine, scheduler, drafters, controllers and acceptance are the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..cluster.engine.ranks import Replacement
from ..cluster.speculation.drafter import Drafter
from ..router.placement import contiguous
from ..workers.adjustments import Texts, adjust
from ..workers.model_info import ModelInfo, RankInfo
from ..workers.plan import LayerCounts, RankPlan, RankResult, RequestPlan, StepPlan, StepResult
from ..workers.sampler import accept, sample
from ..workers.sampling_params import SamplingParams, TokenSampling
from .step_times import StepTimes

MAX_DRAFT_LEN = 7
"""Longest draft that any policy verifies."""
_BRANCHES = 128
"""Branches computed at once."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload."""

    name: tuple[str, int, str]
    """Family, number and kind: jobs of one name have the same text as far as they go."""
    prompt: tuple[int, ...]
    sampling: SamplingParams

    @property
    def family(self) -> str:
        """What its text is of."""
        return self.name[0]


@dataclass(frozen=True, slots=True)
class _RowRecord:
    token: int
    """The token sampled after it."""
    experts: tuple[int, ...]
    """Per MoE layer, the chosen experts as bits."""


@dataclass(slots=True)
class _Text:
    """All that is known of one request: its true text, and what was drafted beside it."""

    tokens: list[int]
    """Prompt and the true output as far as it is known: the token after the last computed row included."""
    sampling: TokenSampling
    num_prompt: int
    true_rows: list[_RowRecord] = field(default_factory=list)
    cache: Any = None
    wrong_rows: dict[tuple[int, ...], _RowRecord] = field(default_factory=dict)
    """By (length of the true text before, wrong tokens up to the row...)."""


class RowComputer:
    """The model in transformers, which computes rows it has not seen and remembers them. f32, one process."""

    def __init__(self, model: Path, info: ModelInfo) -> None:
        from transformers import AutoModelForCausalLM

        self.info = info
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
        ).eval()
        self._chosen: list[torch.Tensor] = []
        for module in self._model.modules():
            if type(module).__name__.endswith("Experts"):
                module.register_forward_pre_hook(self._remember)
        self._texts: dict[tuple[str, int, str], _Text] = {}
        self.num_computed = 0

    def _remember(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._chosen.append(inputs[1])

    def text_of(self, job: Job) -> _Text:
        """Return what is known of a request."""
        if job.name not in self._texts:
            sampling = job.sampling.token_sampling(len(job.prompt), self.info.eos_token_ids)
            self._texts[job.name] = _Text(list(job.prompt), sampling, len(job.prompt))
        return self._texts[job.name]

    def rows(self, text: _Text, start: int, tokens: Sequence[int]) -> list[_RowRecord]:
        """Return the rows of ``tokens`` behind the first ``start`` tokens of the true text."""
        right = 0
        while right < len(tokens):
            while start + right >= len(text.tokens):  # the true token there is not known yet
                self.extend(text)
            if tokens[right] != text.tokens[start + right]:
                break
            right += 1
        while len(text.true_rows) < start + right:
            self.extend(text)
        found = text.true_rows[start : start + right]
        if wrong := tuple(tokens[right:]):
            place = start + right
            if (place, *wrong) not in text.wrong_rows:
                self.branch(text, [(place, wrong)])
            found += [text.wrong_rows[place, *wrong[: index + 1]] for index in range(len(wrong))]
        return found

    def prepare(self, job: Job, output: Sequence[int], drafter: Drafter) -> None:
        """Compute a request's rows at once: of ``output``, as long as it is right, and of what ``drafter`` drafts."""
        text = self.text_of(job)
        if len(text.tokens) < text.num_prompt + len(output):
            self.extend(text, output[len(text.tokens) - text.num_prompt :])
        drafter.extend(text.tokens[: text.num_prompt])
        branches = []
        for place in range(text.num_prompt + 1, len(text.tokens)):
            drafter.extend(text.tokens[place - 1 : place])
            drafted = drafter.propose(MAX_DRAFT_LEN).token_ids
            right = 0
            while right < len(drafted) and text.tokens[place + right : place + right + 1] == [drafted[right]]:
                right += 1
            if (wrong := tuple(drafted[right:])) and (place + right, *wrong) not in text.wrong_rows:
                branches.append((place + right, wrong))
        for begin in range(0, len(branches), _BRANCHES):
            self.branch(text, branches[begin : begin + _BRANCHES])

    def extend(self, text: _Text, guess: Sequence[int] = ()) -> None:
        """Compute the true rows whose tokens are known and learn what follows; go on while ``guess`` is right."""
        begin = len(text.true_rows)
        tokens = [*text.tokens[begin:], *guess]
        rows = self._forward(text, [(begin, tokens)])
        num_right = len(tokens) - len(guess)
        while num_right < len(tokens) and tokens[num_right] == rows[num_right - 1].token:
            num_right += 1
        if num_right < len(tokens):
            text.cache.crop(num_right - len(tokens))
        text.true_rows += rows[:num_right]
        text.tokens = [*text.tokens[:begin], *tokens[:num_right], rows[num_right - 1].token]

    def branch(self, text: _Text, branches: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        """Compute wrong tokens: each branch leaves the true text after as many tokens as it says."""
        while len(text.true_rows) < max(place for place, _ in branches):
            self.extend(text)
        rows = iter(self._forward(text, branches))
        for place, wrong in branches:
            for index in range(len(wrong)):
                text.wrong_rows[place, *wrong[: index + 1]] = next(rows)
        text.cache.crop(-sum(len(wrong) for _, wrong in branches))

    @torch.inference_mode()
    def _forward(self, text: _Text, branches: Sequence[tuple[int, Sequence[int]]]) -> list[_RowRecord]:
        """Run chains of tokens, each seeing as many cached rows as its place says, and itself up to each token."""
        from transformers import DynamicCache

        text.cache = DynamicCache() if text.cache is None else text.cache
        num_cached, num_rows = len(text.true_rows), sum(len(tokens) for _, tokens in branches)
        mask = torch.full((num_rows, num_cached + num_rows), torch.finfo(torch.float32).min)
        start = 0
        for place, tokens in branches:
            stop = start + len(tokens)
            mask[start:stop, :place] = 0
            mask[start:stop, num_cached + start : num_cached + stop].triu_(1)
            start = stop
        positions = [place + index for place, tokens in branches for index in range(len(tokens))]
        self._chosen.clear()
        output = self._model(
            input_ids=torch.tensor([[token for _, tokens in branches for token in tokens]]),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([positions]),
            past_key_values=text.cache,
            use_cache=True,
        )
        self.num_computed += num_rows
        sampled = self._sample(text, output.logits[0], positions)
        bits = [(1 << chosen.view(num_rows, -1)).sum(dim=-1).tolist() for chosen in self._chosen]
        return [_RowRecord(token, experts) for token, experts in zip(sampled, zip(*bits, strict=True), strict=True)]

    @staticmethod
    def _sample(text: _Text, logits: torch.Tensor, positions: Sequence[int]) -> list[int]:
        """Return what follows each row; inside the prompt, the prompt."""
        num_rows, follow = len(logits), [position + 1 for position in positions]
        request = RequestPlan(0, 0, 0, [], [0] * num_rows, list(range(-1, num_rows - 1)), 0, text.sampling)
        sampled = sample(adjust(logits, [request], follow, Texts()), [text.sampling] * num_rows, follow)
        return [
            text.tokens[place] if place < text.num_prompt else token
            for place, token in zip(follow, sampled, strict=True)
        ]


class RecordedRanks:
    """Ranks of one engine run. ``jobs``: in the order in which the engine is given them.

    ``now_s`` is the clock of the run: every step adds what the price list says of its counts.
    """

    def __init__(self, computer: RowComputer, info: RankInfo, num_ranks: int, times: StepTimes) -> None:
        self._computer, self._times = computer, times
        placement = contiguous(1, info.model.num_experts, num_ranks)  # all layers are alike
        self._owned = [sum(1 << expert for expert in placement.experts_of(0, rank)) for rank in range(num_ranks)]
        self.infos = [replace(info, rank=rank, num_kv_blocks=1 << 16) for rank in range(num_ranks)]
        self.now_s = 0.0
        self.jobs: list[Job] = []
        self.steps: list[tuple[list[int], list[list[int]]]] = []
        """Per step: rows of each rank, and distinct experts of each rank and layer."""

    def clock(self) -> float:
        """Return the time of the run."""
        return self.now_s

    def step(self, plan: StepPlan) -> StepResult:
        """Answer from memory, computing what is new."""
        rows = [self._rows(rank) for rank in plan.ranks]
        layers = self._computer.info.num_moe_layers
        busy = [[0] * layers for _ in plan.ranks]
        for layer in range(layers):
            wanted = 0
            for own in rows:
                for records in own:
                    for record in records:
                        wanted |= record.experts[layer]
            for rank, owned in enumerate(self._owned):
                busy[rank][layer] = (wanted & owned).bit_count()
        num_rows = [sum(len(records) for records in own) for own in rows]
        step_s = self._times.step_s(num_rows, busy, self._computer.info.num_experts_per_tok)
        self.now_s += step_s
        self.steps.append((num_rows, busy))
        results = [self._result(rank_plan, rank, rows[rank], busy[rank]) for rank, rank_plan in enumerate(plan.ranks)]
        return StepResult(results, step_s)

    def recover(self, generation: int) -> Sequence[Replacement]:
        """Nothing fails here."""
        return ()

    def close(self) -> None:
        """Nothing is held."""

    def _rows(self, plan: RankPlan) -> list[list[_RowRecord]]:
        return [
            self._computer.rows(self._computer.text_of(self.jobs[part.request_id]), part.committed_len, part.token_ids)
            for part in plan.requests
        ]

    def _result(
        self, plan: RankPlan, rank: int, rows: Sequence[Sequence[_RowRecord]], experts: list[int]
    ) -> RankResult:
        tokens = [
            accept(part, [record.token for record in records[part.first_sampled_row :]])[0]
            for part, records in zip(plan.requests, rows, strict=True)
        ]
        layers = range(self._computer.info.num_moe_layers)
        others = [owned for other, owned in enumerate(self._owned) if other != rank]
        sent = [
            sum(bool(record.experts[layer] & owned) for records in rows for record in records for owned in others)
            for layer in layers
        ]
        # Two hidden states in f32 for each row sent: there and back
        payload = [8 * self._computer.info.hidden_size * count for count in sent]
        own = [sum(len(records) for records in rows)] * len(sent)
        counts = LayerCounts(own, experts, sent, payload, payload)
        return RankResult(plan.generation, plan.step_id, rank, tokens, counts, 0, 0, 0.0, 0.0)
