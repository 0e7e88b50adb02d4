"""The limit on OpenMP's spinning reaches a real server's worker, and gives way to a user's own setting."""

import os
import re
from pathlib import Path

import pytest

from bench.processes import family
from bench.server import Server
from tests.serving import checkpoints as ck
from vllm_sparse.threads import SPINS, VARIABLE, limit_spinning


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that whatever the test sets is undone too.
    for name in (VARIABLE, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_only_where_no_core_is_left_and_nobody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not limit_spinning("auto")
    assert VARIABLE not in os.environ
    assert limit_spinning("0-1")
    assert os.environ[VARIABLE] == str(SPINS)
    monkeypatch.setenv(VARIABLE, "7")
    assert not limit_spinning("0-1")
    assert os.environ[VARIABLE] == "7"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert not limit_spinning("nobind")
    assert VARIABLE not in os.environ


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("binding", "expected"), [("0-1", str(SPINS)), pytest.param("auto", None, marks=pytest.mark.slow)]
)
def test_worker_is_started_with_it(binding: str, expected: str | None, tmp_path: Path) -> None:
    model = ck.write_bitmask(ck.pruned_model("llama"), tmp_path / "model")
    flags = ("--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "2", "--skip-tokenizer-init")
    env = {"VLLM_CPU_OMP_THREADS_BIND": binding, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with Server(model, flags=flags, env=env, log_path=tmp_path / "log") as server:
        environments = {
            Path(f"/proc/{process.pid}/comm").read_text(): Path(f"/proc/{process.pid}/environ").read_text()
            for process in family(server.pid)
        }
    (worker,) = (text for name, text in environments.items() if "Worker" in name)
    found = re.search(rf"\0{VARIABLE}=([^\0]*)\0", worker)
    assert (found and found[1]) == expected
