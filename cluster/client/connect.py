"""Find a deployment and return a client of it."""

from __future__ import annotations

from typing import Any

from .client import Client


def connect(address: str | None = None, **options: Any) -> Client:
    """Return a client: ``http(s)://`` addresses over HTTP, all others and None through Ray.

    Ray's are HOST:PORT, ``ray://HOST:PORT``, and ``auto`` or None: the cluster of RAY_ADDRESS or of this machine.
    ``options`` go to `HttpClient` or `RayClient`. Raises ``ValueError`` for what is no address, and ``ConnectionError``
    at once if something other than Ray listens at Ray's.
    """
    if address is not None and address.startswith(("http://", "https://")):
        from .http_client import HttpClient

        return HttpClient(address, **options)
    from .ray_client import RayClient

    return RayClient(address, **options)
