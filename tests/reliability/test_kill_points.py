"""A few kills in every run of the tests; the 50 of docs/reliability.md are the same code with more points."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_conversions_leave_nothing_broken():
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.kill_points", "--points", "10", "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 corrupt results" in done.stdout
