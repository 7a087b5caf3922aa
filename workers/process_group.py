"""The ranks' process group, one per generation. The data plane (gloo, NCCL) assumes a trusted network."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the ranks meet."""

    host: str
    port: int


def open_store(host: str) -> tuple[dist.TCPStore, StoreAddress]:
    """Serve a rendezvous store on ``host`` only, at a free port.

    It lives as long as it is referenced; ranks that wait in it leave with an error when it goes.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        # TCPStore itself would listen on every interface; it takes over and closes the descriptor
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
        )
    return store, StoreAddress(host, port)


def interface_of(address: str) -> str:
    """Return the network interface that has ``address``; raise ``ValueError`` if none does."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in addresses):
            return name
    raise ValueError(f"node address {address} belongs to no network interface of this machine")


def join(store: StoreAddress, rank: int, num_ranks: int, *, node: str, timeout_s: float, backend: str) -> None:
    """Join the group that meets at ``store``, leaving any other; blocks until all ranks have or ``timeout_s`` passes.

    A store serves one group: who has left it, or was left behind, knows no other's.

    ``node``: this machine's address, whose interface carries the data. Collectives that take longer than ``timeout_s``
    raise, which is how a rank leaves a step that another rank will never finish.
    """
    leave()
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface_of(node)
    timeout = timedelta(seconds=timeout_s)
    # A store that was given up refuses at once; torch's client would try again for longer than the timeout
    socket.create_connection((store.host, store.port), timeout_s).close()
    client = dist.TCPStore(store.host, store.port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=client, rank=rank, world_size=num_ranks, timeout=timeout)


def leave() -> None:
    """Leave the present group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()
