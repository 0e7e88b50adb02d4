"""Memory of a serving process, from the kernel's own books: what stays, and the peak while loading."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from converters.convert import convert
from tests.serving import checkpoints as ck

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
# Anonymous memory around vLLM's own loading of the weights; mapped checkpoint files are not in it.
SERVE = """
import ctypes, gc, json, sys, threading, time
from pathlib import Path
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm_sparse import metrics
from tests.serving.engine import engine

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def settled():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return anonymous()

facts, load = {}, BaseModelLoader.load_model

def measured(self, *args, **kwargs):
    facts["before"] = facts["peak"] = settled()
    done = threading.Event()

    def sample():
        while not done.wait(0.002):
            facts["peak"] = max(facts["peak"], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    model = load(self, *args, **kwargs)
    done.set()
    thread.join()
    facts["after"] = settled()
    return model

BaseModelLoader.load_model = measured
if __name__ == "__main__":
    with engine(Path(sys.argv[1]), "bfloat16"):
        for item in metrics.read_facts():
            facts["resident"], facts["dense_equivalent"] = item.resident_bytes, item.dense_equivalent_bytes
    print("FACTS " + json.dumps(facts))
"""


@dataclass(frozen=True)
class Memory:
    """Bytes: growth of the process by loading, its peak meanwhile, and what /metrics says."""

    grown: int
    peak: int
    resident: int
    dense_equivalent: int


def measure(folder: Path, tmp_path: Path) -> Memory:
    script = tmp_path / "memory.py"
    script.write_text(SERVE)
    run = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("FACTS "))
    facts = json.loads(line.removeprefix("FACTS "))
    return Memory(
        facts["after"] - facts["before"],
        facts["peak"] - facts["before"],
        facts.get("resident", 0),
        facts.get("dense_equivalent", 0),
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    with torch.no_grad():
        for name in ck.linear_names(model):
            weight = model.get_submodule(name).weight
            weight.mul_(ck.topk_mask(weight.abs()))
    return ck.write_dense(model.bfloat16(), tmp_path_factory.mktemp("memory") / "dense")


@pytest.mark.parametrize(("weights", "bound"), [("keep", 0.57), ("int8", 0.32)])
def test_resident_weights_and_the_peak_of_loading(
    dense: Path, tmp_path: Path, weights: str, bound: float
) -> None:
    convert(dense, tmp_path / "s", weights=weights)
    plain, sparse = measure(dense, tmp_path), measure(tmp_path / "s", tmp_path)
    linears = sparse.dense_equivalent
    others = plain.grown - linears
    print(
        f"{weights}: linears {sparse.resident / 1e6:.1f} MB resident, {linears / 1e6:.1f} MB dense "
        f"({sparse.resident / linears:.4f}); process grew {sparse.grown / 1e6:.1f} MB, dense "
        f"{plain.grown / 1e6:.1f} MB; peak while loading {sparse.peak / 1e6:.1f} MB"
    )
    assert sparse.resident <= bound * linears
    # The process agrees with the metric: all it grew by beyond the linears is what the dense model has too.
    assert sparse.grown - max(others, 0) <= (bound + 0.03) * linears
    # Never the whole model twice: the stored form plus one layer's packing.
    assert sparse.peak <= 1.5 * sparse.grown
