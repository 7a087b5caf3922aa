"""Models of published shapes with random weights, made where they run: nothing of such a size is read or written.

Random weights route nearly uniformly. So all tokens' embeddings share a direction, and each router is given, along what
that has become in its layer, a popularity of every expert (`skew_routers`): as much as makes eight rows choose as few
distinct experts, of those that uniform choices would, as eight rows of the demo model do (`demo_share`).

Shapes: T rows, H hidden, E experts, K experts per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..workers.loader import LoadedModel, build, finish
from ..workers.plan import RankPlan
from ..workers.runner import ModelRunner
from .fixed_steps import FixedSteps

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GROUP = 8
"""Rows whose distinct experts are compared."""
_SAMPLE = 256
"""Rows that a router's popularity is fitted to."""


def _mixtral() -> PreTrainedConfig:
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
    )


def _olmoe() -> PreTrainedConfig:
    from transformers import OlmoeConfig

    return OlmoeConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=4096,
    )


def _qwen3() -> PreTrainedConfig:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,  # type: ignore[call-arg]
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40960,
    )


def _deepseek_v2_lite() -> PreTrainedConfig:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        norm_topk_prob=False,
        max_position_embeddings=163840,
    )


def _gpt_oss() -> PreTrainedConfig:
    from transformers import GptOssConfig

    return GptOssConfig(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "OLMoE-1B-7B": _olmoe,
    "Qwen3-30B-A3B": _qwen3,
    "DeepSeek-V2-Lite": _deepseek_v2_lite,
    "GPT-OSS-20B": _gpt_oss,
    "Mixtral-8x7B": _mixtral,
}
"""Of the published config.json files, as far as sizes go; without YaRN, which changes no cost."""


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int) -> LoadedModel:
    """Return an untrained model of ``config``, with all its experts; its tokens' embeddings share a direction."""
    torch.manual_seed(seed)
    empty = build(config, dtype)
    model = empty.model
    finish(model, set(model.state_dict()), device)
    embeddings: Any = model.get_input_embeddings().weight
    with torch.no_grad():
        embeddings += embeddings.float().std() * torch.randn(embeddings.shape[1], device=device).to(dtype)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return LoadedModel(model, config, empty.expert_modules, empty.routers, 0, num_bytes, ())


def uniform_experts(num_experts: int, top_k: int) -> float:
    """Return how many distinct experts `GROUP` rows choose on average, if all choices are as likely."""
    return num_experts * (1 - (1 - top_k / num_experts) ** GROUP)


@torch.inference_mode()
def skew_routers(runner: ModelRunner, routers: Sequence[torch.nn.Module], share: float, seed: int) -> list[float]:
    """Give experts of all ``routers`` popularities, in place; return the share that each reaches.

    ``share``: distinct experts that `GROUP` rows of a text choose, over `uniform_experts`.
    """
    seen: list[torch.Tensor] = []
    hooks = [
        router.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2).float()))
        for router in routers
    ]
    steps = FixedSteps(runner, num_requests=1, context=_SAMPLE, seed=seed)
    steps.fill()
    for hook in hooks:
        hook.remove()
    model = runner.info.model
    uniform = uniform_experts(model.num_experts, model.num_experts_per_tok)
    generator = torch.Generator().manual_seed(seed)
    reached = []
    for router, hidden in zip(routers, seen, strict=True):
        weight: torch.Tensor = router.get_parameter("weight")
        mean = hidden.mean(0)
        direction = mean / mean.square().sum()
        along = hidden @ direction  # [T], about 1
        # Its own popularities would come on top
        weight.sub_(((weight.float() @ mean)[:, None] * direction).to(weight.dtype))
        logits = hidden @ weight.float().t()
        popularity = torch.randn(len(weight), generator=generator).to(weight.device) * logits.std()
        low, high = 0.0, 64.0
        for _ in range(24):
            scale = (low + high) / 2
            found = _distinct(logits + scale * along[:, None] * popularity, model.num_experts_per_tok) / uniform
            low, high = (scale, high) if found > share else (low, scale)
        weight.add_((high * popularity[:, None] * direction).to(weight.dtype))
        reached.append(_distinct(hidden @ weight.float().t(), model.num_experts_per_tok) / uniform)
    return reached


def _distinct(logits: torch.Tensor, top_k: int) -> float:
    """Return the distinct experts that `GROUP` rows in a row choose, on average; ``logits`` [T, E]."""
    chosen = logits.topk(top_k).indices
    groups = chosen[: len(chosen) // GROUP * GROUP].view(-1, GROUP * top_k)
    is_chosen = torch.zeros(len(groups), logits.shape[1], device=logits.device).scatter_(1, groups, 1.0)
    return float(is_chosen.sum(1).mean())


def demo_share(runner: ModelRunner, model: Path) -> float:
    """Return the distinct experts that `GROUP` rows of held-out texts choose in the demo, over `uniform_experts`."""
    from ..cluster.api.chat_tokenizer import ChatTokenizer
    from ..demo import prompts
    from ..demo.records import FAMILIES

    tokenizer = ChatTokenizer(str(model))
    counts: list[int] = []
    for family in FAMILIES:
        for record in prompts.load(family)[:4]:
            ids = tokenizer.encode_chat([{"role": "user", "content": record.messages[0].content}])
            if len(ids) < 2 * GROUP:
                continue
            steps = FixedSteps(runner, num_requests=1, context=len(ids) - GROUP, seed=0, text=ids)
            steps.fill()
            plan: RankPlan = steps.plan(GROUP)
            counts += runner.step(plan).counts.experts
    known = runner.info.model
    return sum(counts) / len(counts) / uniform_experts(known.num_experts, known.num_experts_per_tok)
