"""How many gangs Serve is told to have, given what they report, and whether the cluster has room for them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.serving.autoscaling import QUEUE_DEPTH, autoscaling

CONFIG = EngineConfig(model="m", min_replicas=1, max_replicas=8, target_ongoing_requests=10)


@pytest.mark.parametrize(
    ("reports", "wanted"),
    [
        ({"a": 10.0, "b": 10.0}, 2.0),
        ({"a": 31.0, "b": 4.0}, 3.5),
        ({"a": 0.0, "b": 0.0}, 0.0),  # Serve keeps to min_replicas
        ({"a": 30.0}, 6.0),  # the other has not reported
        ({"a": 10.0, "gone": 500.0}, 2.0),
        ({}, 5),
    ],
)
def test_gangs_are_as_many_as_have_the_target_each(reports, wanted):
    settings = autoscaling(CONFIG)
    # Serve's own is a bag of these and of much else, some of it new in every version
    ctx = SimpleNamespace(
        aggregated_metrics={QUEUE_DEPTH: reports}, running_replicas=["a", "b"], target_num_replicas=5, config=settings
    )
    policy = settings.policy.get_policy()  # what the controller unpacks
    assert policy(ctx) == (wanted, {})


def test_the_settings_are_those_of_the_configuration():
    settings = autoscaling(EngineConfig(model="m", max_replicas=3, upscale_delay_s=2, max_num_seqs=8))
    assert (settings.min_replicas, settings.max_replicas, settings.target_ongoing_requests) == (1, 3, 4)
    assert (settings.upscale_delay_s, settings.downscale_delay_s) == (2, 600)


@pytest.mark.parametrize("varies", [False, True])
def test_the_application_has_the_strategy_the_number_and_the_patience(varies):
    from penstock.cluster.serving.app import build_app

    config = EngineConfig(
        model=str(Path(__file__).parents[1] / "demo" / "model"),
        device="cpu",
        placement_group_strategy="SPREAD",
        drain_timeout_s=77,
        **({"min_replicas": 2, "max_replicas": 3} if varies else {"num_replicas": 2}),
    )
    gang = build_app(config)._bound_deployment.init_args[0]._bound_deployment
    settings = gang._deployment_config
    assert gang._replica_config.placement_group_strategy == "SPREAD"
    assert settings.graceful_shutdown_timeout_s == 77
    if varies:
        assert (settings.autoscaling_config.min_replicas, settings.autoscaling_config.max_replicas) == (2, 3)
    else:
        assert (settings.num_replicas, settings.autoscaling_config) == (2, None)


@pytest.mark.parametrize(
    ("options", "cpus", "message"),
    [
        ({}, 2.4, r"^cpus_per_rank: 2 ranks and their coordinator need 2.5 CPUs, the Ray cluster has 2.4"),
        ({"num_replicas": 3}, 6, r"^num_replicas: 3 times 2 ranks and their coordinator need 7.5 CPUs"),
        ({"num_replicas": 3}, 2, r"^cpus_per_rank: 3 times 2 ranks"),  # fewer gangs would not help
        ({"num_replicas": 3}, 7.5, None),
        ({"min_replicas": 1, "max_replicas": 3}, 2.5, None),  # the others come when there is room
    ],
)
def test_gangs_that_the_cluster_has_no_room_for_are_refused(options, cpus, message, monkeypatch):
    import ray

    from penstock.cluster.serving import deployment

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    config = EngineConfig(model="m", device="cpu", expert_parallel_size=2, **options)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        deployment._check_resources(config)
