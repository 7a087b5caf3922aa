"""A Ray of our own on this machine: own folder, own ports, own token (on Linux on loopback), gone when we go."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

from ..config import EngineConfig
from .deployment_error import RayLostError
from .own_folder import OwnFolder
from .resources import bundles

# Ray replaces 127.0.0.1 by the machine's outward address; Linux has all of 127.0.0.0/8 on loopback
_NODE_ADDRESS = "127.0.0.2" if sys.platform == "linux" else None
_OBJECT_STORE_BYTES = 100 << 20
_SETTINGS = {
    # the default, 15, gives ranks a thirtieth of the time of any other program on the machine
    "RAY_worker_niceness": "0",
    # every actor call is kept in the control store for a dashboard, which we do not start: memory that only grows
    "RAY_task_events_report_interval_ms": "0",
}
_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", *_SETTINGS)
_OTHER_CPUS = 1.0
"""Ingress and Serve's controller."""


class LocalRay:
    """Starts Ray for the application's gangs on entry, ends it and removes its folder on exit.

    Ray must not have been imported before: it reads its authentication settings then.
    """

    def __init__(self, config: EngineConfig) -> None:
        gang = sum(bundle["CPU"] for bundle in bundles(config, gpu=False))
        needed = config.most_replicas * gang + _OTHER_CPUS
        # Ray's CPUs are tickets: all gangs must fit even where there are fewer real ones
        self._num_cpus = max(os.cpu_count() or 1, int(needed + 1))
        self.folder = Path()
        self.address = ""

    def __enter__(self) -> LocalRay:
        self._own = OwnFolder()
        self.folder = self._own.path
        self._environment_before = {name: os.environ.get(name) for name in _VARIABLES}
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"] = "token", str(token)
        # Keeps the address file private too: no other program's ray.init("auto") finds this Ray
        os.environ["RAY_TMPDIR"] = str(self.folder)
        os.environ.update(_SETTINGS)
        import ray  # reads its environment when it is imported

        context: Any = ray.init(
            "local",  # whatever RAY_ADDRESS says
            num_cpus=self._num_cpus,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self.folder),
            _node_ip_address=_NODE_ADDRESS,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        self.address = context.address_info["address"]

    @property
    def environment(self) -> dict[str, str]:
        """What another process needs to join, such as one that calls ``penstock.connect()``."""
        return {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
        }

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        import ray

        if kind is not RayLostError:
            ray.shutdown()
        self._own.remove()
        for name, value in self._environment_before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_port(host: str, port: int) -> None:
    """Raise ``ValueError`` if nothing can listen there; Serve's proxy would retry for minutes before it says so."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"port: cannot listen on {host}:{port}: {error}") from error
