"""The command line: its options are frozen here, and users' mistakes end with one line."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from penstock.cluster import cli
from penstock.cluster.cli import EngineFlags, _config
from penstock.cluster.config import EngineConfig
from penstock.cluster.serving.deployment_error import DeploymentFailedError

PENSTOCK = str(Path(sys.executable).with_name("penstock"))
SERVE_OPTIONS = """
--address --allow-uncalibrated --api-key --async-scheduling --block-size --budget-profile --config --cpus-per-rank
--device
--downscale-delay-s --draft-len --drafter --drain-timeout-s --dtype
--enable-eplb --enforce-eager --eplb-bytes-per-step --eplb-step-interval --eplb-timeout-s --eplb-window-size
--expert-budget --expert-parallel-size --gpu-memory-utilization --host --kv-cache-bytes --load-timeout-s
--max-body-bytes --max-draft-len --max-model-len --max-num-batched-tokens --max-num-seqs
--max-perplexity-increase --max-quality-loss
--max-queued-requests --max-replicas --max-step-retries --min-replicas --no-async-scheduling
--num-redundant-experts --num-replicas
--num-spares --num-threads
--placement --placement-group-strategy --port
--prompt-lookup-max --prompt-lookup-min --recovery-timeout-s --request-timeout-s --revision
--served-model-name --shutdown-timeout-s --speculation
--step-timeout-s --suffix-store-tokens --target-ongoing-requests --tokenizer --upscale-delay-s
"""
TRACE_OPTIONS = """
--block-size --data --device --dtype --enforce-eager --gpu-memory-utilization --kv-cache-bytes --max-model-len
--max-num-batched-tokens --max-num-seqs --max-tokens --num-threads --output --revision --seed --temperature --tokenizer
"""
CALIBRATE_OPTIONS = """
--block-size --budget --data --device --draft-len --drafter --dtype --enforce-eager --expert-parallel-size
--gpu-memory-utilization
--kv-cache-bytes --load-timeout-s --max-model-len --max-num-batched-tokens --max-num-seqs --max-step-retries
--max-tokens --num-records --num-threads --output --placement --plot --prompt-lookup-max --prompt-lookup-min
--revision --step-timeout-s --suffix-store-tokens --tokenizer
"""
PLACE_OPTIONS = """
--max-load-imbalance --method --num-ranks --num-redundant-experts --output --revision --trace
"""


def _penstock(*arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    environment = {**kept, "PATH": "", "COLUMNS": "200"}
    return subprocess.run(
        [PENSTOCK, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("command", "options"),
    [("serve", SERVE_OPTIONS), ("trace", TRACE_OPTIONS), ("place", PLACE_OPTIONS), ("calibrate", CALIBRATE_OPTIONS)],
)
def test_the_options_of_a_command(command, options):
    """Scripts and manifests of users hold these: a change is a breaking one."""
    shown = _penstock(command, "--help").stdout
    assert sorted({word for word in shown.split() if word.startswith("--")}) == options.split()


def test_every_option_says_what_it_does_and_its_default():
    shown = " ".join(_penstock("serve", "--help").stdout.split())
    assert "Most tokens that cascade and shadow draft per request and step. [default: 7]" in shown


def test_flags_are_the_configuration_and_nothing_else():
    assert {f.name for f in fields(EngineFlags)} == {f.name for f in fields(EngineConfig)} - {"model"}


def test_flags_win_over_the_file_and_leave_the_rest_of_it_alone(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: somewhere\ndraft_len: 5\nmax_num_seqs: 4\n")
    config = _config(None, file, EngineFlags(draft_len=0))
    assert config == EngineConfig(model="somewhere", draft_len=0, max_num_seqs=4)
    assert _config("elsewhere", file, EngineFlags()).model == "elsewhere"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serve",), "error: model: missing"),
        (("serve", "m", "--draft-len", "99"), "error: draft_len: 99 is not in [0, 64]"),
        (("serve", "--config", "nowhere.yaml"), "error: config: cannot read nowhere.yaml"),
        (("inflate", "nowhere", "there", "--factor", "2"), "error: source: "),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(arguments, message, penstock):
    done = penstock(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_mistake_ends_the_process_with_code_2():
    done = _penstock("inflate", "nowhere", "there", "--factor", "2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: source: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_failed_deployment_ends_with_one_line_and_its_log_in_a_file(monkeypatch, capsys):
    details = (
        "The deployment failed to start.\nTraceback (most recent call last):\n  File ...\nMemoryError: no [room]\n"
    )

    def fail() -> None:
        raise DeploymentFailedError(details)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: MemoryError: no [room] (in full: ")
    log = Path(line.removesuffix(")").rpartition(" ")[2])
    assert log.read_text() == details + "\n"
    log.unlink()
