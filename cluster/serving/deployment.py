"""Put the application on a Ray cluster, watch it come up, take it down."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayError

from ...workers.model_info import RankInfo
from ..client.ray_address import checked_address
from ..config import EngineConfig
from ..engine.backend import EngineDeadError
from .app import build_app, on_gpu
from .deployment_error import DeploymentFailedError, RayLostError
from .gang_directory import GangDirectory
from .http_server import Address
from .ray_watch import watched
from .resources import bundles, num_ranks

logger = logging.getLogger(__name__)
_POLL_S = 0.2
_ANSWER_S = 5.0
_VALUE_ERROR = re.compile(r"^\S*ValueError\S*: (?P<message>[a-z_\[\]0-9.]+: .*)$", re.MULTILINE)


def head_address() -> tuple[str, bool]:
    """Return the address of the head node, where the ingress listens, and whether that is another machine."""
    head = next(
        n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"] and HEAD_NODE_RESOURCE_NAME in n["Resources"]
    )
    return head, head != ray.util.get_node_ip_address()


def has_token() -> bool:
    """Tell whether this process shows a token to Ray clusters."""
    return os.environ.get("RAY_AUTH_MODE") == "token"


@contextmanager
def attach(address: str) -> Iterator[None]:
    """Be part of the Ray cluster at ``address``; raise ``ValueError`` if there is none."""
    try:
        address = checked_address(address)
    except ConnectionError as error:
        raise ValueError(str(error)) from error
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError) as error:
        # Ray itself takes a token that is missing for a cluster that is not there
        hint = "" if has_token() else "; if the cluster has a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        raise ValueError(f"address: cannot join the Ray cluster at {address}: {error}{hint}") from error
    try:
        yield
    except RayLostError:
        raise  # taking leave of it would take another minute
    except BaseException:
        ray.shutdown()
        raise
    else:
        ray.shutdown()


def deploy(
    config: EngineConfig,
    *,
    host: str,
    port: int,
    app_name: str = "default",
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Start the application, whose ingress listens on ``host:port``; return when it serves.

    ``on_progress(what, done, total)`` is called as it comes up. Raises ``ValueError`` naming the field for what the
    user can mend (also when it shows only while loading), ``DeploymentFailedError`` otherwise.
    """
    app = build_app(config, address=Address(host, port))
    _check_resources(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    on_progress("starting Ray Serve", 0, num_ranks(config))
    serve.start(
        http_options={"location": "NoServer"},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    if app_name in serve.status().applications:
        raise ValueError(f"address: this cluster already serves an application named {app_name!r}; end that first")
    try:
        serve.run_many([serve.RunTarget(app, name=app_name)], wait_for_applications_running=False)
        _wait_running(config, app_name, on_progress)
    except BaseException:
        undeploy(app_name)
        raise


def _wait_running(config: EngineConfig, app_name: str, on_progress: Callable[[str, int, int], None]) -> None:
    deadline = time.monotonic() + config.load_timeout_s
    while True:
        status = serve.status().applications.get(app_name)
        if status is not None and status.status == "RUNNING":
            return
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            details = [status.message, *(deployment.message for deployment in status.deployments.values())]
            raise _reason("\n".join(details))
        if time.monotonic() > deadline:
            raise DeploymentFailedError(f"the application was not up after load_timeout_s = {config.load_timeout_s} s")
        on_progress(*_loading(app_name, num_ranks(config)))
        time.sleep(_POLL_S)


def application_status(app_name: str = "default") -> str:
    """Return what Serve says of the application, such as RUNNING or UNHEALTHY."""
    found = serve.status().applications.get(app_name)
    return "not there" if found is None else str(found.status.value)


def loaded_ranks(app_name: str = "default") -> list[RankInfo]:
    """Return what the ranks of a gang of the application loaded; nothing if it has just gone."""
    for coordinator in GangDirectory(app_name).coordinators().values():
        with suppress(RayError, EngineDeadError):
            return ray.get(coordinator.ranks.remote(), timeout=5)
    return []


def gang_nodes(app_name: str = "default") -> list[list[str]]:
    """Return of each gang that answers the addresses of its ranks' machines, in rank order."""
    nodes = []
    for coordinator in GangDirectory(app_name).coordinators().values():
        with suppress(RayError):
            nodes.append(ray.get(coordinator.nodes.remote(), timeout=5))
    return nodes


def drain(timeout_s: float, app_name: str = "default") -> None:
    """Have the ingress refuse what comes and end what it has; return when it has, or ``timeout_s`` has passed.

    Interrupted, it leaves requests to be cut off by `undeploy`. Raises ``RayLostError`` if there is nobody to ask.
    """
    sent: list[Any] = []
    is_interrupted = threading.Event()

    def ask() -> None:
        sent.append(serve.get_app_handle(app_name).drain.remote(timeout_s))
        if is_interrupted.is_set():
            sent[0].cancel()
        sent[0].result(timeout_s=timeout_s + _ANSWER_S)

    try:
        watched(ask)
    except KeyboardInterrupt:
        # in this order: whichever thread comes second cancels. Serve would wait for it before it ends the ingress
        is_interrupted.set()
        for response in sent:
            response.cancel()
        raise
    except RayLostError:
        raise
    except Exception as error:  # Ray and Serve raise many types; there is nothing to wait for then
        logger.warning("the ingress could not end its requests: %s", error)


def undeploy(app_name: str = "default") -> None:
    """Take the application down; on a cluster of others Serve itself stays. Raises ``RayLostError``."""
    watched(lambda: serve.delete(app_name))


def _check_resources(config: EngineConfig) -> None:
    """Serve would wait for ever for what the cluster does not have."""
    total = ray.cluster_resources()
    needed = bundles(config, gpu=on_gpu(config))
    for resource, field in (("CPU", "cpus_per_rank"), ("GPU", "expert_parallel_size")):
        of_one, there = sum(bundle.get(resource, 0.0) for bundle in needed), total.get(resource, 0.0)
        wanted = config.fewest_replicas * of_one
        if wanted > there:
            who = f"{config.expert_parallel_size} ranks and their coordinator"
            if config.fewest_replicas > 1:
                who = f"{config.fewest_replicas} times {who}"
                field = field if of_one > there else "num_replicas"
            raise ValueError(f"{field}: {who} need {wanted:g} {resource}s, the Ray cluster has {there:g}")


def _loading(app_name: str, total: int) -> tuple[str, int, int]:
    """Ask the coordinators, once they exist, how many ranks have loaded."""
    done = 0
    coordinators = GangDirectory(app_name).coordinators()
    for coordinator in coordinators.values():
        with suppress(RayError):  # just gone, or busy: the next poll tells
            progress: Any = ray.get(coordinator.progress.remote(), timeout=5)
            done += progress[0]
    if not coordinators:
        return "starting workers", 0, total
    return ("loading experts" if done < total else "starting the ingress"), done, total


def _reason(details: str) -> Exception:
    """Return the user's error if the log of the failure holds one, else all of the log."""
    found = _VALUE_ERROR.search(details)
    return ValueError(found["message"]) if found else DeploymentFailedError(details.strip())
