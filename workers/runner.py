"""One rank: its shard of the model, its KV pool, and the step that turns a plan into tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ..kernels.fused_moe import kernel
from ..router.budgeted_selection import BudgetedSelection
from ..router.placement import Placement, PlacementVersion, contiguous
from ..router.topk import RouterSeam
from . import attention
from .adjustments import Texts, adjust
from .architectures import UNSTEERABLE
from .collectives import Collectives
from .computed_step import ComputedStep
from .device import resolve_device
from .dispatch import AllToAllDispatcher, CollectiveLog, LocalDispatcher
from .expert_mover import ExpertMover
from .expert_parallel import ExpertParallel
from .gpu_routing import LaunchedRouting
from .group_placement import GroupPlacement
from .kv_budget import GATHERED_BYTES, gathered_slot_bytes
from .kv_cache import PagedKVCache
from .launched_step import LaunchedStep, can_be_followed, can_follow
from .loader import DenseModel, LoadedModel, build, inspect, load_dense, load_experts, resolve_dtype
from .logprobs import target_logprobs, token_logprobs
from .model_config import longest_context, num_experts_of, num_experts_per_tok
from .model_info import ModelInfo, RankInfo
from .norms import fuse_norms
from .packed_weights import pack_dense, packs_weights
from .padded_steps import PaddedSteps
from .plan import Logprobs, RankPlan, RankResult
from .pool_size import pool_size_on
from .rebalance_plan import RebalancePlan
from .rows import PackedRows, largest_step, pack
from .sampler import accept, sample
from .static_dispatch import StaticAllToAll
from .step_budget import StepBudget

logger = logging.getLogger(__name__)


class ModelRunner:
    """Loads a shard on construction; ``step``, or its halves, is called from one thread, on all ranks in lock-step.

    ``placement``: which ranks hold which experts, equal runs of them when None. ``moved_bytes``: most bytes of experts
    that reach a rank in a step; None where they stay where they are. ``enforce_eager``: replay no graphs. ``dense``:
    this model without its experts, on the rank's device, if it has been loaded already, or with them ``loaded``; it is
    used up. Raises ``ValueError`` naming the field for a model that cannot be served or a pool too small for
    ``max_model_len``.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        rank: int = 0,
        num_ranks: int = 1,
        max_model_len: int | None = None,
        block_size: int = 16,
        kv_cache_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 512,
        enforce_eager: bool = False,
        placement: Placement | None = None,
        moved_bytes: int | None = None,
        dense: DenseModel | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        started = time.perf_counter()
        self.rank, self.num_ranks = rank, num_ranks
        self.device = resolve_device(device, rank)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # where kernels are launched and streams are taken
        directory, config = inspect(model, revision) if loaded is None else (None, loaded.config)
        text_config = config.get_text_config()
        self.dtype = resolve_dtype(config, dtype)
        num_experts = num_experts_of(text_config)
        self.top_k = num_experts_per_tok(text_config)
        self.max_model_len = longest_context(text_config, max_model_len)
        if directory is not None:
            dense = dense or load_dense(directory, build(config, self.dtype), self.device)
            placement = placement or contiguous(len(dense.empty.expert_modules), num_experts, num_ranks)
            loaded = load_experts(directory, dense, placement, rank)
        assert loaded is not None, "it has been loaded, here or before"
        placement = placement or contiguous(len(loaded.expert_modules), num_experts, num_ranks)
        self.model = loaded.model
        all_bytes = sum(p.nbytes for p in self.model.parameters()) + sum(b.nbytes for b in self.model.buffers())
        self.hidden_size = int(text_config.hidden_size)
        self.log = CollectiveLog()
        packed = packs_weights(self.dtype, self.device)
        if packed:
            pack_dense(self.model, loaded.expert_modules, loaded.routers)
        self.activation_dtype = torch.float32 if packed else self.dtype
        if self.device.type == "cpu" and self.activation_dtype == torch.float32:
            fuse_norms(self.model, kernel() if packed else None)
        self.experts = ExpertParallel(
            loaded.expert_modules, num_experts, LocalDispatcher(), moves=moved_bytes is not None
        )
        self.mover = None if moved_bytes is None else ExpertMover(self.experts.shards, placement, rank, moved_bytes)
        self._places = GroupPlacement(placement, rank, self.device, self.mover)
        self.layers = self._places.layers
        steerable = config.model_type not in UNSTEERABLE
        self.routers = [RouterSeam(router, num_experts, self.top_k) for router in loaded.routers if steerable]
        self.cache = PagedKVCache(block_size)
        attention.bind(self.model, self.cache)
        self._probe()
        replays_graphs = self.experts.is_capturable and not enforce_eager
        slot_bytes = gathered_slot_bytes(
            self.cache.most_kept_numbers,
            self.cache.most_attended_numbers,
            self.dtype.itemsize,
            widens=self.cache.widens,
        )
        pool_bytes, graph_room = pool_size_on(
            self.device,
            self.cache,
            partial(self._run_largest_step, max_num_batched_tokens),
            requested=kv_cache_bytes,
            utilization=gpu_memory_utilization,
            gathered_bytes=slot_bytes,
            max_num_seqs=max_num_seqs,
            max_num_rows=max_num_batched_tokens,
            max_model_len=self.max_model_len,
            replays_graphs=replays_graphs,
        )
        self.cache.allocate(pool_bytes, self.device)
        self.padded = PaddedSteps(
            self.model,
            (*loaded.expert_modules, *loaded.routers),
            self._forward,
            self.cache,
            self.routers,
            self.experts,
            self.layers,
            self.log,
            self.device,
            self.max_model_len,
            graph_room,
        )
        if replays_graphs:
            self.padded.choose_attention()
            self.padded.compile_layers()
        self.is_asynchronous = replays_graphs and self.device.type == "cuda"
        """Whether padded steps that have been launched run while this thread does something else."""
        self.texts = Texts()
        self.generation = -1
        self._ended_s = 0.0
        """When the step before had ended."""
        self._sampled: dict[int, int] = {}
        """The last token of each request that the step before sampled."""
        # One block is scratch for padding rows
        needed = (-(-self.max_model_len // block_size) + 1) * self.cache.block_bytes
        if needed > pool_bytes:
            fits = self.cache.num_blocks * block_size
            field = (
                "gpu_memory_utilization" if kv_cache_bytes is None and self.device.type == "cuda" else "kv_cache_bytes"
            )
            raise ValueError(
                f"{field}: {pool_bytes} bytes of KV hold {fits} tokens; max_model_len {self.max_model_len} needs "
                f"at least {needed}"
            )
        expert_bytes = sum(shard.num_bytes for shard in self.experts.shards)
        self.info = RankInfo(
            rank=rank,
            model=ModelInfo(
                architecture=type(self.model).__name__,
                model_type=config.model_type,
                dtype=str(self.dtype).removeprefix("torch."),
                vocab_size=int(text_config.vocab_size),
                hidden_size=self.hidden_size,
                num_layers=int(text_config.num_hidden_layers),
                num_moe_layers=len(loaded.expert_modules),
                num_experts=num_experts,
                num_experts_per_tok=self.top_k,
                max_model_len=self.max_model_len,
                eos_token_ids=loaded.eos_token_ids,
                steerable=steerable,
            ),
            num_local_experts=[shard.num_experts for shard in self.experts.shards],
            expert_bytes=expert_bytes,
            dense_bytes=all_bytes - expert_bytes,
            bytes_read=loaded.bytes_read,
            checkpoint_bytes=loaded.checkpoint_bytes,
            num_kv_blocks=self.cache.num_blocks,
            kv_block_bytes=self.cache.block_bytes,
            load_s=time.perf_counter() - started,
            replays_graphs=replays_graphs,
            most_gathered_slots=GATHERED_BYTES // slot_bytes if replays_graphs and self.padded.objection else None,
            bytes_per_expert=[shard.bytes_per_expert for shard in self.experts.shards],
        )

    @property
    def placement(self) -> Placement:
        """Which ranks hold which experts at present."""
        return self._places.of_all

    def settle(self, version: PlacementVersion) -> None:
        """Be at a placement that ranks which meet again agree on; see `ExpertMover.settle`."""
        assert self.mover is not None, "experts may move"
        self._relocate(self.mover.settle(version))

    def _relocate(self, layers: Sequence[int]) -> None:
        self._places.relocate(layers, (self.experts.dispatcher, self.padded.dispatcher))

    def connect(self, collectives: Collectives, absent: Sequence[int] = ()) -> None:
        """Dispatch over ``collectives`` from the next step on.

        ``absent``: ranks that are not in their group, whose experts the others hold as well.
        """
        assert self.num_ranks > 1, "one rank needs no process group"
        hidden_bytes = self.hidden_size * self.activation_dtype.itemsize
        shared = *self._places.meet(absent), collectives, self.log, self.device, hidden_bytes, self.top_k
        self.experts.dispatcher = AllToAllDispatcher(*shared)
        self.padded.connect(StaticAllToAll(*shared), captures=not collectives.through_host)

    def disconnect(self) -> None:
        """Hold nothing of the present process group: NCCL waits for graphs with its collectives before it leaves.

        Its collectives have ended, or are being aborted.
        """
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.padded.graphs.clear()

    def check_device(self) -> None:
        """Raise the device's own error if it computes no more: after some faults a CUDA context never does."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def step(self, plan: RankPlan) -> RankResult:
        """Run one step; the result is only true once every rank has answered it."""
        return self.finish(self.launch(plan))

    def can_follow(self, plan: RankPlan, running: LaunchedStep) -> bool:
        """Return whether ``plan`` can be launched behind ``running`` at once: right and without waiting for it."""
        return self.is_asynchronous and can_follow(plan, running.plan) and self.padded.is_ready(plan)

    def has_to_compile(self, plan: RankPlan) -> bool:
        """Return whether launching ``plan`` takes as long as compilers do: it is padded, and the first of its kind."""
        return plan.bucket is not None and not self.padded.has_run(plan)

    def can_be_followed(self, running: LaunchedStep) -> bool:
        """Return whether there are plans of which `can_follow` would say so."""
        return self.is_asynchronous and can_be_followed(running.plan)

    @torch.inference_mode()
    def launch(self, plan: RankPlan, behind: LaunchedStep | None = None) -> LaunchedStep:
        """Begin with a step. `finish` is its other half; the steps before it have been finished.

        ``behind``: the one before, if it has not been, and the plan `can_follow` it. A step that was launched may be
        let go without `finish`, when nothing that follows it counts either.
        """
        started, started_s = time.thread_time(), time.perf_counter()
        if behind is None:
            plan = replace(plan, requests=[request.filled_in(self._sampled) for request in plan.requests])
        if plan.generation != self.generation and self.device.type == "cuda":
            # Steps that were let go may still read what this one writes
            torch.cuda.current_stream(self.device).synchronize()
        self._apply_tables(plan)
        self.log.reset()
        if plan.rebalance is not None:
            self._begin_moves(plan.rebalance)
        if plan.bucket is None:
            computed = self._launched(plan)
            step = LaunchedStep(plan, lambda: True, lambda: computed)
        else:
            if self.mover is not None:
                # Moves are a collective of their own, which no graph holds. On a GPU a graph's collectives wait here
                # for it, so that all ranks' devices run them in one order; the host waits only with gloo
                self.mover.finish()
            step = self.padded.launch(plan, None if behind is None else behind.plan)
        # A device that computes by itself begins when it has been told to
        step.started_s = time.perf_counter() if self.is_asynchronous and plan.bucket is not None else started_s
        step.thread_time_s = time.thread_time() - started
        return step

    @torch.inference_mode()
    def finish(self, step: LaunchedStep) -> RankResult:
        """Wait for a step that was launched, the oldest first, and say what came of it."""
        started = time.thread_time()
        plan, computed = step.plan, step.computed()
        num_sampled, sampled = len(computed.positions), computed.tokens
        # Whoever asks for log-probabilities has no tokens chosen
        logits = computed.logits if sampled is None else torch.empty(0)
        if sampled is None:
            samplings = [request.sampling for request in plan.requests for _ in range(request.num_sampled_rows)]
            adjusted = adjust(logits[:num_sampled], plan.requests, computed.positions, self.texts)
            sampled = sample(adjusted, samplings, computed.positions)
        token_ids, start = [], 0
        logprobs: dict[int, Logprobs] = {}
        for place, request in enumerate(plan.requests):
            stop = start + request.num_sampled_rows
            if computed.accepted is None:
                tokens, path = accept(request, sampled[start:stop])
                self.cache.compact(request.request_id, request.committed_len, path)
            else:  # the device has put their KV in order
                tokens, path = computed.accepted[place]
            token_ids.append(tokens)
            if tokens and request.sampling.logprobs is not None:
                emitted = torch.tensor(path[request.first_sampled_row :]) - request.first_sampled_row
                logprobs[request.request_id] = token_logprobs(
                    logits[start:stop][emitted.to(self.device)], tokens, request.sampling.logprobs
                )
            start = stop
        self._sampled = {
            request.request_id: tokens[-1] for request, tokens in zip(plan.requests, token_ids, strict=True) if tokens
        }
        if self.mover is not None:
            self.mover.finish()
        begun_s = max(step.started_s, self._ended_s)
        self._ended_s = ended_s = time.perf_counter()
        return RankResult(
            generation=plan.generation,
            step_id=plan.step_id,
            rank=self.rank,
            token_ids=token_ids,
            counts=computed.counts,
            num_collectives=computed.num_collectives,
            collectives_crc=computed.collectives_crc,
            logprobs=logprobs,
            prompt_logprobs=target_logprobs(plan.requests, logits[num_sampled:]),
            kept_weights=computed.kept_weights,
            expert_loads=self.experts.take_loads() if plan.rebalance and plan.rebalance.wants_loads else None,
            thread_time_s=step.thread_time_s + time.thread_time() - started,
            ran_s=ended_s - begun_s,
            num_graphs=0 if plan.requests else self.padded.graphs.num_graphs,
            graph_bytes=0 if plan.requests else self.padded.graphs.num_bytes,
        )

    def _launched(self, plan: RankPlan) -> ComputedStep:
        """Compute the plan's rows as they are, operation by operation."""
        rows = pack(plan, self.cache.tables, self.cache.block_size, self.cache.scratch_slot)
        budget = StepBudget(plan, rows.valid, self.layers, self.experts.dispatcher.sum_scores)
        logits = self._forward(rows, budget.selections)
        counts = self.experts.finish()
        positions = (rows.positions[rows.sampled_rows] + 1).tolist()
        kept = budget.finish(counts)
        seen = self.log.num_collectives, self.log.crc
        return ComputedStep(None, None, lambda: logits, positions, counts, kept, *seen)

    def _begin_moves(self, plan: RebalancePlan) -> None:
        dispatcher = self.experts.dispatcher
        assert self.mover is not None, "ranks are told that experts may move"
        assert isinstance(dispatcher, AllToAllDispatcher), "and there are several"
        self._relocate(self.mover.switch(plan.version, plan.changes))
        self.mover.start(plan, dispatcher.exchange)

    def _apply_tables(self, plan: RankPlan) -> None:
        self.texts.update(plan, new_generation=plan.generation != self.generation)
        if plan.generation != self.generation:
            self.cache.tables.clear()
            self.generation = plan.generation
        for request_id in plan.released:
            self.cache.tables.pop(request_id, None)
        for request in plan.requests:
            self.cache.set_blocks(request.request_id, request.first_block, request.new_blocks)

    def _forward(
        self,
        rows: PackedRows,
        selections: Sequence[BudgetedSelection] = (),
        routings: Sequence[LaunchedRouting] = (),
    ) -> torch.Tensor:
        """Return logits [S, V] of the sampled rows and, behind them, of the scored ones.

        ``selections``: of each MoE layer, in a step under a budget. ``routings``: in the place of all that follows
        its router's logits.
        """
        self.cache.rows = rows = rows.to(self.device)
        self.experts.begin(rows.valid, selections, ids_are_final=bool(routings))
        for layer, router in enumerate(self.routers):
            router.selection = selections[layer] if selections else None
            router.replacement = routings[layer] if routings else None
        wanted = rows.logit_rows
        keep = wanted if len(wanted) else torch.zeros_like(rows.token_ids[:1])
        output = self.model(
            input_ids=rows.token_ids[None],
            position_ids=rows.positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits[0][: len(wanted)]

    @torch.inference_mode()
    def _probe(self) -> None:
        """Run one padding row by itself: learns KV shapes, and that every router passes the seam once."""
        for router in self.routers:
            router.audit = True
        plan = RankPlan(generation=-1, step_id=-1)
        try:
            self._forward(pack(plan, {}, self.cache.block_size, 0))
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            if str(error).startswith("model: "):
                raise
            raise ValueError(f"model: {type(self.model).__name__} does not run over a paged cache: {error}") from error
        for router in self.routers:
            router.audit = False

    @torch.inference_mode()
    def _run_largest_step(self, max_rows: int) -> None:
        with self.experts.uncounted():
            self._forward(largest_step(max_rows, self.num_ranks, self.cache.block_size))
