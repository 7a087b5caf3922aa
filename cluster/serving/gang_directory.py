"""Find the gangs of an application by the names that their coordinators go by in the cluster."""

from __future__ import annotations

from typing import Any

import ray

from .resources import COORDINATOR_NUMBER, COORDINATOR_PREFIX, NAMESPACE


class GangDirectory:
    """The coordinators of the application ``app_name``. Calls block for as long as Ray takes to answer."""

    def __init__(self, app_name: str) -> None:
        self._prefix = f"{COORDINATOR_PREFIX}{app_name}:"
        self._handles: dict[str, Any] = {}

    def coordinators(self) -> dict[str, Any]:
        """Return actor handles by gang, those that are still loading included: of each gang its last coordinator."""
        names = {
            actor["name"]
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(self._prefix)
        }
        self._handles = {name: handle for name, handle in self._handles.items() if name in names}
        for name in names - self._handles.keys():
            try:
                self._handles[name] = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:  # just gone
                continue
        ordered = sorted(self._handles, key=lambda name: int(name.rpartition(COORDINATOR_NUMBER)[2]))
        return {
            name.removeprefix(self._prefix).rpartition(COORDINATOR_NUMBER)[0]: self._handles[name] for name in ordered
        }
