"""A real Prometheus scrapes a real vLLM serving a 2:4 model: every panel and every alert has its data."""

import contextlib
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.runner import RunConfig, run
from bench.server import Server
from bench.workloads import WorkloadSpec
from tests.deploy.prometheus import Prometheus, config_for, running

pytestmark = pytest.mark.e2e
# What Grafana puts in place of its variables.
VARIABLES = {"$job": ".*", "$variant": ".*", "$model": ".*", "$__rate_interval": "5m"}
SELECTOR = re.compile(r"\b(?:(?:[a-z_0-9]+:)[a-z_0-9:]+|up)\b(?:\{[^}]*\})?")
FLAGS = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4")


def refused(base_url: str, body: dict[str, Any]) -> int:
    request = urllib.request.Request(
        base_url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def load(servers: dict[str, Server], prometheus: Prometheus) -> None:
    """Streams on every server, in two rounds with scrapes before, between and after."""
    wait_for(prometheus, "sum(up)", len(servers) + 1)
    for seed in (1, 2):
        for server in servers.values():
            spec = WorkloadSpec(num_requests=8, input_len=24, output_len=12, ignore_eos=True, seed=seed)
            config = RunConfig(server.base_url, workload=spec, concurrency=4, num_warmups=0, scrape=False)
            assert run(config).report["requests"]["completed"] == 8
            assert refused(server.base_url, {"model": server.name, "prompt": "x", "max_tokens": 10**6}) == 400
        wait_for(prometheus, "sum(vllm:request_success_total)", 8 * seed * len(servers))
    wait_for(prometheus, "sum(http_requests_total{status='4xx'})", 2 * len(servers))
    # The rules have been evaluated on these scrapes. A counter that appears with its first request has no
    # rate until the second round, so the ratio comes last; NaN is not >= 0.
    for rule in ("variant:vllm_tpot_seconds:p50_5m > 0", "variant:http_error_ratio:rate5m >= 0"):
        wait_for(prometheus, f"count({rule})", len(servers))


def wait_for(prometheus: Prometheus, expression: str, value: float, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not (result := prometheus.query(f"({expression}) >= {value}")):
        assert time.monotonic() < deadline, f"{expression}: {prometheus.query(expression)}, not {value}"
        time.sleep(0.3)
    assert float(result[0]["value"][1]) == value


@contextlib.contextmanager
def scraped(
    variants: tuple[str, ...], models: dict[str, Path], tool: Callable[[str], str], root: Path, tmp_path: Path
) -> Iterator[Prometheus]:
    program = tool("prometheus")
    with contextlib.ExitStack() as stack:
        servers = {}
        for variant in variants:
            server = Server(models[variant], flags=FLAGS, log_path=tmp_path / f"{variant}.log")
            servers[variant] = stack.enter_context(server)
        targets = {variant: server.base_url.removeprefix("http://") for variant, server in servers.items()}
        config = config_for(targets, root / "deploy" / "prometheus")
        prometheus = stack.enter_context(running(program, config, tmp_path / "prometheus"))
        load(servers, prometheus)
        yield prometheus


def panel_queries(root: Path) -> list[tuple[str, str]]:
    dashboard = json.loads((root / "deploy/grafana/dashboards/vllm-sparse.json").read_text())
    queries = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
    ]
    assert len(queries) > 30
    return queries


def filled_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def check_panels(prometheus: Prometheus, root: Path, compare: bool) -> None:
    empty = []
    for title, expression in panel_queries(root):
        result = prometheus.query(filled_in(expression))
        values = [float(item["value"][1]) for item in result]
        needs_both = 'variant="dense"' in expression
        if needs_both and not compare:
            continue
        if not values or any(value != value for value in values):
            empty.append((title, expression, values))
    assert not empty


def check_rules(prometheus: Prometheus, root: Path) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    written = yaml.safe_load((root / "deploy/prometheus/rules.yml").read_text())["groups"]
    assert len(rules) == sum(len(group["rules"]) for group in written)
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    for rule in rules:
        if rule["type"] == "recording":
            assert prometheus.query(rule["name"]), rule["name"]
            continue
        assert isinstance(prometheus.query(rule["query"]), list)
        # An alert that is silent because its series do not exist would never speak.
        selectors = SELECTOR.findall(rule["query"])
        assert selectors, rule["query"]
        for selector in selectors:
            assert prometheus.query(selector), f"{rule['name']}: nothing matches {selector}"
    assert not prometheus.query('ALERTS{alertstate="firing"}')


def check_plugin_series(prometheus: Prometheus) -> None:
    layers = {
        item["metric"]["kind"]: float(item["value"][1])
        for item in prometheus.query('vllm_sparse:layers{variant="compressed"}')
    }
    # q, k and v are one layer in vLLM, gate and up too: four in each of two decoder layers; a dense head.
    assert layers == {"sparse": 8, "dense": 1, "fallback": 0}
    share = prometheus.query(
        'vllm_sparse:weight_bytes{kind="resident"} / ignoring (kind) '
        'vllm_sparse:weight_bytes{kind="dense_equivalent"}'
    )
    assert [float(item["value"][1]) for item in share] == [pytest.approx(9 / 16)]


def test_panels_and_alerts_have_data(
    models: dict[str, Path], tool: Callable[[str], str], root: Path, tmp_path: Path
) -> None:
    with scraped(("compressed",), models, tool, root, tmp_path) as prometheus:
        check_panels(prometheus, root, compare=False)
        check_rules(prometheus, root)
        check_plugin_series(prometheus)


@pytest.mark.slow
def test_panels_that_compare_have_data(
    models: dict[str, Path], tool: Callable[[str], str], root: Path, tmp_path: Path
) -> None:
    with scraped(("compressed", "dense"), models, tool, root, tmp_path) as prometheus:
        check_panels(prometheus, root, compare=True)
        check_rules(prometheus, root)
        check_plugin_series(prometheus)
