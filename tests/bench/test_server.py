"""Start, failure, pause and stop of servers, with a program that stands in for ``vllm``."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from bench import parity, server_metrics
from bench.processes import family
from bench.server import Server, ServerError, check_port
from vllm_sparse.errors import FormatError, UserError
from vllm_sparse.metrics import FACTS_DIR_VARIABLE

ROOT = Path(__file__).parents[2]


def alive(pids: list[int]) -> list[int]:
    return [process.pid for pid in pids for process in family(pid) if process.pid == pid and process.alive()]


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def members(server: Server) -> list[int]:
    return [process.pid for process in family(server.pid)]


def test_serves_and_leaves_nothing_behind(fake_vllm: Path, model: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with Server(model, flags=["--stubborn"], log_path=tmp_path / "log", on_progress=lines.append) as server:
        with urllib.request.urlopen(server.base_url + "/v1/models") as response:
            assert response.status == 200
        pids = members(server)
        assert len(pids) == 3
        assert server.memory()["pss_bytes"] > 1_000_000
    assert server.pid is None
    assert alive(pids) == []
    assert lines
    assert server.command[1:3] == ["serve", str(model)]


def test_facts_of_an_engine_in_this_process_stay_here(
    fake_vllm: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FACTS_DIR_VARIABLE, "/nowhere")
    with Server(model) as server:
        environment = Path(f"/proc/{server.pid}/environ").read_bytes()
        assert b"\0HOME=" in environment
        assert FACTS_DIR_VARIABLE.encode() not in environment


def test_proxies_are_not_asked(
    fake_vllm: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(model, log_path=tmp_path / "log", start_timeout_s=60) as server:
        assert server_metrics.fetch(server.base_url)
        assert parity.score(server.base_url, server.name, [[1, 2, 3]]).positions == 2


def test_exception_inside_the_context_stops_the_server(fake_vllm: Path, model: Path, tmp_path: Path) -> None:
    pids: list[int] = []

    def fail() -> None:
        with Server(model, flags=["--stubborn"], log_path=tmp_path / "log") as server:
            pids.extend(members(server))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(pids) == 3
    assert alive(pids) == []


def test_failure_names_the_cause_and_shows_the_log(fake_vllm: Path, model: Path, tmp_path: Path) -> None:
    server = Server(model, flags=["--fail"], log_path=tmp_path / "log")
    with pytest.raises(ServerError) as caught:
        server.start()
    message = str(caught.value)
    assert "exit code 1" in message
    assert "Most likely cause: ValueError: K is 7, not a multiple of 4" in message
    assert "Loading weights" in message
    assert server.pid is None


def test_start_that_takes_too_long_is_ended(fake_vllm: Path, model: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    server = Server(
        model,
        flags=["--hang", "--stubborn"],
        log_path=tmp_path / "log",
        start_timeout_s=1.5,
        on_progress=lambda _: seen.extend(members(server)),
    )
    with pytest.raises(ServerError, match="did not answer within"):
        server.start()
    assert seen
    assert alive(seen) == []


def test_busy_port_is_refused_before_anything_starts(fake_vllm: Path, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} .* another program listens there"):
            Server(model, port=port).start()
    check_port(port)
    with pytest.raises(UserError, match="1 to 65535"):
        check_port(70000)


def test_what_is_no_model_is_refused(tmp_path: Path, model: Path) -> None:
    with pytest.raises(FormatError, match="no such directory"):
        Server(tmp_path / "none").start()
    (model / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="no weights"):
        Server(model).start()
    (model / "config.json").unlink()
    with pytest.raises(FormatError, match=r"no config\.json"):
        Server(model).start()


def test_paused_server_does_not_run_and_can_be_stopped(fake_vllm: Path, model: Path, tmp_path: Path) -> None:
    with Server(model, flags=["--stubborn"], log_path=tmp_path / "log") as server:
        pids = members(server)
        server.pause()
        deadline = time.monotonic() + 60
        while (states := {state(pid) for pid in pids}) != {"T"}:
            assert time.monotonic() < deadline, states
        server.resume()
        assert server._healthy()
        server.pause()
    assert alive(pids) == []


# A shell that starts the tests in the background hands them an ignored SIGINT.
SCRIPT = """
import signal, sys, time
from pathlib import Path
from bench import server as module
signal.signal(signal.SIGINT, signal.default_int_handler)
# Whoever runs the tests may ignore it, as nohup does.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
module.vllm_program = lambda: sys.argv[1]
with module.Server(Path(sys.argv[2]), flags=["--stubborn"], log_path=Path(sys.argv[3])) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_signals_to_us_end_the_server(
    fake_vllm: Path, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    words = [sys.executable, "-c", SCRIPT, str(fake_vllm), str(model), str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as process:
        assert process.stdout is not None
        leader = int(process.stdout.readline())
        pids = [member.pid for member in family(leader)]
        assert len(pids) == 3
        os.kill(process.pid, number)
        process.wait(timeout=30)
    # Nobody can tidy up after SIGKILL, but the server itself is told to end by the kernel.
    expected_gone = [leader] if number == signal.SIGKILL else pids
    deadline = time.monotonic() + 60
    while alive(expected_gone) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(expected_gone) == []
    for pid in alive(pids):
        os.kill(pid, signal.SIGKILL)
