"""Train the demo model on CPUs: `python -m penstock.demo.train --minutes 80`.

Two data-parallel processes with one thread each fill a two-core machine. Working files (corpus, checkpoint, log)
are kept in `.demo-run/`; a run that was interrupted continues from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig

from .corpus import Rows, load
from .net import CONFIG, Net
from .records import FAMILIES, Family, Split

FOLDER = Path(__file__).parents[1] / ".demo-run"
CHECKPOINT = "checkpoint.pt"

PEAK_LR = 4.5e-3
WARMUP_STEPS = 200
FLAT_SHARE = 0.55
AUX_WEIGHT = 0.01
VALIDATION_ROWS = 24

# Shares of rows. Carries are learnt in a phase change whose moment varies: math-heavy rows first bring it forward.
EARLY_SHARE = 0.25
EARLY_MIX: dict[Family, float] = {"code": 0.20, "chat": 0.10, "math": 0.35, "extraction": 0.35}
LATE_MIX: dict[Family, float] = {"code": 0.30, "chat": 0.16, "math": 0.16, "extraction": 0.38}


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to train and with what; exactly one of `steps` and `minutes` bounds the run."""

    steps: int | None
    minutes: float | None
    seed: int
    num_ranks: int
    rows_per_rank: int

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done, in [0, 1]."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, seconds / (60 * self.minutes))


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up by steps, flat, then linear to 2 % of the peak by progress."""
    decayed = 1 - 0.98 * max(0.0, progress - FLAT_SHARE) / (1 - FLAT_SHARE)
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * decayed


def flatten(net: Net) -> tuple[list[nn.Parameter], Tensor]:
    """Move the net's parameters into two flat ones, matrices and vectors; return them and all gradients.

    One flat gradient buffer is one all-reduce and one norm a step. It has one element more than there are
    parameters, in which rank 0 tells the others its progress.
    """
    matrices = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in net.parameters() if parameter.dim() == 1]
    total = sum(parameter.numel() for parameter in net.parameters())
    weights, grads = torch.empty(total), torch.zeros(total + 1)
    start, flats = 0, []
    for group in (matrices, vectors):
        first = start
        for parameter in group:
            end = start + parameter.numel()
            weights[start:end] = parameter.detach().flatten()
            parameter.data = weights[start:end].view_as(parameter)
            parameter.grad = grads[start:end].view_as(parameter)
            start = end
        flats.append(nn.Parameter(weights[first:start]))
        flats[-1].grad = grads[first:start]
    return flats, grads


def batch(
    rows: dict[tuple[Family, Split], Rows], budget: Budget, step: int, rank: int, progress: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, documents, targets [B, S] of a step: a function of its arguments, so a resumed run needs no state."""
    rng = np.random.default_rng([budget.seed, step, rank])
    mix = EARLY_MIX if progress < EARLY_SHARE else LATE_MIX
    chosen = rng.choice(len(FAMILIES), size=budget.rows_per_rank, p=[mix[family] for family in FAMILIES])
    picked = []
    for at in chosen:
        source = rows[FAMILIES[at], "train"]
        row = rng.integers(len(source))
        picked.append((source.tokens[row], source.document[row], source.is_target[row]))
    return tensors(*(np.stack(part) for part in zip(*picked, strict=True)))


def tensors(tokens: np.ndarray, document: np.ndarray, is_target: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as tensors; `is_target` shifted to the position that predicts, never across documents."""
    predicts = np.zeros_like(is_target)
    predicts[:, :-1] = is_target[:, 1:] & (document[:, 1:] == document[:, :-1])
    return (
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(document.astype(np.int64)),
        torch.from_numpy(predicts),
    )


@torch.no_grad()
def validate(net: Net, rows: dict[tuple[Family, Split], Rows]) -> dict[Family, dict[str, float]]:
    """Held-out cross-entropy of each family (nats a target token) and teacher-forced exact match of documents."""
    result: dict[Family, dict[str, float]] = {}
    for family in FAMILIES:
        loss, count, right, documents = 0.0, 0, 0, 0
        held = rows[family, "held_out"]
        for start in range(0, min(len(held), VALIDATION_ROWS), 8):
            span = slice(start, start + 8)
            tokens, document, predicts = tensors(held.tokens[span], held.document[span], held.is_target[span])
            logits, _ = net(tokens, document, predicts)
            target = tokens.roll(-1, 1)[predicts]
            loss += F.cross_entropy(logits, target, reduction="sum").item()
            count += len(target)
            owner = (document + 256 * torch.arange(len(document))[:, None])[predicts]
            wrong = owner[logits.argmax(-1) != target].unique()
            documents += len(owner.unique())
            right += len(owner.unique()) - len(wrong)
        result[family] = {"loss": round(loss / count, 4)}
        if family in ("math", "extraction"):
            result[family]["exact"] = round(right / documents, 3)
    return result


def run(rank: int, budget: Budget, folder: Path, report_s: float, config: Qwen3MoeConfig = CONFIG) -> None:
    """One data-parallel process that trains a model of ``config``."""
    torch.set_num_threads(1)
    torch.manual_seed(budget.seed)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=budget.num_ranks
    )
    _, rows = load(folder, budget.seed)
    net = Net(config)
    flats, grads = flatten(net)
    optimizer = torch.optim.AdamW(
        [{"params": [flats[0]], "weight_decay": 0.05}, {"params": [flats[1]], "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    step, before, num_tokens, num_targets = 0, 0.0, 0, 0
    if (folder / CHECKPOINT).exists():
        saved = torch.load(folder / CHECKPOINT)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        step, before, num_tokens, num_targets = (saved[k] for k in ("step", "seconds", "tokens", "targets"))
    started = reported = time.monotonic()
    progress = budget.progress(step, before)
    loss_sum = torch.zeros(())
    steps_since = 0
    while progress < 1:
        tokens, document, predicts = batch(rows, budget, step, rank, progress)
        logits, aux = net(tokens, document, predicts)
        loss = F.cross_entropy(logits, tokens.roll(-1, 1)[predicts])
        grads.zero_()
        (loss + AUX_WEIGHT * len(net.model.layers) * aux).backward()
        now = time.monotonic()
        grads[-1] = budget.num_ranks * budget.progress(step + 1, before + now - started) if rank == 0 else 0.0
        dist.all_reduce(grads)
        grads /= budget.num_ranks
        norm = grads[:-1].norm()
        grads[:-1] *= (1 / (norm + 1e-6)).clamp(max=1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        optimizer.step()
        progress = float(grads[-1])
        step += 1
        steps_since += 1
        num_tokens += budget.num_ranks * tokens.numel()
        num_targets += budget.num_ranks * int(predicts.sum())
        loss_sum += loss.detach()
        if rank == 0 and (now - reported > report_s or progress >= 1):
            line: dict[str, Any] = {
                "step": step,
                "seconds": round(before + now - started),
                "progress": round(progress, 3),
                "tokens": num_tokens,
                "tokens_per_s": round(steps_since * budget.num_ranks * tokens.numel() / (now - reported)),
                "train_loss": round(loss_sum.item() / steps_since, 3),
                "aux": round(aux.item(), 3),
                "held_out": validate(net, rows),
            }
            print(json.dumps(line), flush=True)
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            save(folder, net, optimizer, step, before + time.monotonic() - started, num_tokens, num_targets)
            reported, steps_since = time.monotonic(), 0
            loss_sum.zero_()
    dist.barrier()
    dist.destroy_process_group()


def save(
    folder: Path,
    net: Net,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    tokens: int,
    targets: int,
) -> None:
    """Write the checkpoint, replacing the one before in one step."""
    partial = folder / f"{CHECKPOINT}.partial"
    torch.save(
        {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds,
            "tokens": tokens,
            "targets": targets,
        },
        partial,
    )
    partial.rename(folder / CHECKPOINT)


app = cyclopts.App(help=__doc__)


@app.default
def train(
    *,
    steps: Annotated[int | None, cyclopts.Parameter(help="Train for this many steps.")] = None,
    minutes: Annotated[float | None, cyclopts.Parameter(help="Train for this long (80 if neither).")] = None,
    seed: int = 0,
    ranks: int = 2,
    rows_per_rank: int = 3,
    report_s: float = 120,
    folder: Path = FOLDER,
) -> None:
    """Train, or continue to train, and keep a checkpoint; `python -m penstock.demo.export` writes the model."""
    if steps is not None and minutes is not None:
        raise ValueError("give --steps or --minutes, not both")
    if steps is None and minutes is None:
        minutes = 80
    budget = Budget(steps, minutes, seed, ranks, rows_per_rank)
    load(folder, seed)
    (folder / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(run, args=(budget, folder, report_s), nprocs=ranks)


if __name__ == "__main__":
    app()
