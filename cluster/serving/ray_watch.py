"""Calls to Ray that end when Ray is gone: its own wait for a minute, and then end the process without a word."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TypeVar

import ray

from ..client.ray_address import is_ray
from .deployment_error import RayLostError

_LOOK_S = 0.5
_MISSES = 3
"""Looks in a row that must find nobody: one may be a network's hiccup."""

ResultT = TypeVar("ResultT")


def watched(call: Callable[[], ResultT]) -> ResultT:
    """Return what ``call`` returns, made in another thread; raise `RayLostError` once Ray's control store is gone."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    result: Future[ResultT] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # it belongs to whoever waits
            result.set_exception(error)

    # A daemon: nothing frees a call to what is gone
    threading.Thread(target=run, daemon=True).start()
    misses = 0
    while not wait_for([result], _LOOK_S).done:
        misses = 0 if _is_there(host.strip("[]"), int(port)) else misses + 1
        if misses == _MISSES:
            raise RayLostError("Ray is gone, and live requests with it")
    return result.result()


def _is_there(host: str, port: int) -> bool:
    try:
        return is_ray(host, port)
    except OSError:
        return False
