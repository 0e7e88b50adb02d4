"""A real Prometheus with this repository's configuration, scraping servers on this machine."""

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.server import free_port


def config_for(targets: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml with targets by variant in place of Compose's names, every second."""
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(folder / "rules.yml")]
    for job in config["scrape_configs"]:
        if lookups := job.pop("dns_sd_configs", None):
            assert set(targets) <= set(lookups[0]["names"])
            # What the look-up would have told the relabelling.
            job["static_configs"] = [
                {"targets": [address], "labels": {"__meta_dns_name": variant}}
                for variant, address in targets.items()
            ]
    return config


class Prometheus:
    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.base_url}/api/v1/{path}?{query}", timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[dict[str, Any]]:
        return self.get("query", query=expression)["result"]

    def wait_ready(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(self.base_url + "/-/ready", timeout=5):
                    return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


@contextmanager
def running(program: str, config: Mapping[str, Any], folder: Path) -> Iterator[Prometheus]:
    folder.mkdir()
    path = folder / "config.yml"
    port = free_port()
    # It scrapes itself too.
    path.write_text(yaml.safe_dump(dict(config)).replace("localhost:9090", f"127.0.0.1:{port}"))
    command = [program, f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            server = Prometheus(f"http://127.0.0.1:{port}")
            server.wait_ready()
            yield server
        finally:
            process.terminate()
            process.wait(20)
