"""The `penstock` command."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.markup import escape

from .api.text_stream import RequestFailedError
from .calibrate_command import calibrate
from .client_commands import bench, events, generate, stats
from .config import EngineConfig
from .engine.backend import EngineDeadError, QueueFullError
from .flags import EngineFlags, given
from .placement_commands import place, trace
from .serving.deployment_error import DeploymentFailedError, RayLostError
from .serving.interrupts import interruptible

app = App(name="penstock", help="Serve Mixture-of-Experts language models, expert-parallel and speculative.")
app.command(generate)
app.command(stats)
app.command(events)
app.command(bench)
app.command(calibrate)
app.command(trace)
app.command(place)
errors = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def _config(model: str | None, file: Path | None, flags: Any) -> EngineConfig:
    values = given(flags)
    if model is not None:
        values["model"] = model
    return EngineConfig.from_yaml(file, **values) if file is not None else EngineConfig.from_mapping(values)


@app.command
def serve(
    model: str | None = None,
    /,
    *,
    config: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    address: str | None = None,
    shutdown_timeout_s: float = 30.0,
    flags: Annotated[EngineFlags, Parameter(name="*")] = EngineFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Serve MODEL over the OpenAI protocol until Ctrl-C.

    Parameters
    ----------
    model
        A directory with config.json and safetensors weights, or a model id on the Hugging Face hub.
    config
        YAML file with the same keys as the flags, underscores instead of dashes; flags win.
    host
        Address to listen on.
    port
        Port to listen on.
    address
        Join the Ray cluster at this address instead of starting one on this machine.
    shutdown_timeout_s
        Longest that live requests may go on after Ctrl-C or SIGTERM, while new ones are refused; a second Ctrl-C cuts
        them off.
    """
    from .serving.server import run_server

    run_server(
        _config(model, config, flags), host=host, port=port, address=address, shutdown_timeout_s=shutdown_timeout_s
    )


@app.command
def demo(*, port: int = 8000) -> None:
    """Serve the demo model on two expert-parallel CPU workers and stream one sample answer.

    Parameters
    ----------
    port
        Port to listen on, on loopback.
    """
    from .. import demo as demo_package
    from .serving.server import run_server

    model = Path(demo_package.__file__).parent / "model"
    config = EngineConfig(
        model=str(model),
        served_model_name="penstock-demo",
        expert_parallel_size=2,
        dtype="float32",
        device="cpu",
        num_threads=1,
    )
    run_server(config, host="127.0.0.1", port=port, sample=True)


@app.command
def inflate(source: Path, target: Path, /, *, factor: int) -> None:
    """Write a copy of a small checkpoint whose experts are FACTOR times as large and compute the same function.

    Parameters
    ----------
    source
        Directory of the checkpoint.
    target
        Directory to write; must not exist or be empty.
    factor
        How many copies of every intermediate unit, at least 1.
    """
    from ..demo.inflate import inflate as inflate_checkpoint

    written = inflate_checkpoint(source, target, factor)
    errors.print(f"{target}: {written.num_experts} experts a layer, {written.expert_bytes / 1e6:.1f} MB of experts")


def main() -> None:
    """Run the command; users' mistakes end with one line and exit code 2, a server that fails them with 1."""
    interruptible()
    try:
        app()
    except ValueError as error:
        _complain(error)
        sys.exit(2)
    except BrokenPipeError:
        # whoever read our output has left; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (
        ConnectionError,
        TimeoutError,
        PermissionError,
        EngineDeadError,
        QueueFullError,
        RequestFailedError,
    ) as error:
        _complain(error)
        sys.exit(1)
    except DeploymentFailedError as error:
        with tempfile.NamedTemporaryFile("w", prefix="penstock-", suffix=".log", delete=False) as log:
            log.write(f"{error}\n")
        errors.print(f"[bold red]error:[/] {escape(error.reason)} (in full: {log.name})")
        sys.exit(1)
    except RayLostError as error:
        errors.print(f"[bold yellow]warning:[/] {error}")
        sys.stdout.flush()
        # what Ray does when a process ends in order takes ten seconds where there is no Ray
        os._exit(0)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(error: Exception) -> None:
    errors.print(f"[bold red]error:[/] {escape(str(error))}", markup=True)
