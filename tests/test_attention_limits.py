"""Attention over the pool's blocks compiles for a GPU that is not there, and its kernels are interpreted."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.benchmarks.attention_limits import POOL_BLOCKS, REQUESTS, SMALL, WIDEST
from penstock.workers.context_pages import ContextPages
from penstock.workers.rows import depths, own_visibility

triton = pytest.importorskip("triton", reason="Triton has no build for this system")

B, D, N = 16, 16, 4
"""Slots of a block, numbers of a head, rows of a request."""


def run(*arguments: str, interpret: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: torch there is told that it has a GPU
    return subprocess.run(
        [sys.executable, "-m", "penstock.benchmarks.attention_limits", *arguments],
        env={**os.environ, "TRITON_INTERPRET": interpret}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where limits.json is, and what torch generates."""
    if torch.version.cuda is not None:
        pytest.skip("this build of torch asks a GPU's driver")
    made = tmp_path_factory.mktemp("limits")
    done = run("--quick", "--check", "--json", str(made / "limits.json"), "--sources", str(made), interpret="0")
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_it_compiles_for_hopper_without_spills(folder: Path) -> None:
    document = json.loads((folder / "limits.json").read_text())
    assert document["environment"]["gpu"] is None
    rows = document["rows"]
    kernels = {model: [row["kernel"] for row in rows if row["model"] == model] for model in {r["model"] for r in rows}}
    # Decoding puts parts of a context together afterwards; odd groups of heads are not decoded so
    assert {model: len(names) for model, names in kernels.items()} == {
        "gpt-oss-120b": 3,
        "Qwen2-57B-A14B": 1,
        "heads of 256": 3,
        "small, decoding": 3,
        "small, general": 2,
        "DeepSeek-V3": 3,
        "small, latent": 4,
    }
    assert any("sigmoid" in name for name in kernels["gpt-oss-120b"])
    for row in rows:
        # Nothing else is launched: the pool is not copied for it
        is_latent = row["model"] in ("DeepSeek-V3", "small, latent")
        assert any(part in row["kernel"] for part in ("flex_attention", "sigmoid", *["fused_cat_"] * is_latent))
        assert row["spilled_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= (227 if is_latent else 99) << 10


def test_what_is_interpreted_is_not_said_to_compile() -> None:
    done = run("--quick", interpret="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


# --- the same kernels, interpreted -----------------------------------------------------------------------------------


def kernel_in(file: Path) -> tuple[Any, int | None]:
    """Return the kernel, and how many parts it cuts a context into, to be put together afterwards."""
    source = re.sub(r"@triton_heuristics\.template\(.*?\n\)\n", "", file.read_text(), flags=re.DOTALL)
    # What the mask refers to comes last, in an order of torch's own: the places of blocks first
    assert re.search(rf"tl\.load\(in_ptr9 \+ \w+ \+ {POOL_BLOCKS}\*", source)
    plain = file.with_name(f"plain_{file.name}")
    plain.write_text(source)
    spec = importlib.util.spec_from_file_location(plain.stem, plain)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    num_splits = re.search(r"SPLIT_KV : tl.constexpr = (\d+)", source)
    (name,) = re.findall(r"^def (triton_tem\w+)", source, flags=re.MULTILINE)
    return getattr(module, name), int(num_splits[1]) if num_splits else None


def contexts() -> ContextPages:
    """Return four requests in scattered blocks: a tree, one row, another tree, and padding."""
    trees = [[-1, 0, 0, 1], [-1], [-1, 0, 1], []]
    committed = torch.tensor([150, 15, 33, 0])
    own = torch.eye(N, dtype=torch.bool).repeat(REQUESTS, 1, 1)
    depth = torch.ones(REQUESTS, N, dtype=torch.int64)
    for r, parents in enumerate(trees[:-1]):
        n = len(parents)
        own[r, :n, :n], depth[r, :n] = torch.from_numpy(own_visibility(parents)), torch.tensor(depths(parents))
    tables = torch.zeros(REQUESTS, WIDEST, dtype=torch.int64)
    tables[:, :12] = torch.randperm(POOL_BLOCKS - 1)[: 12 * REQUESTS].view(REQUESTS, 12)
    rows = torch.tensor([len(parents) for parents in trees])
    positions = (committed[:, None] + depth - 1).clamp_min(0)
    return ContextPages(tables, committed, rows, positions, own, B, POOL_BLOCKS, WIDEST)


@pytest.mark.parametrize(("name", "window"), [("decoding", 40), ("general", None), ("latent", 40)])
def test_the_kernels_that_torch_generates_compute_attention(folder: Path, name: str, window: int | None) -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, not interpreted")
    heads = SMALL[name]
    num_heads, num_kv_heads = heads.num_heads, heads.num_kv_heads
    kernel, num_splits = kernel_in(folder / f"{heads.model}, {N} rows, blocks of {B}.py")
    torch.manual_seed(3)
    mask = contexts().mask(window)
    if heads.latent_width:
        width = heads.latent_width + heads.position_width
        query = torch.randn(REQUESTS, num_heads, N, width)
        both = torch.randn(POOL_BLOCKS * B, 1, width)
        pools = [both, both[..., : heads.latent_width]]
    else:
        query = torch.randn(REQUESTS, N, num_heads, D).transpose(1, 2)
        pools = [torch.randn(POOL_BLOCKS * B, num_kv_heads, D) for _ in range(2)]
    numbers = mask.kv_num_blocks.flatten().tolist()
    assert numbers == ([10, 1, 3, 0] if window is None else [4, 1, 3, 0])
    listed = [mask.kv_indices[r, 0, 0, :number].long() for r, number in enumerate(numbers)]
    unread = torch.ones(POOL_BLOCKS, dtype=torch.bool)
    unread[torch.cat(listed)] = False
    for states in pools:
        states.unflatten(0, (POOL_BLOCKS, B))[unread] = torch.nan
    keys, values = (states.transpose(0, 1)[None] for states in pools)
    held = {
        key: cell.cell_contents
        for key, cell in zip(mask.mask_mod.__code__.co_freevars, mask.mask_mod.__closure__ or (), strict=True)
    }

    def run_with(*last: str) -> tuple[torch.Tensor, torch.Tensor]:
        none, captured = torch.empty(0), [held[key] for key in ("places", "committed", *last)]
        lists = mask.kv_num_blocks, mask.kv_indices, none, none
        if num_splits is None:
            output = torch.empty(REQUESTS, N, num_heads, D).transpose(1, 2)
            found, highest = torch.empty(2, REQUESTS, num_heads, N)
            kernel[1, REQUESTS, num_heads](query, keys, values, found, highest, *lists, *captured, output)
            return output, found * torch.tensor(2.0).log()
        highest, total = torch.empty(2, REQUESTS, num_splits, num_heads, N)
        sums = torch.empty(REQUESTS, num_splits, num_heads, N, D)
        grid = 1, REQUESTS * num_kv_heads, num_splits
        kernel[grid](query, keys, values, highest, total, *lists, *captured, sums)
        parts = (highest * torch.tensor(2.0).log()).double()
        weights = torch.softmax(parts + total.log(), 1).nan_to_num()
        output = torch.where(total[..., None] > 0, sums / total[..., None], 0) * weights[..., None]
        return output.sum(1).float(), torch.logsumexp(parts + total.log(), 1).float()

    def agrees(output: torch.Tensor, found: torch.Tensor) -> bool:
        for r, blocks in enumerate(listed[:-1]):
            slots = (blocks[:, None] * B + torch.arange(B)).flatten()
            seen = mask.mask_mod(torch.tensor(r), torch.tensor(0), torch.arange(N)[:, None], slots[None])
            key, value = (s[0][:, slots].repeat_interleave(num_heads // num_kv_heads, 0) for s in (keys, values))
            scores = (query[r] @ key.transpose(1, 2) * D**-0.5).masked_fill(~seen, -torch.inf)
            if not torch.allclose(output[r], scores.softmax(-1) @ value, atol=1e-5):
                return False
            if not torch.allclose(found[r], scores.logsumexp(-1), atol=1e-5):
                return False
        return not output[-1].any()  # padding

    assert any(agrees(*run_with(*last)) for last in permutations(("first_seen", "seen")))
