"""The files in ray_configs/ are what Ray Serve and we understand: unknown keys, which Serve accepts, are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from penstock.cluster.config import EngineConfig

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "ray_configs").glob("*.yaml"))


def unknown_keys(values: dict, schema: type[BaseModel], where: str = "") -> list[str]:
    """The keys that Serve's schema has no field for, as paths."""
    found = [f"{where}{key}" for key in values if key not in schema.model_fields]
    if "applications" in schema.model_fields:
        from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema

        for i, application in enumerate(values.get("applications", [])):
            found += unknown_keys(application, ServeApplicationSchema, f"{where}applications[{i}].")
        found += unknown_keys(values.get("http_options", {}), HTTPOptionsSchema, f"{where}http_options.")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_serve_files_are_valid_and_hold_no_unknown_key(file):
    from ray.serve.schema import ServeDeploySchema

    values = yaml.safe_load(file.read_text())
    ServeDeploySchema.model_validate(values)
    assert unknown_keys(values, ServeDeploySchema) == []
    for application in values["applications"]:
        assert application["import_path"] == "penstock:build_app"
        config = EngineConfig.from_mapping(application["args"])
        assert (ROOT / config.model / "config.json").is_file()


def test_the_check_sees_typos():
    from ray.serve.schema import ServeDeploySchema

    values = {"aplications": [], "applications": [{"import_pth": "x"}], "http_options": {"prot": 1}}
    wanted = ["aplications", "applications[0].import_pth", "http_options.prot"]
    assert unknown_keys(values, ServeDeploySchema) == wanted


def test_the_application_is_the_same_from_a_file_and_from_the_command(monkeypatch):
    """Both go through one function, which refuses what it does not know before anything starts."""
    import penstock

    monkeypatch.chdir(ROOT)
    args = yaml.safe_load((ROOT / "ray_configs" / "local.yaml").read_text())["applications"][0]["args"]
    from_file, from_config = penstock.build_app(args), penstock.build_app(EngineConfig.from_mapping(args))
    for app in (from_file, from_config):
        assert app._bound_deployment.name == "Ingress"
        gang, config = app._bound_deployment.init_args
        assert gang._bound_deployment.name == "Gang"
        assert config.model == str(ROOT / "demo" / "model")
    with pytest.raises(ValueError, match="unknown key 'draft_leng'"):
        penstock.build_app({**args, "draft_leng": 2})
