"""Find a deployment and return a client of it."""

from __future__ import annotations

from typing import Any

from .client import Client


def connect(address: str | None = None, **options: Any) -> Client:
    """Return a client: ``http(s)://`` addresses over HTTP, all others and None through Ray.

    ``options`` go to `HttpClient` or `RayClient`.
    """
    if address is not None and address.startswith(("http://", "https://")):
        from .http_client import HttpClient

        return HttpClient(address, **options)
    from .ray_client import RayClient

    return RayClient(address, **options)
