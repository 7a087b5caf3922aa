"""Models of published shapes with random weights, made where they are used: never on a disk, never from a hub.

**Scales.** A matrix has the standard deviation 1 / sqrt(inputs), so that what goes in and what comes out are of a
size. Projections that add to the residual stream are smaller: all layers together add `LAYERS_ENERGY` of the energy of
the embeddings, so that routers of late layers still see the token. Norms are ones; biases and sinks are small.

**Skew.** Random routers choose all experts alike. How far a model's choice is from that is put into its embeddings: a
token's is the sum of three random vectors, one that all tokens share, one that the tokens of its topic share, and its
own. A router is linear in what it reads, so its logits are sums of three normal numbers of each expert, its
popularity in the layer, its fit to the text and its fit to the row, as in `expert_layers.draw`; and whoever computes
the model with these weights routes alike. `DEMO` has the shares that give the popularity and the distinct experts of
the demo model (`routing_skew`); `UNEQUAL` those of `expert_layers.draw`, one third each. Token t is of topic t %
`NUM_TOPICS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..workers.loader import LoadedModel, build

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NUM_TOPICS = 64
LAYERS_ENERGY = 0.1
_SMALL = 0.02


@dataclass(frozen=True, slots=True)
class Skew:
    """Shares of the variance of routers' logits."""

    popularity: float
    """The same for all rows."""
    text: float
    """The same for rows of a topic."""

    @property
    def row(self) -> float:
        """What is left to each token."""
        return 1 - self.popularity - self.text


DEMO = Skew(0.015, 0.09)
UNEQUAL = Skew(1 / 3, 1 / 3)
SKEWS = {"demo": DEMO, "unequal": UNEQUAL}


def random_model(
    config: PreTrainedConfig, device: torch.device, *, dtype: torch.dtype, skew: Skew, seed: int
) -> LoadedModel:
    """Return a rank's whole model of ``config`` on ``device``, as `ModelRunner` takes it."""
    empty = build(config, dtype)
    model: Any = empty.model
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    model._move_missing_keys_from_meta_to_device(names, {"": device}, None, None)
    model._initialize_missing_keys(False)  # for the buffers: rotary frequencies
    model.tie_weights()
    model.eval()
    model.requires_grad_(False)
    _fill(model, skew, torch.Generator(device).manual_seed(seed))
    return LoadedModel(model, config, empty.expert_modules, empty.routers, 0, 0, eos_token_ids=())


def share_weights(owner: torch.nn.Module, other: torch.nn.Module) -> None:
    """Have ``other``, a model of the same class, use the parameters and buffers of ``owner``: no second copy."""
    theirs = dict(other.named_modules())
    for name, module in owner.named_modules():
        if name in theirs:
            theirs[name]._parameters.update(module._parameters)
            theirs[name]._buffers.update(module._buffers)
    left = [name for name, tensor in other.state_dict().items() if tensor.is_meta]
    assert not left, f"the same tensors in both; {left[:1]} is not"


@torch.no_grad()
def _fill(model: Any, skew: Skew, generator: torch.Generator) -> None:
    embeddings = model.get_input_embeddings().weight
    num_layers = model.config.get_text_config().num_hidden_layers
    output_gain = math.sqrt(LAYERS_ENERGY / (2 * num_layers))
    inputs_first = {
        id(parameter)
        for module in model.modules()
        if getattr(module, "is_transposed", False)
        for parameter in module.parameters(recurse=False)
    }
    for name, parameter in model.named_parameters():
        if parameter is embeddings:
            _embed(parameter, skew, generator)
        elif parameter.dim() == 1 or name.endswith("_bias"):
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=_SMALL, generator=generator)
        else:
            num_inputs = parameter.shape[-2 if id(parameter) in inputs_first else -1]
            gain = output_gain if "o_proj" in name or "down_proj" in name else 1.0
            parameter.normal_(std=gain / math.sqrt(num_inputs), generator=generator)


def _embed(embeddings: torch.Tensor, skew: Skew, generator: torch.Generator) -> None:
    """Fill [V, H]."""
    _, width = embeddings.shape
    shared = torch.empty(1 + NUM_TOPICS, width, device=embeddings.device).normal_(generator=generator)
    embeddings.normal_(std=math.sqrt(skew.row), generator=generator)
    common = math.sqrt(skew.popularity) * shared[0]
    for topic in range(min(NUM_TOPICS, len(embeddings))):
        embeddings[topic::NUM_TOPICS] += (common + math.sqrt(skew.text) * shared[1 + topic]).to(embeddings.dtype)


def tokens_of(topic: int, number: int, vocab_size: int, generator: torch.Generator) -> list[int]:
    """Return random tokens of one topic."""
    per_topic = (vocab_size - 1 - topic % NUM_TOPICS) // NUM_TOPICS + 1
    drawn = torch.randint(per_topic, (number,), generator=generator)
    return (drawn * NUM_TOPICS + topic % NUM_TOPICS).tolist()
