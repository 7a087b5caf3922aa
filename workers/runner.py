"""One rank: its shard of the model, its KV pool, and the step that turns a plan into tokens."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from ..router.placement import Placement, contiguous
from ..router.topk import RouterSeam
from . import attention
from .adjustments import Texts, adjust
from .dispatch import AllToAllDispatcher, CollectiveLog, LocalDispatcher
from .expert_parallel import ExpertParallel
from .kv_cache import PagedKVCache
from .loader import inspect, load, resolve_dtype
from .logprobs import target_logprobs, token_logprobs
from .model_info import ModelInfo, RankInfo
from .plan import Logprobs, RankPlan, RankResult
from .rows import PackedRows, pack
from .sampler import accept, sample


class ModelRunner:
    """Loads a shard on construction; ``step`` is called from one thread, on all ranks in lock-step.

    Raises ``ValueError`` naming the field for a model that cannot be served or a pool too small for ``max_model_len``.
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
        kv_cache_bytes: int = 256 << 20,
    ) -> None:
        started = time.perf_counter()
        self.rank, self.num_ranks = rank, num_ranks
        self.device = _resolve_device(device, rank)
        directory, config = inspect(model, revision)
        text_config = config.get_text_config()
        self.dtype = resolve_dtype(config, dtype)
        num_experts = _num_experts(text_config)
        self.top_k = int(text_config.num_experts_per_tok)
        self.placement: Placement = contiguous(num_experts, num_ranks)
        limit = int(text_config.max_position_embeddings)
        if max_model_len is not None and max_model_len > limit:
            raise ValueError(f"max_model_len: {max_model_len} is not in [1, {limit}], the model's longest context")
        loaded = load(directory, config, self.dtype, self.device, self.placement, rank)
        self.model = loaded.model
        self.hidden_size = int(text_config.hidden_size)
        self.log = CollectiveLog()
        self.experts = ExpertParallel(loaded.expert_modules, num_experts, LocalDispatcher())
        self.routers = [RouterSeam(router, num_experts, self.top_k) for router in loaded.routers]
        self.cache = PagedKVCache(block_size)
        attention.bind(self.model, self.cache)
        self._probe()
        self.cache.allocate(kv_cache_bytes, self.device)
        self.texts = Texts()
        self.generation = -1
        self.max_model_len = max_model_len or limit
        # One block is scratch for padding rows
        needed = (-(-self.max_model_len // block_size) + 1) * self.cache.block_bytes
        if needed > kv_cache_bytes:
            fits = self.cache.num_blocks * block_size
            raise ValueError(
                f"kv_cache_bytes: {kv_cache_bytes} holds {fits} tokens; max_model_len {self.max_model_len} needs "
                f"at least {needed}"
            )
        expert_bytes = sum(p.nbytes for module in loaded.expert_modules for p in module.parameters())
        all_bytes = sum(p.nbytes for p in self.model.parameters()) + sum(b.nbytes for b in self.model.buffers())
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
                eos_token_ids=_eos_token_ids(directory, text_config),
            ),
            num_local_experts=len(self.placement.experts_of(rank)),
            expert_bytes=expert_bytes,
            dense_bytes=all_bytes - expert_bytes,
            bytes_read=loaded.bytes_read,
            checkpoint_bytes=loaded.checkpoint_bytes,
            num_kv_blocks=self.cache.num_blocks,
            kv_block_bytes=self.cache.block_bytes,
            load_s=time.perf_counter() - started,
        )

    def connect(self, group: dist.ProcessGroup | None) -> None:
        """Dispatch over ``group`` (the default group when None) from the next step on."""
        assert self.num_ranks > 1, "one rank needs no process group"
        hidden_bytes = self.hidden_size * torch.empty((), dtype=self.dtype).element_size()
        self.experts.dispatcher = AllToAllDispatcher(
            self.placement, self.rank, group, self.log, self.device, hidden_bytes, self.top_k
        )

    @torch.inference_mode()
    def step(self, plan: RankPlan) -> RankResult:
        """Run one step; the result is only true once every rank has answered it."""
        started = time.thread_time()
        self._apply_tables(plan)
        rows = pack(plan, self.cache.tables, self.cache.block_size, self.cache.scratch_slot)
        self.log.reset()
        logits = self._forward(rows)
        num_sampled = len(rows.sampled_rows)
        samplings = [request.sampling for request in plan.requests for _ in range(request.num_sampled_rows)]
        positions = (rows.positions[rows.sampled_rows] + 1).tolist()
        sampled = sample(adjust(logits[:num_sampled], plan.requests, positions, self.texts), samplings, positions)
        token_ids, start = [], 0
        logprobs: dict[int, Logprobs] = {}
        for request in plan.requests:
            stop = start + request.num_sampled_rows
            tokens, path = accept(request, sampled[start:stop])
            self.cache.compact(request.request_id, request.committed_len, path)
            token_ids.append(tokens)
            if tokens and request.sampling.logprobs is not None:
                emitted = torch.tensor(path[request.first_sampled_row :]) - request.first_sampled_row
                logprobs[request.request_id] = token_logprobs(
                    logits[start:stop][emitted.to(self.device)], tokens, request.sampling.logprobs
                )
            start = stop
        return RankResult(
            generation=plan.generation,
            step_id=plan.step_id,
            rank=self.rank,
            token_ids=token_ids,
            counts=self.experts.counts,
            num_collectives=self.log.num_collectives,
            collectives_crc=self.log.crc,
            logprobs=logprobs,
            prompt_logprobs=target_logprobs(plan.requests, logits[num_sampled:]),
            thread_time_s=time.thread_time() - started,
        )

    def _apply_tables(self, plan: RankPlan) -> None:
        self.texts.update(plan, new_generation=plan.generation != self.generation)
        if plan.generation != self.generation:
            self.cache.tables.clear()
            self.generation = plan.generation
        for request_id in plan.released:
            self.cache.tables.pop(request_id, None)
        for request in plan.requests:
            self.cache.set_blocks(request.request_id, request.first_block, request.new_blocks)

    def _forward(self, rows: PackedRows) -> torch.Tensor:
        """Return logits [S, V] of the sampled rows and, behind them, of the scored ones."""
        self.cache.rows = rows = rows.to(self.device)
        self.experts.begin(rows.valid)
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
        plan = RankPlan(generation=-1, step_id=-1, row_bucket=1)
        self._forward(pack(plan, {}, self.cache.block_size, 0))
        for router in self.routers:
            router.audit = False


def _resolve_device(device: str, rank: int) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is not available on this machine; choose cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", rank % torch.cuda.device_count())
    return torch.device("cpu")


def _num_experts(config: object) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        value = getattr(config, name, None)
        if value:
            return int(value)
    raise ValueError("model: config.json names no number of experts")


def _eos_token_ids(directory: Path, config: object) -> tuple[int, ...]:
    from transformers import GenerationConfig

    eos = None
    if (directory / "generation_config.json").is_file():
        try:
            eos = GenerationConfig.from_pretrained(directory).eos_token_id
        except (OSError, ValueError) as error:
            raise ValueError(f"model: generation_config.json in {directory} cannot be used: {error}") from error
    if eos is None:
        eos = getattr(config, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
