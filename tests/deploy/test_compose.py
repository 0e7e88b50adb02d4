"""Compose, Caddy and Prometheus read their files; the rules fire when they should."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import find_tool


def compose() -> list[str]:
    program = shutil.which("docker")
    if program and subprocess.run([program, "compose", "version"], capture_output=True).returncode == 0:
        return [program, "compose"]
    return [find_tool("docker-compose")]


def configuration(root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [
        "-f",
        str(root / "deploy/compose/compose.yaml"),
        "--profile",
        "compare",
        "--profile",
        "tls",
        "config",
    ]
    return subprocess.run(
        [*compose(), *words], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def services(root: Path) -> dict[str, Any]:
    done = configuration(root, MODEL_DIR="/models/a", DENSE_MODEL_DIR="/models/b")
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["services"]


def test_models_are_mounted_read_only(services: dict[str, Any]) -> None:
    for name, source in (("compressed", "/models/a"), ("dense", "/models/b")):
        volume = services[name]["volumes"][0]
        if isinstance(volume, str):
            assert volume == f"{source}:/models/model:ro"
        else:
            assert (volume["source"], volume["read_only"]) == (source, True)


def test_servers_are_locked_down_and_on_loopback(services: dict[str, Any]) -> None:
    assert set(services) == {"compressed", "dense", "prometheus", "grafana", "gateway"}
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"]
        for port in service.get("ports", []):
            address = port.split(":")[0] if isinstance(port, str) else port.get("host_ip")
            assert name == "gateway" or address == "127.0.0.1", name
    for name in ("compressed", "dense"):
        assert services[name]["read_only"] is True
        assert services[name]["environment"]["VLLM_API_KEY_FILE"] == "/run/secrets/api_key"


def test_a_missing_model_is_said(root: Path) -> None:
    done = configuration(root, MODEL_DIR="")
    assert done.returncode != 0
    assert "set MODEL_DIR" in done.stderr


def test_mounted_files_exist(root: Path, services: dict[str, Any]) -> None:
    for name in ("prometheus", "grafana", "gateway"):
        for volume in services[name]["volumes"]:
            source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
            if source.startswith("/"):
                assert Path(source).exists(), source
                assert Path(source).is_relative_to(root)


def test_up_refuses_what_is_no_model(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(root / "deploy/compose/up.sh"), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no config.json" in done.stderr


def test_gateway(tool: Callable[[str], str], root: Path, tmp_path: Path) -> None:
    words = ["validate", "--config", str(root / "deploy/compose/Caddyfile"), "--adapter", "caddyfile"]
    env = {**os.environ, "SITE": "llm.example.org", "HOME": str(tmp_path)}
    done = subprocess.run([tool("caddy"), *words], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prometheus_configuration(tool: Callable[[str], str], root: Path) -> None:
    words = ["check", "config", "--syntax-only", str(root / "deploy/prometheus/prometheus.yml")]
    done = subprocess.run([tool("promtool"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rules(tool: Callable[[str], str], root: Path) -> None:
    folder = root / "deploy/prometheus"
    for words in (["check", "rules", "rules.yml"], ["test", "rules", "rules.test.yml"]):
        done = subprocess.run(
            [tool("promtool"), *words], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested(root: Path) -> None:
    folder = root / "deploy/prometheus"
    groups = yaml.safe_load((folder / "rules.yml").read_text())["groups"]
    tests = (folder / "rules.test.yml").read_text()
    for rule in (rule for group in groups for rule in group["rules"] if "alert" in rule):
        assert rule["alert"] in tests
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def test_dashboard_is_provisioned(root: Path) -> None:
    grafana = root / "deploy/grafana"
    source = yaml.safe_load((grafana / "provisioning/datasources/prometheus.yml").read_text())["datasources"][
        0
    ]
    dashboard = json.loads((grafana / "dashboards/vllm-sparse.json").read_text())
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["current"]["value"] == source["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    for panel in dashboard["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
