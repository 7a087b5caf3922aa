"""Servers whose experts lie as a file says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from penstock.cluster.client.http_client import HttpClient
from penstock.cluster.placement_file import PlacementFile
from penstock.router.placement import Placement

from .random_placement import write_placement
from .running_server import DEMO, MODEL, interrupted_stream, long_stream, processes, running, text_of, wait

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
OPTIONS = ["--expert-parallel-size", "2", "--served-model-name", MODEL]
OPTIONS += ["--dtype", "float32", "--device", "cpu", "--num-threads", "1"]


def test_a_placement_reaches_the_workers_by_its_content(tmp_path):
    """Its file need not be where they run, nor there at all any more when a worker or the gang is started anew."""
    from penstock.cluster.client.llm import LLM

    path = tmp_path / "placement.json"
    write_placement(DEMO, 2, "balanced", path)
    with LLM(str(DEMO), dtype="float32", device="cpu", num_threads=1) as llm:
        wanted = llm.generate("import os\n", temperature=0, max_tokens=24)[0].text
    with running(["serve", str(DEMO), "--placement", str(path), *OPTIONS], tmp_path / "log") as server:
        path.unlink()
        # 32 experts and three replicas
        assert "17-18 experts a layer" in server.log.read_text()
        client = HttpClient(server.url)
        for lost in ("Worker.run", "ServeReplica:default:Gang"):
            assert client.generate("import os\n", temperature=0, max_tokens=24).text == wanted
            gone = processes(server, lost)[0]
            gone.kill()
            psutil.wait_procs([gone], timeout=30)
        assert client.generate("import os\n", temperature=0, max_tokens=24).text == wanted
        client.close()
        # SIGTERM is as good as Ctrl-C, and the second of them cuts off what the first would let end
        last = interrupted_stream(server, signal.SIGTERM, 2, 2000)[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("engine_dead", "server_error")
        assert server.process.wait(60) == 0


def test_a_gang_whose_ranks_hold_all_experts_goes_on_without_one(tmp_path):
    path = tmp_path / "placement.json"
    PlacementFile.of(Placement(32, 2, (((0, 1),) * 32,) * 4), "balanced", "qwen3_moe").write(path)
    with running(["serve", str(DEMO), "--placement", str(path), *OPTIONS], tmp_path / "log", own_group=True) as server:
        undisturbed = text_of(long_stream(server, max_tokens=200))
        before = {process.pid for process in processes(server, "ray::Worker")}
        assert text_of(long_stream(server, "Worker.run", max_tokens=200)) == undisturbed
        client = HttpClient(server.url)

        def recoveries() -> list[str]:
            return [event["message"] for event in client.events() if event["kind"] == "recovery"]

        assert recoveries()[0].startswith("the others go on without rank")
        wait("the rank is back", lambda: len(recoveries()) == 2, 60)
        assert "is there again" in recoveries()[1]
        after = {process.pid for process in processes(server, "ray::Worker")}
        assert len(after) == 2
        assert len(before & after) == 1
        assert text_of(long_stream(server, max_tokens=200)) == undisturbed
        client.close()
        # as `timeout` and systemd do: Ray's own processes are signalled too, and gone before they can be asked to end
        family = psutil.Process(server.process.pid).children(recursive=True)
        os.killpg(server.process.pid, signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert "warning: Ray is gone, and live requests with it" in server.log.read_text()
        assert not Path(server.ray_environment["RAY_AUTH_TOKEN_PATH"]).parent.exists()
        _, left = psutil.wait_procs(family, timeout=30)
        assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
