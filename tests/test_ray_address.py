from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from penstock import connect


class _Silent(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Standard error is what a test reads."""


@pytest.fixture
def web_server() -> Iterator[str]:
    """Return HOST:PORT of a server that speaks HTTP/1."""
    with http.server.HTTPServer(("127.0.0.1", 0), _Silent) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was asked"))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_web_server_is_no_ray_cluster(web_server, scheme):
    with pytest.raises(ConnectionError, match=f"no Ray cluster at {scheme}{web_server}: .* is http://{web_server}$"):
        connect(f"{scheme}{web_server}")


@pytest.mark.parametrize("address", [None, "auto"])
def test_the_cluster_of_the_environment_may_be_gone(monkeypatch, address):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and listens not
        place = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", place)
        with pytest.raises(ConnectionError, match=f"^address: no Ray cluster at {place}: "):
            connect(address)


@pytest.mark.parametrize("address", ["localhost", "local", "", "https:/x:1", "https//x:1", "x:port"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ValueError, match=r"^address: .* is http://HOST:PORT$"):
        connect(address)


def test_serve_joins_no_web_server(web_server, penstock):
    done = penstock("serve", "demo/model", "--address", web_server)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: address: no Ray cluster at {web_server}: ")
    assert done.stderr.count("\n") == 1
