"""The one configuration of the engine. YAML, flags and keyword arguments all end here."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ..router.expert_budget import ExpertBudget

DRAFT_LEN = 3
AUTO_BUDGET = "auto"
API_KEY_VARIABLE = "PENSTOCK_API_KEY"
_API_KEY = re.compile(r"[\x21-\x7e]+")


def _bounded(default: Any, *, low: float | None = None, high: float | None = None, of: tuple[Any, ...] = ()) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "of": of})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything that decides what an engine serves and how. Names are vLLM's where the meaning is vLLM's.

    Raises ``ValueError`` naming the field and its valid range.
    """

    model: str
    """A directory with config.json and safetensors weights, or a model id on the Hugging Face hub."""
    tokenizer: str | None = None
    """Directory or hub id of the tokenizer; the model's own when absent."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    served_model_name: tuple[str, ...] | str | None = None
    """Names clients may use, one or several, the first being the model's own; the value of `model` when absent."""
    api_key: str | None = field(default=None, repr=False)
    """Key that HTTP clients must bring (`Authorization: Bearer ...`); that of PENSTOCK_API_KEY when absent."""
    max_body_bytes: int | None = _bounded(None, low=1 << 10, high=1 << 30)
    """Longest body of an HTTP request; when absent 64 for each token of the context, from 4 MiB to 32 MiB in all."""
    dtype: str = _bounded("auto", of=("auto", "bfloat16", "float32"))
    """Type of weights, activations and KV: auto (the checkpoint's), bfloat16 or float32."""
    device: str = _bounded("auto", of=("auto", "cpu", "cuda"))
    """Where ranks compute: auto (cuda if present), cpu or cuda."""
    expert_parallel_size: int = _bounded(1, low=1, high=1024)
    """Ranks the experts are split across; attention is data-parallel over the same ranks."""
    num_spares: int = _bounded(0, low=0, high=1024)
    """Processes that wait to take the place of a rank that is lost, everything but the weights in memory.
    docs/faults.md."""
    placement: str | None = None
    """File that says which ranks hold which experts, made by `penstock place`; equal runs of experts when absent.
    docs/placement.md."""
    enable_eplb: bool = _bounded(default=False)
    """Move experts between ranks while serving, so that all have as much to do (vLLM's name: expert parallelism load
    balancer). docs/placement.md."""
    num_redundant_experts: int = _bounded(0, low=0, high=1 << 16)
    """Copies in every layer beside the first of each expert, for what `enable_eplb` finds to be hot."""
    eplb_window_size: int = _bounded(1000, low=1, high=1 << 20)
    """Steps whose rows `enable_eplb` balances by: the last so many."""
    eplb_step_interval: int = _bounded(3000, low=1, high=1 << 30)
    """Steps from one rebalance to the next."""
    eplb_bytes_per_step: int = _bounded(8 << 20, low=1, high=1 << 40)
    """Most bytes of experts that reach or leave a rank in one step."""
    eplb_timeout_s: float = _bounded(600.0, low=0.1, high=86400.0)
    """Longest that a rebalance may take, in time spent in steps; over it, it is given up."""
    num_threads: int | None = _bounded(None, low=1, high=1024)
    """CPU threads of each rank; the machine's cores shared by all ranks when absent."""
    cpus_per_rank: float = _bounded(1.0, low=0.01, high=1024.0)
    """CPUs that Ray sets aside for each rank; a rank on a GPU sets that GPU aside too."""
    placement_group_strategy: str = _bounded("PACK", of=("PACK", "STRICT_PACK", "SPREAD"))
    """How a gang's ranks are put on machines: PACK (on few), STRICT_PACK (on one, or not at all) or SPREAD (on many,
    as evenly as there is room)."""
    num_replicas: int | None = _bounded(None, low=1, high=1024)
    """Gangs: sets of ranks that each hold all of the model; 1 when absent. `max_replicas` lets the number vary."""
    min_replicas: int | None = _bounded(None, low=1, high=1024)
    """Fewest gangs where the number varies; 1 when absent."""
    max_replicas: int | None = _bounded(None, low=1, high=1024)
    """Most gangs: Serve adds some while more requests run and wait than `target_ongoing_requests` says."""
    target_ongoing_requests: float | None = _bounded(None, low=0.01, high=1e6)
    """Requests running and waiting in a gang that varying their number aims at; half of what a gang can run at once
    when absent."""
    upscale_delay_s: float = _bounded(30.0, low=0.0, high=86400.0)
    """How long there must be too many requests before gangs are added."""
    downscale_delay_s: float = _bounded(600.0, low=0.0, high=86400.0)
    """How long there must be too few requests before gangs are taken away."""
    drain_timeout_s: float = _bounded(300.0, low=0.0, high=86400.0)
    """Longest a gang that is taken away goes on with the requests that it has."""
    max_model_len: int | None = _bounded(None, low=1)
    """Longest prompt plus output, in tokens; the model's own limit when absent."""
    max_num_seqs: int = _bounded(32, low=1, high=4096)
    """Most requests running at once, per rank."""
    max_queued_requests: int = _bounded(1024, low=1, high=1 << 20)
    """Most requests waiting to run, over all ranks; more are refused with 429 (Ray Serve's name, at the engine)."""
    request_timeout_s: float | None = _bounded(None, low=0.001, high=604800.0)
    """Longest a request may take, waiting included; over it, it ends with 408. No limit when absent."""
    max_num_batched_tokens: int = _bounded(512, low=1, high=1 << 20)
    """Most rows in one step, per rank; longer prompts are computed in chunks."""
    block_size: int = _bounded(16, low=1, high=1024)
    """Tokens per KV block."""
    kv_cache_bytes: int | None = _bounded(None, low=1)
    """Bytes of the KV pool, per rank; when absent 256 MiB on a CPU, on a GPU what `gpu_memory_utilization` leaves."""
    gpu_memory_utilization: float = _bounded(0.9, low=0.01, high=1.0)
    """Share of each GPU's memory for weights, activations and KV together; without effect beside `kv_cache_bytes`."""
    enforce_eager: bool = False
    """Launch a GPU's operations one by one, instead of replaying small steps as CUDA graphs; no effect on a CPU."""
    async_scheduling: bool = True
    """Send ranks the next step while they run one, where nothing is drafted in either; off: plan it after the result.
    No effect on a single rank without Ray."""
    speculation: str = _bounded("auto", of=("auto", "off", "fixed", "cascade", "shadow"))
    """How draft lengths are chosen: off, fixed (`draft_len` always), cascade (utility measured per request by trials)
    or shadow (expected gain against expected time, every step); auto is fixed where `draft_len` is given, else shadow.
    docs/speculation.md."""
    drafter: str = _bounded("ngram")
    """Where drafts come from, by name: ngram (prompt lookup) or suffix (the longest match, also in earlier outputs)."""
    draft_len: int | None = _bounded(None, low=0, high=64)
    """Tokens drafted per request and step under `fixed`, 3 when absent; 0 decodes plainly and calls no drafter."""
    max_draft_len: int = _bounded(7, low=1, high=64)
    """Most tokens that `cascade` and `shadow` draft per request and step."""
    suffix_store_tokens: int = _bounded(65536, low=0, high=1 << 24)
    """Tokens of earlier outputs that the `suffix` drafter remembers for all requests."""
    prompt_lookup_max: int = _bounded(3, low=1, high=32)
    """Longest n-gram the `ngram` drafter looks up."""
    prompt_lookup_min: int = _bounded(1, low=1, high=32)
    """Shortest n-gram the `ngram` drafter looks up."""
    expert_budget: tuple[str, ...] | str | None = None
    """Experts that verifying drafts may read, as in `experts=20` or `coverage=0.9,scope=owner`; lossy. Several, the
    most lenient first, of which `shadow` chooses one or none in each step and others take the first; or auto: all that
    were calibrated and may be served. No budget when absent. docs/budgets.md."""
    budget_profile: str | None = _bounded(None)
    """File that `penstock calibrate` wrote, which says what budgets cost; expert_budgets.json beside the model when
    absent. Read once, where the server is started."""
    max_quality_loss: float = _bounded(0.01, low=0.0, high=1.0)
    """Most that a budget may have lost of paired exact match when calibrated, as a share (0.01 is one point); where no
    answers were known, most tokens that it may have changed."""
    max_perplexity_increase: float = _bounded(0.02, low=0.0, high=100.0)
    """Most that a budget may have added to the perplexity of the model's own answers, as a share of it."""
    allow_uncalibrated: bool = _bounded(default=False)
    """Serve a budget that has no profile, or loses more than is allowed, with a warning."""
    step_timeout_s: float = _bounded(60.0, low=0.1, high=86400.0)
    """Longest wait of a rank in one collective; a rank that does not answer a step in this time is lost."""
    load_timeout_s: float = _bounded(1800.0, low=1.0, high=86400.0)
    """Deadline for all ranks to start and load their shards."""
    recovery_timeout_s: float = _bounded(300.0, low=1.0, high=86400.0)
    """Longest that ranks may take to replace what they have lost, and that requests wait for a gang to come back."""
    max_step_retries: int = _bounded(3, low=0, high=100)
    """Times in a row that a failed step is planned again before the engine gives up."""

    def __post_init__(self) -> None:
        for name in ("served_model_name", "expert_budget"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        hints = get_type_hints(type(self))
        for spec in fields(self):
            value = getattr(self, spec.name)
            hint = hints[spec.name]
            allowed = tuple(get_origin(t) or t for t in get_args(hint) or (hint,))
            if float in allowed and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, spec.name, float(value))
            elif not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
                wanted = " or ".join("null" if t is NoneType else t.__name__ for t in allowed)
                raise ValueError(
                    f"{spec.name}: expected {wanted}, got {repr(value) if spec.repr else 'something else'}"
                )
            if value is not None:
                _check_range(spec.name, value, **spec.metadata)
        if not self.model:
            raise ValueError("model: expected a directory or a hub id, got an empty string")
        if not all(isinstance(name, str) and name for name in self.model_names):
            raise ValueError(f"served_model_name: expected names, none of them empty, got {self.served_model_name!r}")
        if self.api_key is not None and not _API_KEY.fullmatch(self.api_key):
            raise ValueError("api_key: expected visible ASCII characters without spaces")  # and do not show it
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens: {self.max_num_batched_tokens} is not in [max_num_seqs={self.max_num_seqs}, "
                "1048576]: every running request needs a row"
            )
        if self.draft_len is not None and self.speculation not in ("auto", "fixed"):
            raise ValueError(
                f"draft_len: only beside speculation auto or fixed; under {self.speculation} it would have no effect"
                + ("" if self.speculation == "off" else ", and max_draft_len is the most that is drafted")
            )
        _check_budgets(self.budget_names)
        self._check_replicas()
        self._check_eplb()
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min: {self.prompt_lookup_min} is not in [1, prompt_lookup_max={self.prompt_lookup_max}]"
            )

    def _check_replicas(self) -> None:
        if self.max_replicas is None:
            for name in ("min_replicas", "target_ongoing_requests"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: only beside max_replicas, which lets the number of gangs vary")
        elif self.num_replicas is not None:
            raise ValueError("num_replicas: not beside max_replicas; min_replicas is the number to start with")
        elif self.fewest_replicas > self.max_replicas:
            raise ValueError(f"min_replicas: {self.min_replicas} is not in [1, max_replicas={self.max_replicas}]")

    def _check_eplb(self) -> None:
        if self.enable_eplb and self.expert_parallel_size == 1:
            raise ValueError("enable_eplb: only with expert_parallel_size above 1; one rank holds every expert")
        if self.num_redundant_experts and not self.enable_eplb:
            raise ValueError(
                "num_redundant_experts: only beside enable_eplb; `penstock place` makes placements with copies"
            )
        if self.num_redundant_experts and self.placement is not None:
            raise ValueError("num_redundant_experts: not beside placement, whose file says which experts have copies")

    @property
    def fewest_replicas(self) -> int:
        """Gangs to start with."""
        return (self.num_replicas if self.max_replicas is None else self.min_replicas) or 1

    @property
    def most_replicas(self) -> int:
        """Gangs that there may be."""
        return self.max_replicas or self.fewest_replicas

    @property
    def target_requests_per_replica(self) -> float:
        """Requests running and waiting in a gang that varying their number aims at."""
        return self.target_ongoing_requests or self.max_num_seqs * self.expert_parallel_size / 2

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names clients may use."""
        names = self.served_model_name
        return (names,) if isinstance(names, str) else names or (self.model,)

    @property
    def model_name(self) -> str:
        """The model's own name."""
        return self.model_names[0]

    @property
    def policy(self) -> str:
        """What chooses draft lengths: `speculation`, auto resolved."""
        if self.speculation != "auto":
            return self.speculation
        return "shadow" if self.draft_len is None else "fixed"

    @property
    def budget_names(self) -> tuple[str, ...]:
        """`expert_budget` as a sequence."""
        budgets = self.expert_budget
        return (budgets,) if isinstance(budgets, str) else budgets or ()

    @property
    def budgets(self) -> tuple[ExpertBudget, ...]:
        """What verifications may keep to, most lenient first: all of `expert_budget` under `shadow`, else the first.

        Raises ``ValueError`` naming it for auto, which whoever starts the ranks replaces by what the profile has.
        """
        if AUTO_BUDGET in self.budget_names:
            raise ValueError(f"expert_budget: {AUTO_BUDGET} is for what reads the model's profile; name budgets here")
        names = self.budget_names if self.policy == "shadow" else self.budget_names[:1]
        return tuple(map(ExpertBudget.parse, names))

    @property
    def fixed_draft_len(self) -> int:
        """What `fixed` drafts."""
        return DRAFT_LEN if self.draft_len is None else self.draft_len

    @property
    def threads_per_rank(self) -> int:
        """CPU threads of each rank."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.num_threads or max(1, cores // self.expert_parallel_size)

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer is loaded from."""
        return self.tokenizer or self.model

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """Build from keys and values; an unknown key is refused with the valid ones listed."""
        valid = [f.name for f in fields(cls)]
        for key in values:
            if key not in valid:
                close = difflib.get_close_matches(str(key), valid, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise ValueError(f"unknown key {key!r}{hint}; valid keys: {', '.join(valid)}")
        if "model" not in values:
            raise ValueError("model: missing; expected a directory or a hub id")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> EngineConfig:
        """Read a YAML mapping of these keys; ``overrides`` win."""
        import yaml

        try:
            text = Path(path).read_text(encoding="utf-8")
            values = yaml.safe_load(text)
            node = yaml.compose(text, yaml.SafeLoader)
        except OSError as error:
            raise ValueError(f"config: cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"config: {path} is not UTF-8 text: {error}") from error
        except yaml.YAMLError as error:
            raise ValueError(f"config: {path} is not valid YAML: {error}") from error
        if values is None:  # an empty file
            values = {}
        if not isinstance(values, dict):
            raise ValueError(f"config: {path} holds a {type(values).__name__}, expected a mapping of keys to values")
        if isinstance(node, yaml.MappingNode):  # of a key that is there twice, YAML would take the last
            keys = Counter(key.value for key, _ in node.value)
            if repeated := [key for key, count in keys.items() if count > 1]:
                raise ValueError(f"{repeated[0]}: {path} has it {keys[repeated[0]]} times; expected once")
        return cls.from_mapping({**values, **overrides})


def _check_budgets(names: tuple[str, ...]) -> None:
    if names == (AUTO_BUDGET,):
        return
    if AUTO_BUDGET in names:
        raise ValueError(f"expert_budget: {AUTO_BUDGET} stands for all that were calibrated, so it stands alone")
    found: list[ExpertBudget] = []
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"expert_budget: expected text such as experts=20, got {name!r}")
        budget = ExpertBudget.parse(name)
        if budget in found:
            raise ValueError(f"expert_budget: {budget} is given twice")
        found.append(budget)


def _check_range(name: str, value: Any, *, low: Any = None, high: Any = None, of: tuple[Any, ...] = ()) -> None:
    if of and value not in of:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(map(str, of))}")
    # `not (x >= low)` also refuses NaN
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        top = "" if high is None else f"{high:g}]"
        raise ValueError(f"{name}: {value!r} is not in [{low:g}, {top or 'inf)'}")
