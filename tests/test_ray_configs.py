"""The files in ray_configs/ are what Ray, KubeRay and we understand; keys that those accept in silence are refused."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from pydantic import BaseModel

from penstock.cluster.config import EngineConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "ray_configs"
SERVE_FILES = ["local.yaml", "one_node.yaml", "several_nodes.yaml"]
CLUSTER_FILES = ["cluster_on_premise.yaml", "cluster_aws.yaml"]
SERVICE_FILE = "rayservice.yaml"
RAY = Path(ray.__file__).parent
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}

EVERYWHERE = {"RAY_worker_niceness": "0", "RAY_kill_worker_timeout_milliseconds": "1000"}


def _read(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text())


def test_every_file_is_checked_here():
    assert {file.name for file in CONFIGS.iterdir()} == {*SERVE_FILES, *CLUSTER_FILES, SERVICE_FILE}


def unknown_keys(values: dict, schema: type[BaseModel], where: str = "") -> list[str]:
    """The keys that Serve's schema has no field for, as paths."""
    found = [f"{where}{key}" for key in values if key not in schema.model_fields]
    if "applications" in schema.model_fields:
        from ray.serve.schema import HTTPOptionsSchema, LoggingConfig, ServeApplicationSchema

        for i, application in enumerate(values.get("applications", [])):
            found += unknown_keys(application, ServeApplicationSchema, f"{where}applications[{i}].")
        found += unknown_keys(values.get("http_options", {}), HTTPOptionsSchema, f"{where}http_options.")
        found += unknown_keys(values.get("logging_config", {}), LoggingConfig, f"{where}logging_config.")
    if "deployments" in schema.model_fields:
        from ray.serve.schema import DeploymentSchema

        for i, deployment in enumerate(values.get("deployments", [])):
            found += unknown_keys(deployment, DeploymentSchema, f"{where}deployments[{i}].")
    return found


def check_serve(values: dict) -> list[EngineConfig]:
    """Refuse what Serve or we do not understand; return the applications' configurations."""
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(values)
    assert unknown_keys(values, ServeDeploySchema) == []
    for application in values["applications"]:
        assert application["import_path"] == "penstock:build_app"
    return [EngineConfig.from_mapping(application["args"]) for application in values["applications"]]


@pytest.mark.parametrize("name", SERVE_FILES)
def test_serve_files(name):
    (config,) = check_serve(_read(name))
    if name == "local.yaml":
        assert (ROOT / config.model / "config.json").is_file()


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda v: v.update(aplications=[]), "aplications"),
        (lambda v: v["applications"][0].update(import_pth="x"), "applications[0].import_pth"),
        (lambda v: v["applications"][0].update(deployments=[{"name": "Gang", "num_replica": 2}]), "num_replica"),
        (lambda v: v["http_options"].update(prot=1), "http_options.prot"),
        (lambda v: v.update(logging_config={"log_levle": "INFO"}), "logging_config.log_levle"),
        (lambda v: v["applications"][0]["args"].update(draft_leng=2), "unknown key 'draft_leng'"),
    ],
)
def test_typos_in_serve_files_are_seen(change: Callable[[dict], None], wanted: str):
    values = _read("one_node.yaml")
    change(values)
    with pytest.raises((ValueError, AssertionError), match=re.escape(wanted)):
        check_serve(values)


def test_the_application_is_the_same_from_a_file_and_from_the_command(monkeypatch):
    """Both go through one function, which refuses what it does not know before anything starts."""
    import penstock

    monkeypatch.chdir(ROOT)
    args = _read("local.yaml")["applications"][0]["args"]
    from_file, from_config = penstock.build_app(args), penstock.build_app(EngineConfig.from_mapping(args))
    for app in (from_file, from_config):
        assert app._bound_deployment.name == "Ingress"
        gang, config = app._bound_deployment.init_args
        assert gang._bound_deployment.name == "Gang"
        assert config.model == str(ROOT / "demo" / "model")
    with pytest.raises(ValueError, match="unknown key 'draft_leng'"):
        penstock.build_app({**args, "draft_leng": 2})


def check_cluster(values: dict) -> dict:
    """Refuse what `ray up` does not understand; return what it makes of the file."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((RAY / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(values, schema)
    # there the schema lets any key pass
    assert set(values["provider"]) <= set(schema["properties"]["provider"]["properties"]), values["provider"]
    prepared = prepare_config(copy.deepcopy(values))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_cluster_files(name):
    prepared = check_cluster(_read(name))
    nodes = prepared["available_node_types"]
    assert sum(node["max_workers"] for node in nodes.values() if node.get("min_workers")) == prepared["max_workers"]


@pytest.mark.parametrize("name", CLUSTER_FILES)
@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(max_worker=3),
        lambda v: v["auth"].update(ssh_usr="me"),
        lambda v: v["provider"].update(worker_ip=["10.0.0.9"]),
        lambda v: v.update(setup_commands="pip install ."),
        lambda v: v.pop("provider"),
    ],
)
def test_mistakes_in_cluster_files_are_seen(name, change):
    values = _read(name)
    change(values)
    with pytest.raises((jsonschema.ValidationError, AssertionError)):
        check_cluster(values)


def _ray_start(commands: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return environment and options of the one command of these that starts Ray."""
    (command,) = [command for command in commands if " start " in command]
    words = shlex.split(command)
    start = words.index("start")
    assert words[start - 1].rpartition("/")[2] == "ray"
    environment = dict(word.split("=", 1) for word in words[: start - 1])
    return environment, words[start + 1 :]


@pytest.mark.parametrize("name", CLUSTER_FILES)
def test_every_node_of_a_cluster_starts_ray_with_the_token_and_known_options(name):
    from ray.scripts.scripts import start

    values = _read(name)
    known = {option for parameter in start.params for option in parameter.opts}
    mounts = values["file_mounts"]
    (token,) = [remote for remote, local in mounts.items() if local == "~/.ray/auth_token"]
    for kind in ("head", "worker"):
        environment, options = _ray_start(values[f"{kind}_start_ray_commands"])
        assert environment["RAY_AUTH_MODE"] == "token"
        assert environment["RAY_AUTH_TOKEN_PATH"] == token
        assert {option.partition("=")[0] for option in options} <= known
        assert environment.items() >= EVERYWHERE.items()
        health = {key: value for key, value in environment.items() if "health" in key}
        assert health == (HEALTH if kind == "head" else {})


def test_ray_knows_the_settings_that_are_given_in_its_environment():
    """It ignores those that it does not know."""
    servers = (RAY / "core/src/ray/gcs/gcs_server").read_bytes()
    for name in [*HEALTH, *EVERYWHERE]:
        assert name.removeprefix("RAY_").encode() in servers, name


def _service_schema() -> dict:
    return yaml.safe_load((Path(__file__).parent / "rayservice_schema.yaml").read_text())


def test_the_kuberay_manifest():
    values, schema = _read(SERVICE_FILE), _service_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    (config,) = check_serve(yaml.safe_load(values["spec"]["serveConfigV2"]))
    cluster = values["spec"]["rayClusterConfig"]
    # the operator gives mode and token to every container, from this version of Ray on
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry.get("value") for entry in head["env"]}
    assert {key: value for key, value in environment.items() if "health" in key} == HEALTH
    (workers,) = cluster["workerGroupSpecs"]
    worker = workers["template"]["spec"]["containers"][0]
    for container in (head, worker):
        assert {entry["name"]: entry.get("value") for entry in container["env"]}.items() >= EVERYWHERE.items()
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["image"] == head["image"]
    # whichever of them Serve builds the application in
    assert all(any(entry["name"] == "PENSTOCK_API_KEY" for entry in container["env"]) for container in (head, worker))
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) == config.expert_parallel_size
    assert (group["minReplicas"], group["maxReplicas"]) == (config.min_replicas, config.max_replicas)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.drain_timeout_s


def _container(values: dict) -> dict:
    return values["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(apiVersion="ray.io/v1alpha1"),
        lambda v: v["spec"].update(serveConfig={}),
        lambda v: v["spec"].update(serveConfigV2={"applications": []}),
        lambda v: v["spec"]["rayClusterConfig"].update(workerGroupSpec=[]),
        lambda v: v["spec"]["rayClusterConfig"]["authOptions"].update(mode="tokens"),
        lambda v: v["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update(block=True),
        lambda v: v["spec"]["rayClusterConfig"]["workerGroupSpecs"][0].pop("groupName"),
        lambda v: _container(v).update(enviroment=[]),
        lambda v: _container(v)["resources"]["limits"].update({"nvidia.com/gpu": 8}),
        lambda v: _container(v)["env"].append({"name": "X"}),
    ],
)
def test_mistakes_in_the_manifest_are_seen(change):
    values = _read(SERVICE_FILE)
    change(values)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, _service_schema())
