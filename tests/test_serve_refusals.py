"""What `penstock serve` refuses, before it starts Ray."""

from __future__ import annotations

import json
import socket

import pytest

from penstock.cluster.serving.deployment_error import RayLostError
from penstock.cluster.serving.server import _take_down

from .running_server import DEMO


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr("penstock.cluster.serving.server.LocalRay", lambda *_: pytest.fail("Ray was started"))


def test_a_port_in_use_is_refused_with_one_line(penstock, without_ray):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = penstock("serve", str(DEMO), "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: port: cannot listen on 127.0.0.1:{port}")
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_empty_host_opens_no_server_to_everybody(penstock, without_ray):
    done = penstock("serve", str(DEMO), "--host", "")
    assert done.returncode == 2
    assert done.stderr.startswith("error: host: it is empty")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_is_none_is_refused(penstock, without_ray, port):
    done = penstock("serve", str(DEMO), "--port", str(port))
    assert (done.returncode, done.stderr) == (2, f"error: port: {port} is not in [1, 65535]\n")


@pytest.mark.parametrize(
    ("flag", "value", "reason"),
    [
        ("--expert-parallel-size", "33", "is not in [1, 32], the model's experts"),
        ("--max-model-len", "2049", "is not in [1, 2048], the model's longest context"),
        ("--tokenizer", str(DEMO.parents[1] / "docs"), "holds no tokenizer files (tokenizer.json is missing)"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_ray_starts(flag, value, reason, penstock, without_ray):
    done = penstock("serve", str(DEMO), flag, value)
    field = flag.removeprefix("--").replace("-", "_")
    assert (done.returncode, done.stderr) == (2, f"error: {field}: {value} {reason}\n")


@pytest.mark.parametrize("fault", ["cut short", "no weights", "unknown architecture", "no such directory"])
def test_an_unusable_checkpoint_is_refused_before_ray_starts(fault, checkpoint, tmp_path, penstock, without_ray):
    import shutil

    directory = tmp_path / "model"
    if fault != "no such directory":
        shutil.copytree(checkpoint("qwen3_moe"), directory)
    weights = sorted(directory.glob("*.safetensors"))
    if fault == "cut short":
        weights[0].write_bytes(weights[0].read_bytes()[:-100])
    elif fault == "no weights":
        for file in weights:
            file.unlink()
    elif fault == "unknown architecture":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    done = penstock("serve", str(directory))
    assert done.returncode == 2
    assert done.stderr.startswith("error: model: ")


def test_a_ray_that_is_gone_hides_no_other_error_of_the_server():
    def undeploy() -> None:
        raise RayLostError("gone")

    with pytest.raises(RayLostError):
        _take_down(undeploy, None)
    _take_down(undeploy, ValueError)
    _take_down(lambda: pytest.fail("nobody is there to ask"), RayLostError)
