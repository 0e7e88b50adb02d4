"""The Helm chart, rendered by Helm and held against Kubernetes' and the operators' own schemas."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import ROOT, find_tool

CHART = ROOT / "deploy/helm/vllm-sparse"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
CUSTOM = ("gateway.networking.k8s.io", "keda.sh", "monitoring.coreos.com")
KEY = ("--set", "apiKey.existingSecret=vllm-api-key")


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([find_tool("helm"), *words], capture_output=True, text=True, check=False)


def render(*words: str) -> list[dict[str, Any]]:
    done = helm("template", "release", str(CHART), "--namespace", "llm", *words)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


def check_builtin(
    documents: list[dict[str, Any]], tmp_path: Path, versions: tuple[str, ...] = ("1.37",)
) -> None:
    """Strict: unknown fields are errors."""
    path = tmp_path / "rendered.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    for version in versions:
        done = subprocess.run(
            [find_tool("kubernetes-validate"), "--strict", "-k", version, str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def verdicts(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    node = shutil.which("node") or find_tool("node")
    packages = Path(sys.prefix) / "deploy-tools/custom-resources/node_modules"
    if not packages.is_dir():
        find_tool("the custom resources' schemas")
    script = Path(__file__).with_name("custom_resources.mjs")
    done = subprocess.run(
        [node, str(script), str(packages)],
        input=json.dumps(documents),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_lint() -> None:
    done = helm("lint", "--strict", str(CHART), *KEY)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("example", [None, *EXAMPLES], ids=lambda path: path.stem if path else "defaults")
def test_renders_to_valid_objects(example: Path | None, tmp_path: Path) -> None:
    documents = render("-f", str(example)) if example else render(*KEY)
    custom = [d for d in documents if d["apiVersion"].split("/")[0] in CUSTOM]
    check_builtin([d for d in documents if d not in custom], tmp_path)
    found = verdicts(custom)
    assert len(found) == len(custom)
    assert [verdict for verdict in found if verdict["error"]] == []


def test_an_older_kubernetes(tmp_path: Path) -> None:
    """The oldest with image volumes by default."""
    check_builtin(render("-f", str(CHART / "examples/router.yaml")), tmp_path, ("1.33",))


def test_the_validators_can_refuse(tmp_path: Path) -> None:
    documents = render("-f", str(CHART / "examples/canary.yaml"))
    of_kind(documents, "HTTPRoute")[0]["spec"]["rules"][0]["backendRefs"][0]["weight"] = "ten"
    errors = {verdict["kind"]: verdict["error"] for verdict in verdicts(documents)}
    assert "weight must be integer" in errors["HTTPRoute"]
    deployment = of_kind(documents, "Deployment")[0]
    deployment["spec"]["replcas"] = 1
    with pytest.raises(AssertionError, match="replcas"):
        check_builtin([deployment], tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "apiKey.existingSecret: name the secret"),
        ((*KEY, "--set", "replicas=3"), "'replicas' not allowed"),
        ((*KEY, "--set", "apiKey.value=secret"), "'value' not allowed"),
        ((*KEY, "--set", "variants.compressed.env.VLLM_API_KEY=x"), "VLLM_API_KEY"),
        ((*KEY, "--set", "variants.compressed.path=../other"), "/variants/compressed/path"),
        ((*KEY, "--set", "image.digest=latest"), "/image/digest"),
        (
            (*KEY, "--set", "models.source=image,models.image.reference=m,convert.enabled=true"),
            "cannot be written to",
        ),
        ((*KEY, "--set", "models.source=image"), "models.image.reference"),
        ((*KEY, "--set", "route.enabled=true"), "route.gateway.name"),
    ],
)
def test_wrong_values_are_refused(words: tuple[str, ...], said: str) -> None:
    done = helm("template", "release", str(CHART), *words)
    assert done.returncode != 0
    assert said in done.stderr


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [d["spec"]["template"]["spec"] for kind in ("Deployment", "Job") for d in of_kind(documents, kind)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_pods_are_locked_down(example: Path) -> None:
    found = pods(render("-f", str(example)))
    assert found
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert "--allow-pickle" not in container["args"]
            models = next(m for m in container["volumeMounts"] if m["name"] == "models")
            assert models.get("readOnly", False) is (container["name"] == "vllm")
            if container["name"] == "vllm":
                settings = {entry["name"]: entry["value"] for entry in container["env"]}
                assert settings["VLLM_SPARSE_STRICT"] == "1"
                assert "VLLM_API_KEY" not in settings
                grace = pod["terminationGracePeriodSeconds"]
                assert grace > int(container["args"][container["args"].index("--shutdown-timeout") + 1]) + 5


def test_canary_splits_by_weight() -> None:
    documents = render("-f", str(CHART / "examples/canary.yaml"))
    services = {service["metadata"]["name"] for service in of_kind(documents, "Service")}
    backends = of_kind(documents, "HTTPRoute")[0]["spec"]["rules"][0]["backendRefs"]
    assert {backend["name"]: backend["weight"] for backend in backends} == {
        "release-vllm-sparse-compressed": 10,
        "release-vllm-sparse-dense": 90,
    }
    assert {backend["name"] for backend in backends} == services
    names = [container["args"][2] for pod in pods(documents) for container in pod["containers"]]
    assert names == ["llama", "llama"]


def test_rules_and_dashboard_are_the_tested_ones() -> None:
    documents = render("-f", str(CHART / "examples/canary.yaml"))
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    assert of_kind(documents, "PrometheusRule")[0]["spec"] == rules
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/vllm-sparse.json").read_text())
    assert json.loads(of_kind(documents, "ConfigMap")[0]["data"]["vllm-sparse.json"]) == dashboard


def test_other_conversion_settings_are_another_job() -> None:
    example = str(CHART / "examples/convert.yaml")
    job = of_kind(render("-f", example), "Job")[0]
    assert "--resume" in job["spec"]["template"]["spec"]["containers"][0]["args"]
    other = of_kind(render("-f", example, "--set", "convert.source=other"), "Job")[0]
    assert job["metadata"]["name"] != other["metadata"]["name"]


def test_workers_of_a_group_are_valid_pods(tmp_path: Path) -> None:
    """LeaderWorkerSet's own schema is in no package; its pod templates and the service are checked."""
    documents = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/leaderworkerset.yaml").read_text()))
    template = of_kind(documents, "LeaderWorkerSet")[0]["spec"]["leaderWorkerTemplate"]
    made = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": role, **template[f"{role}Template"]["metadata"]},
            "spec": template[f"{role}Template"]["spec"],
        }
        for role in ("leader", "worker")
    ]
    check_builtin([*made, *of_kind(documents, "Service")], tmp_path)


def test_argument_of_servers_are_vllms(tool: Callable[[str], str]) -> None:
    """Every option that the chart, the images and the group example pass is one that `vllm serve` knows."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = {
        option
        for action in make_arg_parser(FlexibleArgumentParser())._actions
        for option in action.option_strings
    }
    words: list[str] = []
    for example in EXAMPLES:
        for document in of_kind(render("-f", str(example)), "Deployment"):
            words += document["spec"]["template"]["spec"]["containers"][0]["args"]
    group = (ROOT / "deploy/kubernetes/leaderworkerset.yaml").read_text().split("---\n")[0]
    words += [word for word in group.split() if word.startswith("--")]
    for name in ("cpu", "cuda"):
        text = (ROOT / f"deploy/Dockerfile.{name}").read_text()
        words += json.loads(text.rsplit("CMD ", 1)[1])
    words += yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())["x-server"]["command"]
    options = {word for word in words if word.startswith("--")}
    assert options <= known, options - known
    assert "--shutdown-timeout" in options
