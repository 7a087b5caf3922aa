"""The ranks' process group, one per generation. The data plane (gloo, NCCL) assumes a trusted network."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from .collective_guard import CollectiveGuard
from .collectives import Collectives

logger = logging.getLogger(__name__)
_NEVER = timedelta(days=1)
_WITHOUT_WATCHDOGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}


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


def join(
    store: StoreAddress, rank: int, num_ranks: int, *, node: str, timeout_s: float, device: torch.device
) -> Collectives:
    """Join the group that meets at ``store``, leaving any other; blocks until all ranks have or ``timeout_s`` passes.

    A store serves one group: who has left it, or was left behind, knows no other's.

    ``node``: this machine's address, whose interface carries the data. A rank leaves a step that another rank will
    never finish: gloo's collectives raise after ``timeout_s``, or when the other is gone; NCCL's are aborted by a
    guard (`CollectiveGuard`), after ``timeout_s`` or when the store goes.

    NCCL where ranks compute on GPUs, gloo elsewhere. NCCL refuses two ranks on one GPU: if any share one, all use gloo,
    by way of the host, and say so. That is for development: its times mean nothing for GPUs of their own.
    """
    leave()
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface_of(node)
    timeout = timedelta(seconds=timeout_s)
    # A store that was given up refuses at once; torch's client would try again for longer than the timeout
    socket.create_connection((store.host, store.port), timeout_s).close()
    client = dist.TCPStore(store.host, store.port, is_master=False, timeout=timeout)
    through_host = device.type == "cuda" and _share_a_device(client, rank, num_ranks, device)
    if through_host:
        logger.warning("ranks share a GPU: what they send each other goes by way of the host, and no step is a graph")
    if device.type != "cuda" or through_host:
        dist.init_process_group("gloo", store=client, rank=rank, world_size=num_ranks, timeout=timeout)
        return Collectives(through_host=through_host)
    # torch's own watchdogs would end this process, and the weights with it, or sleep for a minute with locks held
    os.environ |= _WITHOUT_WATCHDOGS
    # Nothing is left to them, nor is the communicator to be made in the first step
    dist.init_process_group("nccl", store=client, rank=rank, world_size=num_ranks, timeout=_NEVER, device_id=device)
    watched = dist.TCPStore(store.host, store.port, is_master=False, timeout=timeout)
    return Collectives(guard=CollectiveGuard(watched, timeout_s, dist.distributed_c10d._abort_process_group))


def _share_a_device(store: dist.Store, rank: int, num_ranks: int, device: torch.device) -> bool:
    """Whether any two ranks compute on one GPU; all ranks ask, and all are told the same."""
    return anything_twice(store, rank, num_ranks, str(torch.cuda.get_device_properties(device).uuid))


def anything_twice(store: dist.Store, rank: int, num_ranks: int, mine: str) -> bool:
    """Tell the others ``mine``, wait for what is theirs, and return whether two of all are the same."""
    keys = [f"device/{number}" for number in range(num_ranks)]
    store.set(keys[rank], mine)
    store.wait(keys)
    return len({store.get(key) for key in keys}) < num_ranks


def leave() -> None:
    """Leave the present group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()
