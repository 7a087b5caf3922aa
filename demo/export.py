"""Write the last checkpoint as a transformers model: `python -m penstock.demo.export`.

Each file is replaced in one step, so that a reader never sees half of one.
"""

from __future__ import annotations

import copy
import json
import platform
import tempfile
from pathlib import Path

import cyclopts
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from .net import CONFIG, Net
from .train import CHECKPOINT, FOLDER

MODEL = Path(__file__).parent / "model"
MAX_BYTES = 16_000_000

app = cyclopts.App(help=__doc__)


@app.default
def export(*, folder: Path = FOLDER, model: Path = MODEL) -> None:
    """Export weights, configuration, tokenizer and the facts of the run, in float32."""
    write_model(folder, model, CONFIG)


def write_model(folder: Path, model: Path, trained: Qwen3MoeConfig) -> None:
    """Export the checkpoint in ``folder`` of a model of the configuration ``trained`` to ``model``."""
    saved = torch.load(folder / CHECKPOINT)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    net = Net(trained)
    net.load_state_dict(saved["net"])
    config = copy.deepcopy(trained)
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    exported = Qwen3MoeForCausalLM(config).eval()
    exported.load_state_dict(net.state_dict())
    exported.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        fresh = Path(name)
        exported.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        _tidy(fresh)
        _check(net, fresh)
        facts = {
            **{key: saved[key] for key in ("step", "tokens", "targets")},
            "seconds": round(saved["seconds"]),
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        (fresh / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        for path in sorted(fresh.iterdir()):
            path.chmod(0o644)
            path.replace(model / path.name)
    print(f"step {saved['step']} written to {model.name}/")


def _tidy(fresh: Path) -> None:
    """Names that readers other than the newest transformers know, and no traces of how the files were loaded."""
    path = fresh / "config.json"
    config = json.loads(path.read_text())
    config["num_experts"] = config["num_local_experts"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = fresh / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def _check(net: Net, written: Path) -> None:
    """The written model must compute what was trained, and be small enough to ship."""
    loaded = Qwen3MoeForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    tokens = torch.randint(0, loaded.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    logits, _ = net(tokens, torch.ones_like(tokens))
    torch.testing.assert_close(loaded(tokens).logits.flatten(0, 1), logits, rtol=1e-4, atol=1e-4)
    size = (written / "model.safetensors").stat().st_size
    assert size <= MAX_BYTES, f"model.safetensors has {size} bytes, more than {MAX_BYTES}"


if __name__ == "__main__":
    app()
