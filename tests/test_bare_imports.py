from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import penstock

ROOT = Path(penstock.__file__).parent
BELOW = {"workers", "router", "kernels"}
# What each room may import of the others
MAY_IMPORT = {
    "kernels": set(),
    "router": {"kernels"},
    "workers": {"router", "kernels"},
    "cluster.speculation": set(),
    "cluster.engine": BELOW | {"cluster.speculation"},
    "cluster.calibration": BELOW | {"cluster.speculation", "cluster.engine"},
    "cluster.transport": BELOW | {"cluster.speculation", "cluster.engine"},
    "cluster.api": BELOW | {"cluster.speculation", "cluster.engine"},
    "cluster.client": BELOW
    | {"cluster.speculation", "cluster.engine", "cluster.calibration", "cluster.transport", "cluster.api"},
    "cluster.serving": BELOW
    | {"cluster.speculation", "cluster.engine", "cluster.calibration"}
    | {"cluster.transport", "cluster.api", "cluster.client"},
    # the command line serves the shipped model
    "cluster": BELOW
    | {"demo", "cluster.engine", "cluster.calibration", "cluster.api", "cluster.client", "cluster.serving"},
}
ROOMS = (*MAY_IMPORT, "demo", "benchmarks")

_BARE = """
import importlib, json, pkgutil, sys

BLOCKED = {"ray", "pydantic", "zmq", "msgspec", "fastapi", "openai"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
for name in BLOCKED:
    assert name not in sys.modules, name

import penstock
names = ["cluster.config", "cluster.client.llm"]
for room in ("cluster.speculation", "cluster.engine", "cluster.calibration", "workers", "router", "kernels"):
    package = importlib.import_module(f"penstock.{room}")
    names += [f"{room}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
for name in names:
    importlib.import_module(f"penstock.{name}")

import torch
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import LocalRanks, make_runner
from penstock.workers.sampling_params import SamplingParams

torch.set_num_threads(1)
model, prompt = sys.argv[1], json.loads(sys.argv[2])
config = EngineConfig(model=model, block_size=4, max_model_len=64, kv_cache_bytes=1 << 20)
engine = Engine(config, LocalRanks(make_runner(config, 0)))
engine.add_request("a", prompt, SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
tokens = []
while engine.has_requests:
    tokens += [token for output in engine.step() for token in output.token_ids]
loaded = sorted({name.split(".")[0] for name in sys.modules} & BLOCKED)
print(json.dumps({"tokens": tokens, "names": names, "loaded": loaded}))
"""


def python(code: str, *args: str) -> str:
    # Isolated mode: neither the working directory nor PYTHONPATH helps
    done = subprocess.run([sys.executable, "-I", "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_engine_runs_on_a_bare_machine(
    checkpoint: Callable[[str], Path], reference: Callable[..., list[int]]
) -> None:
    directory, prompt = checkpoint("qwen3_moe"), [5, 17, 60, 33, 8]
    said = json.loads(python(_BARE, str(directory), json.dumps(prompt)).splitlines()[-1])
    assert said["tokens"] == reference(directory, prompt, 8, ignore_eos=True)
    assert said["loaded"] == []
    assert {"workers.runner", "workers.process_group", "router.topk", "kernels.philox"} <= set(said["names"])


_COLLECT = """
import sys

BLOCKED = {
    "ray", "pydantic", "zmq", "msgspec", "fastapi", "openai", "cyclopts", "jsonschema", "schemathesis", "pytest_asyncio"
}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())

import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-o", "addopts=--import-mode=importlib", "-m", "gpu", *sys.argv[1:]]))
"""


def test_tests_for_a_gpu_are_found_on_a_bare_machine() -> None:
    marked = re.compile(r"^(@|on_gpu = \[)pytest\.mark\.gpu", re.MULTILINE)
    files = sorted(file for file in (ROOT / "tests").glob("test_*.py") if marked.search(file.read_text()))
    assert len(files) > 5
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", _COLLECT, *map(str, files)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {f"tests/{file.name}" for file in files}


def test_importing_penstock_costs_neither_torch_nor_ray() -> None:
    code = "import sys, penstock; penstock.__version__; dir(penstock); print(*{n.split('.')[0] for n in sys.modules})"
    loaded = set(python(code).split())
    assert "penstock" in loaded
    assert not loaded & {"torch", "ray", "transformers", "numpy", "pydantic", "zmq", "msgspec", "fastapi", "openai"}


def test_the_public_names_are_lazy_and_an_unknown_one_is_refused() -> None:
    from penstock.cluster.config import EngineConfig

    assert penstock.EngineConfig is EngineConfig
    assert set(penstock.__all__) <= set(dir(penstock))
    assert set(penstock._HOMES) == set(penstock.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = penstock.Nonsense


def imported_rooms(source: str, package: str) -> set[str]:
    """The rooms that a module of ``package`` imports, wherever in its text; those of cluster/ by both names."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) + 1 - node.level] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            for room in ROOMS:
                if name == f"penstock.{room}" or name.startswith(f"penstock.{room}."):
                    found.add(room)
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from ..cluster import config", {"cluster"}),
        ("from .. import cluster", {"cluster"}),
        ("from ..cluster.engine.engine import Engine", {"cluster", "cluster.engine"}),
        ("import penstock.cluster.engine.engine", {"cluster", "cluster.engine"}),
        ("def f():\n    from penstock.cluster.engine import engine", {"cluster", "cluster.engine"}),
        ("from penstock import cluster", {"cluster"}),
        ("from . import rows\nfrom .plan import RankPlan\nimport torch", {"workers"}),
        ("from ..router.topk import RouterSeam", {"router"}),
    ],
)
def test_the_scan_sees_every_spelling(source: str, expected: set[str]) -> None:
    assert imported_rooms(source, "penstock.workers") == expected


@pytest.mark.parametrize("room", list(MAY_IMPORT))
def test_imports_point_down_only(room: str) -> None:
    files = sorted((ROOT / room.replace(".", "/")).glob("*.py"))
    assert files
    for file in files:
        imported = imported_rooms(file.read_text(encoding="utf-8"), f"penstock.{room}")
        upwards = imported - MAY_IMPORT[room] - {room, room.split(".")[0]}
        assert not upwards, f"{file.relative_to(ROOT)} imports {', '.join(upwards)}"


def test_the_kernels_package_stays_empty() -> None:
    # transformers probes for an optional package of that name and may find ours
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_the_kernels_folder_on_the_path_does_not_mislead_transformers(
    checkpoint: Callable[[str], Path], reference: Callable[..., list[int]]
) -> None:
    """From the repository's root, ``import kernels`` finds our folder; models must work all the same."""
    code = (
        "import sys, json, torch, kernels\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "out = model.generate(torch.tensor([[5, 17]]), max_new_tokens=4, do_sample=False, eos_token_id=10**6)\n"
        "print(kernels.__file__)\n"
        "print(json.dumps(out[0, 2:].tolist()))\n"
    )
    directory = checkpoint("qwen3_moe")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, tokens = done.stdout.strip().splitlines()[-2:]
    assert Path(found) == ROOT / "kernels" / "__init__.py"
    assert json.loads(tokens) == reference(directory, [5, 17], 4, ignore_eos=True)
