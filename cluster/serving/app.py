"""The Serve application: an ingress in front of a gang. `serve run` and `penstock serve` build the same one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve import Application

from ..api.chat_tokenizer import check_tokenizer_files
from ..calibration.gate import check_budget_profile
from ..config import API_KEY_VARIABLE, EngineConfig
from ..placement_file import check_ranks, placement_of
from ..speculation.drafter import drafter_factory
from .autoscaling import autoscaling
from .gang import Gang
from .http_server import Address
from .ingress import Ingress, build_asgi_app
from .resources import bundles

GANG, INGRESS = "Gang", "Ingress"
_MAX_ONGOING = 10_000
_DRAIN_LOOK_S = 0.5
"""How often Serve looks whether a replica that is to stop has requests of its own left."""
_HURRIED_S = 20.0


def build_app(args: Mapping[str, Any] | EngineConfig, *, address: Address | None = None) -> Application:
    """Return the application; ``args`` are the keys of `EngineConfig`.

    With an ``address`` its ingress, on the cluster's head node, listens there; else Serve's proxy is the way in.

    Raises ``ValueError`` naming the field for a key, value or model that cannot be served, before anything starts.
    """
    config = args if isinstance(args, EngineConfig) else EngineConfig.from_mapping(args)
    drafter_factory(config.drafter)
    check_ranks(config)
    check_tokenizer_files(config.tokenizer_source)
    served = check_budget_profile(config)
    placement = placement_of(config)
    config = _absolute(served.config)
    gpu = on_gpu(config)
    # Decided here: a worker that Ray gives no GPU may see the machine's all the same
    config = replace(config, device="cuda" if gpu else "cpu")
    gang: Any = serve.deployment(
        Gang,
        name=GANG,
        **_number(config),
        ray_actor_options={"num_cpus": bundles(config, gpu=gpu)[0]["CPU"]},
        placement_group_bundles=bundles(config, gpu=gpu),
        placement_group_strategy=config.placement_group_strategy,
        max_ongoing_requests=_MAX_ONGOING,
        health_check_period_s=2.0,
        graceful_shutdown_wait_loop_s=_DRAIN_LOOK_S,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        # What keeps a gang from loading once, such as a corrupt checkpoint, keeps it from loading again
        max_constructor_retry_count=1,
    )
    ingress: Any = serve.deployment(
        serve.ingress(build_asgi_app)(Ingress),
        name=INGRESS,
        num_replicas=1,
        # On the head it asks for no CPU: ranks may have taken all that are there, and it cannot be elsewhere
        ray_actor_options={"num_cpus": 0.0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}}
        if address
        else {"num_cpus": 0.1},
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_wait_loop_s=_DRAIN_LOOK_S,
        # With an address it ends when the server does, and then requests do not hold that up
        graceful_shutdown_timeout_s=_HURRIED_S if address else config.drain_timeout_s,
        max_constructor_retry_count=1,
    )
    # Only the ingress needs the key
    api_key = config.api_key or os.environ.get(API_KEY_VARIABLE) or None
    keyless, keyed = replace(config, api_key=None), replace(config, api_key=api_key)
    return ingress.bind(gang.bind(keyless, gpu=gpu, placement=placement, budgets=served.known), keyed, address=address)


def _number(config: EngineConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.fewest_replicas}
    return {"autoscaling_config": autoscaling(config)}


def _absolute(config: EngineConfig) -> EngineConfig:
    """Return ``config`` with directories spelled out: actors run in folders of their own."""

    def spell(place: str | None) -> str | None:
        return str(Path(place).expanduser().resolve()) if place and Path(place).expanduser().is_dir() else place

    model = spell(config.model) or config.model
    return replace(config, model=model, tokenizer=spell(config.tokenizer), served_model_name=config.model_names)


def on_gpu(config: EngineConfig) -> bool:
    """Tell whether ranks get a GPU each: as configured, or if there are enough."""
    if config.device != "auto":
        return config.device == "cuda"
    import ray
    import torch

    if ray.is_initialized():
        return ray.cluster_resources().get("GPU", 0) >= config.expert_parallel_size
    return torch.cuda.device_count() >= config.expert_parallel_size
