"""Experts that stay as a quantised checkpoint stores them, beside the same ones dequantised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .triton_device import DEVICE  # isort: skip
from penstock.router.placement import Placement, contiguous
from penstock.workers import gpu_experts as choice
from penstock.workers.experts import ExpertShard
from penstock.workers.loader import LoadedModel, build, inspect, load, load_dense, load_experts
from penstock.workers.plan import RankPlan, RequestPlan
from penstock.workers.rebalance_plan import RebalancePlan
from penstock.workers.runner import ModelRunner
from penstock.workers.sampling_params import TokenSampling
from penstock.workers.stored_experts import kept_storage, stored_weights

from .quantized_checkpoints import Tensors, fp8_of, mxfp4_of, stacked, tensors_of, write
from .test_expert_mover import Gang
from .uneven_placement import uneven

E, F = 8, 24
CPU = torch.device("cpu")
PROJECTIONS = ("gate_up_proj", "down_proj")
# How the experts lie in the checkpoint, and blocks: a gate has 24 rows, its inputs are 32 or 24
CASES = {"qwen3_moe": (8, 16), "qwen3_moe stacked": (16, 16), "minimax_m2": (24, 32), "gpt_oss": None}


def none(module: torch.nn.Module, device: torch.device) -> str:
    return ""


def elsewhere(module: torch.nn.Module, device: torch.device) -> str:
    return "not here"


@pytest.fixture(scope="module")
def quantized(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[str, tuple[int, int] | None], Path] = {}

    def make(case: str, block: tuple[int, int] | None = None) -> Path:
        block = block or CASES[case]
        if (case, block) not in made:
            target = tmp_path_factory.mktemp("stored")
            source = checkpoint(case.split()[0])
            if case.endswith("stacked"):
                source = stacked(source, target / "stacked")
            made[case, block] = (mxfp4_of(source, target) if block is None else fp8_of(source, target, block))[0]
        return made[case, block]

    return make


def load_rank(
    directory: Path,
    objection: Callable[[Any, torch.device], str] = none,
    placement: Placement | None = None,
    rank: int = 0,
) -> LoadedModel:
    path, config = inspect(str(directory))
    empty = build(config, torch.float32)
    placement = placement or contiguous(len(empty.expert_modules), E, 1)
    return load(path, empty, CPU, placement, rank, objection=objection)


def bytes_of_experts(tensors: Tensors) -> int:
    return sum(tensor.nbytes for key, tensor in tensors.items() if ".experts." in key)


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_shards_hold_what_the_files_hold(case, quantized):
    directory = quantized(case)
    in_file = bytes_of_experts(tensors_of(directory))
    full = load_rank(directory, elsewhere).expert_modules
    for placement in (contiguous(len(full), E, 1), uneven(len(full))):
        for rank in range(placement.num_ranks):
            loaded = load_rank(directory, none, placement, rank)
            for layer, (module, whole) in enumerate(zip(loaded.expert_modules, full, strict=True)):
                owned = placement.experts_of(layer, rank)
                for name in PROJECTIONS:
                    worth, expected = stored_weights(module, name).dense(), whole.get_parameter(name)[owned]
                    assert torch.equal(worth.transpose(1, 2) if case == "gpt_oss" else worth, expected)
                    assert module.get_parameter(name).itemsize == 1
                    if module.has_bias:
                        bias = f"{name}_bias"
                        assert torch.equal(module.get_parameter(bias), whole.get_parameter(bias)[owned])
            shards = [ExpertShard(module) for module in loaded.expert_modules]
            num_held = sum(shard.num_experts for shard in shards)
            held = in_file * num_held // (E * len(full))
            assert sum(shard.num_bytes for shard in shards) == held
            assert [shard.bytes_per_expert for shard in shards] == [in_file // (E * len(full))] * len(shards)
            assert loaded.bytes_read == loaded.checkpoint_bytes - in_file + held
            assert not any(parameter.is_meta for parameter in loaded.model.parameters())


def test_scales_of_powers_of_two_in_a_byte_are_widened(quantized, tmp_path):
    source = quantized("qwen3_moe")
    tensors = {
        key: tensor.to(torch.float8_e8m0fnu) if key.endswith("_scale_inv") else tensor
        for key, tensor in tensors_of(source).items()
    }
    directory = write(source, tmp_path / "e8m0", tensors)
    full = load_rank(directory, elsewhere).expert_modules
    for module, whole in zip(load_rank(directory).expert_modules, full, strict=True):
        for name in PROJECTIONS:
            assert module.get_parameter(f"{name}_scales").dtype == torch.float32
            assert torch.equal(stored_weights(module, name).dense(), whole.get_parameter(name))


class LargestFloats(TorchDispatchMode):
    """How many numbers the largest tensor has that is in a type to compute in, and not of the ``known`` ones."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known if not tensor.is_meta}
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
                and not tensor.is_meta
                and tensor.untyped_storage().data_ptr() not in self.known
            ):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_no_expert_is_ever_dequantised(case, quantized, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # what threads do is not seen
    path, config = inspect(str(quantized(case)))
    largest = {}
    for objection in (none, elsewhere):
        dense = load_dense(path, build(config, torch.bfloat16), CPU, objection=objection)
        with LargestFloats(dense.empty.model.parameters()) as seen:
            load_experts(path, dense, contiguous(len(dense.empty.expert_modules), E, 1), 0)
        largest[objection] = seen.numel
    one_projection = 32 * (F if case == "qwen3_moe" else 32)
    assert largest[none] < one_projection <= largest[elsewhere]


# --- what is computed ------------------------------------------------------------------------------------------------


def runner_of(directory: Path, dtype: str, device: str, objection: Callable[[Any, torch.device], str]) -> ModelRunner:
    path, config = inspect(str(directory))
    dense = load_dense(
        path, build(config, getattr(torch, dtype)), torch.device(device, 0 if device == "cuda" else None),
        objection=objection,
    )  # fmt: skip
    sizes = {"block_size": 4, "max_model_len": 32, "kv_cache_bytes": 1 << 20}
    return ModelRunner(model=str(directory), dtype=dtype, device=device, dense=dense, **sizes)


@torch.inference_mode()
def logits_of(runner: ModelRunner) -> torch.Tensor:
    tokens = [(7 * place + 5) % 90 for place in range(12)]
    request = RequestPlan(0, 0, 0, [2, 0, 1], tokens, list(range(-1, 11)), 0, TokenSampling())
    plan = RankPlan(0, 0, requests=[request])
    runner._apply_tables(plan)
    return runner._launched(plan).logits.float()


def assert_near(result: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    assert result.shape == (12, expected.shape[1])
    assert (result - expected).norm() <= bound * expected.norm()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels run there, not in the interpreter")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
def test_logits_are_those_of_the_dequantised_model(case, dtype, bound, quantized):
    directory = quantized(case)
    kept, full = (runner_of(directory, dtype, "cpu", objection) for objection in (none, elsewhere))
    assert_near(logits_of(kept), logits_of(full), bound)
    in_file = bytes_of_experts(tensors_of(directory))
    if dtype == "float32":  # biases are as wide as in the file
        assert kept.info.expert_bytes == in_file < full.info.expert_bytes / 3
        assert kept.info.bytes_per_expert == [in_file // (E * kept.info.model.num_moe_layers)] * 2
    assert kept.info.bytes_read == full.info.bytes_read == kept.info.checkpoint_bytes
    assert kept.info.dense_bytes == full.info.dense_bytes


class BothRanks:
    """A layer's shards of two ranks, as rows of rank 0 reach them."""

    num_experts = E

    def __init__(self, shards: list[ExpertShard], placement: Placement, layer: int) -> None:
        self.shards = shards
        self.owner, self.local = placement.owner_table(layer, 0), placement.local_ids(layer, 0)

    def run(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, int]:
        total, num_active = torch.zeros_like(hidden), 0
        for rank, shard in enumerate(self.shards):
            local = torch.where(self.owner[ids] == rank, self.local[ids], shard.num_experts)
            part, active = shard.run(hidden, local, weights)
            total, num_active = total + part, num_active + int(active)
        return total, num_active


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels run there, not in the interpreter")
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
@torch.inference_mode()
def test_two_ranks_sum_to_the_dequantised_model(case, quantized):
    directory = quantized(case)
    runner = runner_of(directory, "float32", "cpu", elsewhere)
    expected = logits_of(runner)
    placement = uneven(len(runner.experts.shards))
    ranks = [load_rank(directory, none, placement, rank).expert_modules for rank in range(2)]
    pairs = [[ExpertShard(modules[layer]) for modules in ranks] for layer in range(placement.num_layers)]
    runner.experts.shards = [BothRanks(pair, placement, layer) for layer, pair in enumerate(pairs)]
    assert_near(logits_of(runner), expected, 1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("case", ["qwen3_moe", "qwen3_moe stacked", "gpt_oss"])
def test_a_gpu_keeps_them_as_stored(case, dtype, bound, quantized):
    directory = quantized(case)
    kept, full = (runner_of(directory, dtype, "cuda", objection) for objection in (choice.objection, elsewhere))
    assert kept.experts.is_capturable
    assert kept.info.expert_bytes < full.info.expert_bytes / (3 if dtype == "float32" else 1.5)
    assert_near(logits_of(kept), logits_of(full), bound)


# --- what is not kept, and why ---------------------------------------------------------------------------------------


def reasons(loaded: LoadedModel) -> set[str]:
    assert all(kept_storage(module) is None for module in loaded.expert_modules)
    return {storage.objection for module in loaded.expert_modules if (storage := choice.storage_of(module))}


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ((16, 16), "a gate's 24 outputs are not in whole blocks of 16, as the up's behind it would need"),
        ((8, 10), "a block's 10 inputs are not a power of two from 16 up"),
        ((8, 8), "a block's 8 inputs are not a power of two from 16 up"),
    ],
)
def test_blocks_that_do_not_fit_are_dequantised(block, reason, quantized):
    directory = quantized("qwen3_moe", block)
    loaded, expected = load_rank(directory), load_rank(directory, elsewhere)
    assert reasons(loaded) == {reason}
    assert reasons(expected) == set()
    full = expected.model.state_dict()
    assert loaded.model.state_dict().keys() == full.keys()
    assert all(torch.equal(tensor, full[key]) for key, tensor in loaded.model.state_dict().items())


def test_a_layer_that_is_not_stored_alike_is_dequantised_by_itself(quantized, tmp_path):
    source = quantized("qwen3_moe")
    tensors = tensors_of(source)
    key = "model.layers.1.mlp.experts.5.down_proj.weight"
    tensors[key] = tensors[key].float()
    del tensors[f"{key}_scale_inv"]
    first, second = load_rank(write(source, tmp_path / "mixed", tensors)).expert_modules
    assert kept_storage(first) is not None
    assert choice.storage_of(second).objection == "not all of a layer is stored alike"
    assert second.down_proj.dtype == torch.float32
    assert torch.equal(second.down_proj[5], tensors[key])


def test_another_float8_is_dequantised(quantized, tmp_path):
    source = quantized("qwen3_moe")
    tensors = {
        key: tensor.float().to(torch.float8_e5m2) if tensor.dtype == torch.float8_e4m3fn else tensor
        for key, tensor in tensors_of(source).items()
    }
    loaded = load_rank(write(source, tmp_path / "e5m2", tensors))
    assert reasons(loaded) == {"their numbers are F8_E5M2, not F8_E4M3"}


def test_what_is_not_quantised_has_no_storage(checkpoint):
    loaded = load_rank(checkpoint("qwen3_moe"))
    assert [choice.storage_of(module) for module in loaded.expert_modules] == [None, None]


def test_a_cpu_dequantises_and_a_gpu_is_chosen_by_its_device(quantized):
    path, config = inspect(str(quantized("qwen3_moe")))
    module = build(config, torch.float32).expert_modules[0]
    assert choice.objection(module, CPU) == "Triton is not installed"
    assert choice.objection(module, torch.device("cuda")) == "", "known of a module without memory"
    module.act_fn = torch.nn.GELU()
    assert choice.objection(module, torch.device("cuda")) == "their gate is none of the kernels'"
    dense = load_dense(path, build(config, torch.float32), CPU)
    assert [choice.storage_of(module) for module in dense.empty.expert_modules] == [None, None]


def test_one_line_says_how_they_are_held(quantized, caplog):
    choice._say.cache_clear()
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        for directory in (quantized("qwen3_moe"), quantized("gpt_oss")):
            for module in load_rank(directory).expert_modules:
                assert choice.gpu_experts(module) is not None
        for module in load_rank(quantized("qwen3_moe", (8, 8))).expert_modules:
            choice._say("", choice.storage_of(module))
    head = "experts are computed by Triton kernels, which read those that a step needs; "
    assert [record.message for record in caplog.records] == [
        f"{head}they stay fp8 as stored",
        f"{head}they stay mxfp4 as stored",
        f"{head}fp8 is dequantised: a block's 8 inputs are not a power of two from 16 up",
    ]


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "lost"), [("qwen3_moe", "experts.3.up_proj.weight_scale_inv"), ("gpt_oss", "down_proj_scales")]
)
def test_a_missing_scale_is_refused_by_name(case, lost, quantized, tmp_path):
    source = quantized(case)
    tensors = {key: tensor for key, tensor in tensors_of(source).items() if not key.endswith(lost)}
    with pytest.raises(ValueError, match=f"^model: .*{lost}"):
        load_rank(write(source, tmp_path / "lost", tensors))


@pytest.mark.parametrize(
    ("case", "key", "change", "message"),
    [
        ("qwen3_moe", "3.up_proj.weight_scale_inv", lambda t: t[..., :-1], "weight_scale_inv has shape .*, expected"),
        ("gpt_oss", "down_proj_scales", lambda t: t[..., :-1, :], "_scales has shape .*, expected"),
        ("gpt_oss", "down_proj_scales", lambda t: t + 80, r"scales of down_proj are beyond 2\^63"),
        ("qwen3_moe", ".down_proj.weight", None, r"1 tensors are missing, first .*\.down_proj$"),
    ],
)
def test_bad_experts_are_refused_by_name(case, key, change, message, quantized, tmp_path):
    source = quantized(case)
    tensors = tensors_of(source)
    for name in [name for name in tensors if ".layers.1." in name and ".experts." in name and name.endswith(key)]:
        if change is None:
            del tensors[name], tensors[f"{name}_scale_inv"]
        else:
            tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        load_rank(write(source, tmp_path / "bad", tensors))


def test_room_is_of_what_is_stored(quantized):
    shard = ExpertShard(load_rank(quantized("gpt_oss")).expert_modules[0])
    layout = [(part.shape, part.dtype) for part in shard.tensors(0)]
    assert [(part.shape, part.dtype) for part in shard.room()] == layout
    assert sum(part.nbytes for part in shard.room()) == shard.bytes_per_expert
    assert len(layout) == 6, "numbers, scales and biases of two projections"


@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels run there, not in the interpreter")
@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss"])
@torch.inference_mode()
def test_they_move_as_stored(case, quantized):
    """One expert for another, until ranks hold what they would have loaded."""
    from .replaying_rank import poisoned_leftovers

    before = contiguous(2, E, 2)
    changes = {1: {1: (1,), 6: (0,)}}
    after = before.moved(changes)

    def shards(placement: Placement) -> list[list[ExpertShard]]:
        ranks = [load_rank(quantized(case), none, placement, rank).expert_modules for rank in range(2)]
        return [[ExpertShard(module, moves=True) for module in modules] for modules in ranks]

    with poisoned_leftovers():
        gang = Gang(shards(before), before)
        addresses = [gang.addresses(rank, 1) for rank in range(2)]
        gang.send([(1, 0, 1), (6, 1, 0)], chunk=1000)
        gang.step(RebalancePlan(1, changes))
    assert [gang.addresses(rank, 1) for rank in range(2)] == addresses
    hidden, weights = torch.randn(5, 32), torch.rand(5, 2)
    ids = torch.tensor([[0, 3], [1, 4], [2, 0], [3, 1], [0, 1]])
    for moved, loaded in zip(gang.shards, shards(after), strict=True):
        for one, other in zip(moved, loaded, strict=True):
            for expert in range(one.num_experts):
                for tensor, same in zip(one.tensors(expert), other.tensors(expert), strict=True):
                    assert torch.equal(tensor.view(torch.uint8), same.view(torch.uint8))
            assert torch.equal(one.run(hidden, ids, weights)[0], other.run(hidden, ids, weights)[0])
