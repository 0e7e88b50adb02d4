"""Several processes of one launch, some of which fail: one message, code 2 of all, none waits for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from converters.train import failure

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("failing_worker.py")


def launch(ranks: list[str]) -> tuple[list[int], list[str]]:
    """Exit codes and standard errors of processes that do ``ranks``; this one keeps torchrun's store."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(len(ranks)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), does],
            env=environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, does in enumerate(ranks)
    ]
    # What others do on their own takes five minutes.
    said = [process.communicate(timeout=150)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.parametrize(
    ("ranks", "speaker"), [(["fails", "fails"], 0), (["fails", "loops"], 0), (["stuck", "fails"], 1)]
)
def test_a_failure_is_told_once_and_ends_every_process(ranks: list[str], speaker: int):
    codes, said = launch(ranks)
    assert codes == [2, 2]
    assert said[speaker] == "error: the model is bad\n"
    assert said[1 - speaker] == ""


def test_who_has_parted_from_the_others_fails_for_itself(monkeypatch: pytest.MonkeyPatch):
    """As process 0 does when it saves what all have trained: no store is looked for."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(failure, "TCPStore", None)
    monkeypatch.setattr(failure, "_alone", False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(TypeError):
        failure.end(lambda: None, 2)
    failure.part()
    said: list[str] = []
    assert failure.end(lambda: said.append("x"), 2) == 2
    assert said == ["x"]
    assert failure.ended_elsewhere() is None


def test_without_torchrun_nothing_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    said: list[str] = []
    assert failure.end(lambda: said.append("x"), 2) == 2
    assert said == ["x"]
    assert failure.ended_elsewhere() is None
