"""The facts' way from workers to /metrics, through files and through prometheus-client."""

import copy
import gc
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_sparse import __version__, metrics

FACTS = metrics.LoadFacts({"sparse": 8, "dense": 1}, [("bf16", "cpu")], 576, 1024, 0.5)


@pytest.fixture(autouse=True)
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process has loaded before is not asked about."""
    monkeypatch.setattr(metrics, "_loaded", {})


def exposition() -> str:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(metrics.FactsCollector())
    return generate_latest(registry).decode()


def test_ranks_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.FACTS_DIR_VARIABLE, str(tmp_path))
    publisher = metrics.Publisher()
    publisher.publish(FACTS)
    other = {**metrics.asdict(FACTS), "load_seconds": 0.75, "layers": {"sparse": 7, "fallback": 1}}
    (tmp_path / f"{os.getppid()}.json").write_text(json.dumps([other]))
    # A worker that is gone.
    (tmp_path / "999999999.json").write_text(json.dumps([other]))
    text = exposition()
    assert f'vllm_sparse:info{{backend="cpu",format="bf16",version="{__version__}"}} 1.0' in text
    assert 'vllm_sparse:layers{kind="sparse"} 15.0' in text
    assert 'vllm_sparse:layers{kind="fallback"} 1.0' in text
    assert 'vllm_sparse:weight_bytes{kind="resident"} 1152.0' in text
    assert 'vllm_sparse:weight_bytes{kind="dense_equivalent"} 2048.0' in text
    assert "vllm_sparse:load_seconds 0.75" in text


def test_models_of_one_process_add_up_and_go_with_their_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.FACTS_DIR_VARIABLE, str(tmp_path))
    first, second = metrics.Publisher(), metrics.Publisher()
    first.publish(FACTS)
    copy.deepcopy(first).publish(FACTS)
    gc.collect()
    assert metrics.read_facts() == [FACTS]
    int8 = replace(FACTS, layers={"sparse": 2}, formats=[("int8", "cpu")])
    second.publish(replace(int8, layers={"sparse": 3}))
    second.publish(int8)
    text = exposition()
    assert 'vllm_sparse:layers{kind="sparse"} 10.0' in text
    assert text.count("vllm_sparse:info{") == 2
    del first
    gc.collect()
    assert metrics.read_facts() == [int8]


def test_nothing_is_shown_before_a_worker_has_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metrics.FACTS_DIR_VARIABLE, str(tmp_path))
    assert exposition() == ""


def test_multiprocess_mode_uses_gauges(tmp_path: Path) -> None:
    """In processes of their own: prometheus-client decides for its mode at import."""
    worker = (
        # Imported before the variable is set, as in a worker forked by a process that imported it earlier.
        "import os, prometheus_client\nos.environ['PROMETHEUS_MULTIPROC_DIR'] = os.environ.pop('MULTIPROC')\n"
        "from vllm_sparse import metrics\n"
        "gone, first, second = (metrics.Publisher() for _ in range(3))\n"
        "gone.publish(metrics.LoadFacts({'sparse': 5}, [('fp8', 'cpu')], 576, 1024, 0.5))\n"
        "first.publish(metrics.LoadFacts({'sparse': 8}, [('bf16', 'cpu')], 576, 1024, 0.5))\n"
        "second.publish(metrics.LoadFacts({'sparse': 1}, [('int8', 'cpu')], 1, 2, 0.5))\n"
        "del gone\n"
        "print('published', flush=True)\ninput()\n"
    )
    reader = (
        "from prometheus_client import CollectorRegistry, generate_latest\n"
        "from prometheus_client.multiprocess import MultiProcessCollector\n"
        "registry = CollectorRegistry()\nMultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    # What a worker of an earlier server left there must not count.
    (tmp_path / "gauge_livesum_sparse24-999999999.db").write_bytes(b"\x08\0\0\0\0\0\0\0")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", worker],
            env={"MULTIPROC": str(tmp_path), "PATH": "/usr/bin:/bin"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        assert all(process.stdout.readline() == "published\n" for process in workers)
        run = subprocess.run(
            [sys.executable, "-c", reader], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        for process in workers:
            process.communicate("\n")
    assert 'vllm_sparse:layers{kind="sparse"} 18.0' in run.stdout
    assert 'vllm_sparse:weight_bytes{kind="resident"} 1154.0' in run.stdout
    assert 'vllm_sparse:info{backend="cpu",format="bf16"' in run.stdout
    assert 'format="fp8"' not in run.stdout
    assert not (tmp_path / "gauge_livesum_sparse24-999999999.db").exists()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged as a warning; vLLM, once imported, keeps its loggers from pytest."""
    said: list[str] = []
    monkeypatch.setattr(metrics.logger, "warning", lambda text, *args: said.append(text % args))
    return said


@pytest.mark.parametrize("variable", [metrics.FACTS_DIR_VARIABLE, "PROMETHEUS_MULTIPROC_DIR"])
def test_a_folder_that_cannot_be_written_stops_nobody(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "on" / "another" / "machine"))
    publisher = metrics.Publisher()
    publisher.publish(FACTS)
    assert "will lack this worker's vllm_sparse: series" in warnings[0]


def _name_folder(names: "multiprocessing.Queue[str]") -> None:
    metrics.prepare_folder()
    names.put(metrics.os.environ[metrics.FACTS_DIR_VARIABLE])


def test_workers_share_their_servers_folder_and_other_programs_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in (metrics.FACTS_DIR_VARIABLE, "SPARSE24_FACTS_OWNER"):
        # Set first, so that what this test leaves there is taken back.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    metrics.prepare_folder()
    ours = metrics.os.environ[metrics.FACTS_DIR_VARIABLE]
    metrics.prepare_folder()
    assert metrics.os.environ[metrics.FACTS_DIR_VARIABLE] == ours
    context = multiprocessing.get_context("spawn")
    names = context.Queue()
    worker = context.Process(target=_name_folder, args=(names,))
    worker.start()
    assert names.get(timeout=60) == ours
    worker.join()
    program = (
        "import os; from vllm_sparse import metrics as m; m.prepare_folder(); "
        "print(os.environ[m.FACTS_DIR_VARIABLE])"
    )
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert Path(other.stdout.strip()).name.startswith("vllm-sparse-")
    assert other.stdout.strip() != ours
    assert Path(ours).is_dir()


def test_no_folder_for_metrics_is_a_warning(monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
    def refuse(**_: str) -> str:
        raise OSError(30, "Read-only file system")

    monkeypatch.delenv(metrics.FACTS_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(metrics.tempfile, "mkdtemp", refuse)
    metrics.prepare_folder()
    assert "Read-only file system" in warnings[0]
    assert metrics.FACTS_DIR_VARIABLE not in metrics.os.environ


TWO_ENGINES = """
import gc, sys
from pathlib import Path
from tests.serving.engine import engine
from vllm_sparse import metrics

folder = Path(sys.argv[1])
found = []

def note() -> None:
    gc.collect()
    found.append([facts.layers["sparse"] for facts in metrics.read_facts()])

with engine(folder):
    note()
    with engine(folder):
        note()
    note()
note()
print(found)
"""


@pytest.mark.e2e
def test_two_engines_of_one_program(tmp_path: Path) -> None:
    """The second does not take the first's place, and each goes with its engine."""
    from tests.serving import checkpoints as ck

    model = ck.pruned_model("llama", False)
    folder = ck.write_bitmask(model, tmp_path / "s")
    layers = len(ck.linear_names(model)) // 7 * 4  # as vLLM fuses them
    # In a process of its own: models that other tests leave would count.
    program = [sys.executable, "-c", TWO_ENGINES, str(folder)]
    run = subprocess.run(program, check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == str([[layers], [layers, layers], [layers], []])
