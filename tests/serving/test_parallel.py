"""Two real ranks give the same answers as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.serving import checkpoints as ck
from tests.serving.engine import Scores, serve_and_score

pytestmark = pytest.mark.e2e

RANKS = """
import os, sys, torch
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
from pathlib import Path
from tests.serving.engine import engine, score
if __name__ == "__main__":
    folder, out, tensor, pipeline = sys.argv[1:]
    with engine(Path(folder), tensor_parallel_size=int(tensor), pipeline_parallel_size=int(pipeline)) as llm:
        scores = score(llm, 250)
    torch.save({"logprobs": scores.logprobs, "top1": scores.top1}, out)
"""


def on_two_ranks(folder: Path, tmp_path: Path, tensor: int, pipeline: int) -> Scores:
    script, out = tmp_path / "ranks.py", tmp_path / "scores.pt"
    script.write_text(RANKS)
    run = subprocess.run(
        [sys.executable, str(script), str(folder), str(out), str(tensor), str(pipeline)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return Scores(**torch.load(out))


def test_tensor_parallel(tmp_path: Path) -> None:
    """Column, row, fused and replicated splits of a bitmask checkpoint, head included."""
    model = ck.pruned_model("llama-bias", False, head=True)
    folder = ck.write_bitmask(model, tmp_path / "s", skip=())
    one = serve_and_score(folder, ck.VOCAB)
    two = on_two_ranks(folder, tmp_path, 2, 1)
    assert torch.equal(one.top1, two.top1)
    assert (one.logprobs - two.logprobs).abs().max() < 1e-4
