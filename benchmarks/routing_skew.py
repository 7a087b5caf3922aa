"""How unevenly the demo model routes, and random models that are to route alike (`random_model`).

Three figures, of layers on average: how far experts' loads are from each other over many texts (standard deviation over
mean), and the distinct experts that eight rows visit, if they follow each other in one text and if each is of another
text. Uniform routing has 0 and E (1 - (1 - K / E)^8), for E experts of which a row uses K.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from .. import demo
from ..cluster.api.chat_tokenizer import ChatTokenizer
from ..demo import prompts
from ..demo.records import FAMILIES
from ..workers.config_file import load_config
from ..workers.runner import ModelRunner
from .counted_ranks import RecordingDispatcher
from .fixed_steps import FixedSteps, whole_prompt
from .harness import Measurement, Options, Row, Target, run
from .random_model import DEMO, Skew, random_model

MODEL = Path(demo.__file__).parent / "model"
ROWS = 8
_BLOCK_SIZE = 16
_RANDOM_TEXTS, _RANDOM_TOKENS = 48, 64
_SEEDS = 4
_GROUPS = 200
NONE = Skew(0.0, 0.0)
_VOCABULARY = 1 << 15
"""Of random models: a real one's, since topics of few tokens would repeat them."""


@dataclass(frozen=True, slots=True)
class Unevenness:
    """What the module says."""

    load_spread: float
    distinct_in_text: float
    distinct_of_texts: float

    def row(self, model: str) -> Row:
        """Return it as a row."""
        return {
            "model": model,
            "load_spread": round(self.load_spread, 3),
            "distinct_in_text": round(self.distinct_in_text, 2),
            "distinct_of_texts": round(self.distinct_of_texts, 2),
        }


def choices(runner: ModelRunner, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return the experts [L, T, K] that each text's tokens chose."""
    dispatcher = RecordingDispatcher()
    runner.experts.dispatcher = dispatcher
    found = []
    for text in texts:
        dispatcher.ids.clear()
        runner.step(whole_prompt(text, runner.cache.block_size))
        found.append(torch.stack(dispatcher.ids))
    return found


def unevenness(found: Sequence[torch.Tensor], num_experts: int) -> Unevenness:
    """Return the figures of some texts' choices [L, T, K]."""
    num_layers = len(found[0])
    loads = [
        torch.stack([layers[layer].flatten().bincount(minlength=num_experts) / layers.shape[1] for layers in found])
        for layer in range(num_layers)
    ]
    means = [load.mean(dim=0) for load in loads]
    starts = [(layers, start) for layers in found for start in range(0, layers.shape[1] - ROWS + 1, ROWS)]
    in_text = [len(layers[n, start : start + ROWS].unique()) for layers, start in starts for n in range(num_layers)]
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randperm(len(found), generator=generator)[:ROWS].tolist() for _ in range(_GROUPS)]
    places = torch.rand(_GROUPS, ROWS, generator=generator).tolist()
    rows = [
        torch.stack([found[text][:, int(place * found[text].shape[1])] for text, place in zip(*pair, strict=True)])
        for pair in zip(groups, places, strict=True)
    ]
    of_texts = [len(chosen[:, n].unique()) for chosen in rows for n in range(num_layers)]
    return Unevenness(
        statistics.fmean(float(mean.std(correction=0) / mean.mean()) for mean in means),
        statistics.fmean(in_text),
        statistics.fmean(of_texts),
    )


def demo_texts(number: int) -> list[list[int]]:
    """Return answers of all families in turn, held out from training, without their prompts."""
    tokenizer = ChatTokenizer(str(MODEL))
    records = [record for turn in zip(*map(prompts.load, FAMILIES), strict=True) for record in turn]
    texts = (tokenizer.encode(record.answer, add_special_tokens=False)[:256] for record in records)
    return list(islice((text for text in texts if len(text) >= 2 * ROWS), number))


def of_demo(number: int) -> Unevenness:
    """Return the demo model's figures."""
    runner = ModelRunner(model=str(MODEL), dtype="float32", device="cpu", max_model_len=512, kv_cache_bytes=8 << 20)
    return unevenness(choices(runner, demo_texts(number)), runner.info.model.num_experts)


def of_random(skew: Skew, seed: int) -> Unevenness:
    """Return those of a random model of the demo's shape; each text is of a topic of its own."""
    config, cpu = load_config(MODEL), torch.device("cpu")
    config.vocab_size = _VOCABULARY
    loaded = random_model(config, cpu, dtype=torch.float32, skew=skew, seed=seed)
    runner = ModelRunner(model="random", device="cpu", max_model_len=512, kv_cache_bytes=8 << 20, loaded=loaded)
    model = runner.info.model
    steps = FixedSteps(_RANDOM_TEXTS, _RANDOM_TOKENS, model.vocab_size, _BLOCK_SIZE, 512)
    texts = [steps.tokens(number) for number in range(_RANDOM_TEXTS)]
    return unevenness(choices(runner, texts), model.num_experts)


def measure(options: Options) -> Measurement:
    """Compare."""
    torch.set_num_threads(1)
    real = of_demo(32 if options.quick else 128)
    seeds = range(options.seed, options.seed + (2 if options.quick else _SEEDS))
    mean, flat = _mean([of_random(DEMO, seed) for seed in seeds]), _mean([of_random(NONE, seed) for seed in seeds])
    rows = [real.row("demo"), mean.row("random, skew of the demo"), flat.row("random, no skew")]
    targets = [
        Target(f"{name}, random from demo, relative", abs(getattr(mean, name) / getattr(real, name) - 1), at_most=most)
        for name, most in zip(Unevenness.__slots__, (0.15, 0.05, 0.05), strict=True)
    ]
    return Measurement(rows, targets, "float32", 1)


def _mean(found: Sequence[Unevenness]) -> Unevenness:
    return Unevenness(*(statistics.fmean(getattr(one, name) for one in found) for name in Unevenness.__slots__))


if __name__ == "__main__":
    sys.exit(run("routing_skew", measure))
