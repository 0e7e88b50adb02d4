"""What somebody who waits sees: bars on a terminal, and nothing of them in a log."""

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

CONVERT = [sys.executable, "-m", "converters.cli", "convert"]
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(words: list[str]) -> tuple[int, str]:
    """Exit code, and what a terminal of 100 columns on stderr got."""
    outer, inner = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=inner, env=environment)
    os.close(inner)
    seen = bytearray()

    def read() -> None:
        # The kernel ends a terminal without writers by an error.
        try:
            while chunk := os.read(outer, 4096):
                seen.extend(chunk)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    code = child.wait(timeout=120)
    reader.join(timeout=10)
    os.close(outer)
    return code, CODES.sub("", seen.decode())


def test_a_terminal_gets_a_full_bar_for_each_phase(make_checkpoint, tmp_path: Path) -> None:
    source = make_checkpoint(shards=3)
    code, seen = on_a_terminal([*CONVERT, str(source), str(tmp_path / "packed")])
    assert code == 0, seen
    for phase in ("checking", "writing"):
        lines = [line for line in re.split(r"[\r\n]+", seen) if line.startswith(phase)]
        assert lines, seen
        done, total = re.search(r"([\d.]+)/([\d.]+) [kM]?B", lines[-1]).groups()
        assert done == total != "0", lines[-1]


def test_a_log_gets_none(make_checkpoint, tmp_path: Path) -> None:
    words = [*CONVERT, str(make_checkpoint()), str(tmp_path / "packed")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "writing" not in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
