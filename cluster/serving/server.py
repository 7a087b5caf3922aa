"""`penstock serve`: from a configuration to a server that runs until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..api.chat_tokenizer import check_tokenizer_files
from ..api.generation import Generation
from ..api.metric import PREFIX
from ..calibration.gate import check_budget_profile
from ..client.http_client import HttpClient
from ..config import EngineConfig
from ..engine.budget import make_budgets
from ..placement_file import check_ranks, placement_of
from ..speculation.drafter import drafter_factory
from .deployment_error import RayLostError
from .interrupts import interruptible, uninterruptible
from .load_summary import budget_summary, load_summary, rank_summary
from .local_ray import LocalRay, check_port
from .resources import num_ranks

console = Console(soft_wrap=True, highlight=False, emoji=False)
SAMPLE_QUESTION = "438 + 275"
SHUTDOWN_TIMEOUT_S = 30.0
_WATCH_S = 2.0
NO_TOKEN = (
    "[bold yellow]warning:[/] this Ray cluster asks for no token: whoever reaches its ports runs programs on its nodes "
    "(RAY_AUTH_MODE=token, docs/deployment.md)"
)


def run_server(
    config: EngineConfig,
    *,
    host: str,
    port: int,
    address: str | None = None,
    sample: bool = False,
    shutdown_timeout_s: float = SHUTDOWN_TIMEOUT_S,
) -> None:
    """Serve until interrupted, end live requests within ``shutdown_timeout_s``, then leave nothing behind.

    ``address``: a running Ray cluster to join; one is started on this machine when None. ``sample``: show one answer.
    Raises ``ValueError`` naming the field for what the user can mend, ``RayLostError`` if Ray has ended before.
    """
    if not shutdown_timeout_s >= 0:
        raise ValueError(f"shutdown_timeout_s: {shutdown_timeout_s:g} is not 0 or more")
    # Refuse before Ray starts what can be refused
    drafter_factory(config.drafter)
    check_ranks(config)
    check_tokenizer_files(config.tokenizer_source)
    served = check_budget_profile(config)
    config = served.config
    placement_of(config)
    if not 1 <= port <= 65535:  # nobody could be told which one the system had chosen instead of 0
        raise ValueError(f"port: {port} is not in [1, 65535]")
    if not host:  # a variable that was not set must not open a server to everybody
        raise ValueError("host: it is empty; 0.0.0.0 is every interface, 127.0.0.1 this machine alone")
    if address is None:
        check_port(host, port)
    finish: Callable[[float], None] | None = None
    with ExitStack() as stack:
        try:
            with _progress() as progress:
                task = progress.add_task("starting Ray", total=num_ranks(config))
                local = stack.enter_context(LocalRay(config)) if address is None else None
                interruptible()  # at once: what follows takes seconds to import
                # Only now: Ray reads its environment when it is imported
                from .deployment import (
                    application_status,
                    attach,
                    deploy,
                    drain,
                    gang_nodes,
                    has_token,
                    head_address,
                    loaded_ranks,
                    undeploy,
                )

                if address is not None:
                    stack.enter_context(attach(address))
                    if not has_token():
                        console.print(NO_TOKEN)
                interruptible()
                deploy(
                    config,
                    host=host,
                    port=port,
                    on_progress=lambda what, done, total: progress.update(
                        task, description=what, completed=done, total=total
                    ),
                )
                stack.push(lambda kind, *_: _take_down(undeploy, kind))
                finish = drain
            shown, elsewhere = (host, False) if address is None else seen_from_here(host, *head_address())
            url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
            if infos := loaded_ranks():
                console.print(load_summary(infos, config.block_size))
                for nodes in gang_nodes():
                    console.print(rank_summary(nodes))
                if budgets := make_budgets(config, infos[0].model):
                    console.print(budget_summary(served, [entry.budget for entry in budgets]))
            _announce(config, url, local)
            if elsewhere:
                console.print("That is loopback on the head node; --host 0.0.0.0 lets other machines in.")
            if sample:
                show_sample(url)
            console.print("Ctrl-C ends the server.")
            _watch(application_status)
        except KeyboardInterrupt:
            if finish is not None and shutdown_timeout_s > 0:
                _finish(finish, shutdown_timeout_s)
            uninterruptible()
            console.print("\nshutting down")


def _take_down(undeploy: Callable[[], None], kind: type[BaseException] | None) -> None:
    """End the application; ``kind``: of an error that ends the server, which a Ray that is gone must not hide."""
    if kind is RayLostError:
        return
    try:
        undeploy()
    except RayLostError:
        if kind is None:
            raise


def _finish(drain: Callable[[float], None], timeout_s: float) -> None:
    """Let live requests end, unless interrupted once more."""
    console.print(f"\nending live requests, for at most {timeout_s:g} s; Ctrl-C cuts them off")
    with suppress(KeyboardInterrupt):
        drain(timeout_s)


def seen_from_here(host: str, head: str, is_remote: bool) -> tuple[str, bool]:
    """Return whom to ask for what listens on ``host`` of the ``head`` node, and whether that node only can."""
    if host in ("0.0.0.0", "::"):
        return head, False
    return host, is_remote and (host.startswith("127.") or host in ("::1", "localhost"))


def _watch(status_of: Callable[[], str]) -> None:
    """Say what becomes of the application until interrupted: a gang that is lost, one that is back."""
    last = status_of()
    while True:
        time.sleep(_WATCH_S)
        status = status_of()
        if status != last:
            console.print(f"the application is {status.lower().replace('_', ' ')}")
            last = status


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ranks"),
        TimeElapsedColumn(),
        console=console,
    )


def _announce(config: EngineConfig, url: str, local: LocalRay | None) -> None:
    console.print(f"[bold green]serving[/] {config.model_name} at [bold]{url}/v1[/]")
    if local is not None:
        variables = " ".join(f"{name}={value}" for name, value in local.environment.items())
        console.print(f"penstock.connect() in another process: {variables} python")


def show_sample(url: str) -> None:
    """Stream one chat answer and print what it took, counted by the engine between two readings of its totals."""
    client = HttpClient(url)
    before = client.stats()
    console.print(f"\n[bold]user[/]       {SAMPLE_QUESTION}")
    console.print("[bold]assistant[/]  ", end="")
    with client.stream([{"role": "user", "content": SAMPLE_QUESTION}], temperature=0) as stream:
        for text in stream:
            console.print(text.replace("\n", "\n           "), end="", markup=False)
    console.print("\n")
    console.print(sample_summary(stream.generation, before, client.stats()), markup=False)
    client.close()


def sample_summary(generation: Generation, before: dict[str, float], after: dict[str, float]) -> str:
    """Return one line about a generation that ran alone between two readings of the engine's metrics."""

    def moved(name: str) -> float:
        return after[f"{PREFIX}{name}"] - before[f"{PREFIX}{name}"]

    def expert_layers(reading: dict[str, float]) -> float:
        return reading[f"{PREFIX}decode_experts_per_layer"] * reading[f"{PREFIX}decode_steps_total"]

    stats = generation.stats
    steps, tokens = moved("decode_steps_total"), moved("decode_tokens_total")
    experts = (expert_layers(after) - expert_layers(before)) / steps if steps else 0.0
    traffic = moved("decode_payload_bytes_total") / tokens if tokens else 0.0
    return (
        f"{generation.num_output_tokens} tokens, {stats.tokens_per_s:.0f} tokens/s; "
        f"{stats.accepted_tokens} of {stats.draft_tokens} draft tokens accepted in {stats.steps} steps; "
        f"{experts:.1f} distinct experts per layer and step; {traffic:.0f} bytes between ranks per token"
    )
