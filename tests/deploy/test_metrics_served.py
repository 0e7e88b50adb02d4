"""The plugin's series on a real server's /metrics in every mode that vLLM has."""

import os
import re
import urllib.request
from pathlib import Path

import pytest

from bench.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]
FLAGS = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4")


def page_of(model: Path, log: Path, flags: tuple[str, ...], env: dict[str, str], scrapes: int) -> list[str]:
    with Server(model, flags=(*FLAGS, *flags), env=env, log_path=log) as server:
        pages = []
        for _ in range(scrapes):
            with urllib.request.urlopen(server.base_url + "/metrics", timeout=20) as answer:
                pages.append(answer.read().decode())
    return pages


@pytest.mark.parametrize(
    ("flags", "own_folder", "ranks"),
    [
        ((), True, 1),
        (("--api-server-count", "2"), False, 1),
        (("--api-server-count", "2", "--tensor-parallel-size", "2"), False, 2),
        (("--tensor-parallel-size", "2"), False, 2),
    ],
    ids=["folder-set", "two-api-servers", "two-api-servers-two-ranks", "two-ranks"],
)
def test_series(
    flags: tuple[str, ...], own_folder: bool, ranks: int, models: dict[str, Path], tmp_path: Path
) -> None:
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "multiproc")} if own_folder else {}
    if own_folder:
        os.mkdir(tmp_path / "multiproc")
    if ranks == 2:
        env["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    for page in page_of(models["compressed"], tmp_path / "log", flags, env, scrapes=4):
        series = dict(re.findall(r"^(vllm_sparse:\S+) (\S+)$", page, re.MULTILINE))
        assert len(series) == 7, series
        assert float(series['vllm_sparse:layers{kind="sparse"}']) == 8 * ranks
        assert float(series['vllm_sparse:layers{kind="fallback"}']) == 0
        resident = float(series['vllm_sparse:weight_bytes{kind="resident"}'])
        assert resident / float(series['vllm_sparse:weight_bytes{kind="dense_equivalent"}']) == 9 / 16
        assert sum(name.startswith("vllm_sparse:info{") for name in series) == 1
        # vLLM's own series are beside them.
        assert re.search(r"^# TYPE vllm:\w+ ", page, re.MULTILINE)
        assert len(re.findall(r"^# TYPE vllm_sparse:layers gauge$", page, re.MULTILINE)) == 1
