"""Two real ranks give the same answers as one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, PROMPTS, Scores, serve_and_score
from tests.serving.foreign import CONVERTED, FORMATS, to_convert, write_pruned, written_by_library
from tests.serving.reference import rounding, score_twin
from tests.serving.test_families import write_pruned as write_family
from tests.serving.test_formats import assert_parity
from tests.serving.test_sparse24_format import add_low_rank, add_outliers
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.base import ActivationQuant, WeightFormat
from vllm_sparse.quantization.experts import Sparse24ExpertsMethod
from vllm_sparse.quantization.linear import Sparse24BitmaskLinearMethod
from vllm_sparse.quantization.report import LoadReport
from vllm_sparse.quantization.scheme import ScaleLayout, SparseScheme, Storage, WeightQuant

pytestmark = pytest.mark.e2e

RANKS = """
import json, sys, torch
from pathlib import Path
from tests.serving.engine import engine, score
if __name__ == "__main__":
    for line in sys.stdin:
        folder, out, count, options = json.loads(line)
        with engine(Path(folder), **options) as llm:
            scores = score(llm, 250, count)
        torch.save({"logprobs": scores.logprobs, "top1": scores.top1}, out)
        print("\\nSCORED", flush=True)
"""
ROOT = Path(__file__).parents[2]


class TwoRanks:
    """Engines of two real ranks, one after the other, started from one process that has vLLM imported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def score(self, folder: Path, count: int = PROMPTS, **options: Any) -> Scores:
        """Scores of the checkpoint in ``folder`` for ``count`` prompts under vLLM's ``options``."""
        if self.process is None:
            self.process = self._start()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        out = self.folder / "scores.pt"
        self.process.stdin.write(json.dumps([str(folder), str(out), count, options]) + "\n")
        self.process.stdin.flush()
        said = []
        for line in self.process.stdout:
            said.append(line)
            if line == "SCORED\n":
                break
        else:
            self.close()
            pytest.fail("".join(said)[-6000:])
        return Scores(**torch.load(out))

    def close(self) -> None:
        """End the process; the next use starts another."""
        if self.process is not None:
            self.process.communicate()
            self.process = None

    def _start(self) -> subprocess.Popen[str]:
        script = self.folder / "ranks.py"
        script.write_text(RANKS)
        ranks = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, str(script)],
            cwd=ROOT,
            env={**os.environ, **ranks},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    started = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def assert_same_answers(two_ranks: TwoRanks, folder: Path, name: str = "bf16", **options: Any) -> None:
    """Two ranks answer as one; ``name`` is the format, of which only activations matter.

    Sums in another order differ in their last bits. Where activations are rounded to 8 bits, such a bit now
    and then becomes a whole step, so these formats are held to the contract's mean over 4,000 positions.
    """
    if FORMATS[name].activations is not None:
        one = serve_and_score(folder, ck.VOCAB, count=MANY_PROMPTS)
        return assert_parity(
            two_ranks.score(folder, MANY_PROMPTS, **options), one, f"{folder.name}, {options}"
        )
    one, two = serve_and_score(folder, ck.VOCAB), two_ranks.score(folder, **options)
    assert torch.equal(one.top1, two.top1)
    assert (one.logprobs - two.logprobs).abs().max() < 1e-4
    return None


def test_tensor_parallel(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """Column, row, fused and replicated splits of a bitmask checkpoint, head included."""
    model = ck.pruned_model("llama-bias", False, head=True)
    folder = ck.write_bitmask(model, tmp_path / "s", skip=())
    assert_same_answers(two_ranks, folder, tensor_parallel_size=2)


@pytest.mark.slow
def test_a_mamba_layer_with_one_group(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """Its ``in_proj`` is split part by part, by a loader that the model brings."""
    convert(write_family("granite-hybrid", tmp_path / "d"), tmp_path / "s")
    assert_same_answers(two_ranks, tmp_path / "s", tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_formats_over_two_ranks(two_ranks: TwoRanks, tmp_path: Path, name: str) -> None:
    pair = written_by_library("llama", [name], tmp_path)[name]
    if pair.format.activations != "dynamic":
        return assert_same_answers(two_ranks, pair.sparse, name, tensor_parallel_size=2)
    # As in vLLM's own W8A8, a rank knows its own columns alone and rounds them by their own largest value.
    two = two_ranks.score(pair.sparse, MANY_PROMPTS, tensor_parallel_size=2)
    split = rounding(pair.format, ranks=2)
    expected = score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, rounding(pair.format), row_parallel=split)
    return assert_parity(two, expected, f"{name} over two ranks")


@pytest.mark.slow
def test_dense_with_zeros_over_two_ranks(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """Each rank finds 2:4 in its own slice of a densely stored weight."""
    folder = ck.write_dense(ck.pruned_model("llama", False), tmp_path / "d")
    claim = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]}
    ck.set_quantization(folder, {"sparsity_config": claim})
    assert_same_answers(two_ranks, folder, tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_converted_formats_over_two_ranks(two_ranks: TwoRanks, tmp_path: Path, name: str) -> None:
    convert(to_convert("llama-wide", [name], tmp_path)[name].sparse, tmp_path / "s")
    assert_same_answers(two_ranks, tmp_path / "s", tensor_parallel_size=2)


@pytest.mark.slow
def test_one_kv_head_is_replicated(two_ranks: TwoRanks, tmp_path: Path) -> None:
    folder = ck.write_bitmask(ck.pruned_model("one-kv-head", False), tmp_path / "s")
    assert_same_answers(two_ranks, folder, tensor_parallel_size=2)


@pytest.mark.slow
def test_parts_stored_dense_over_two_ranks(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """A key head on both ranks, half of gate and up, and a row-parallel layer that the config forgot."""
    dense = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj")
    model = ck.pruned_model("one-kv-head", False)
    for name in dense:
        torch.nn.init.normal_(model.get_submodule(name).weight, std=0.02)
    folder = ck.write_bitmask(model, tmp_path / "s", skip=("lm_head", *dense))
    block = {"sparsity_config": {**ck.SPARSE_ONLY, "ignore": ["lm_head", *dense[:2]]}}
    ck.set_quantization(folder, block)
    assert_same_answers(two_ranks, folder, tensor_parallel_size=2)


@pytest.mark.slow
def test_int4_groups_over_two_ranks(two_ranks: TwoRanks, tmp_path: Path) -> None:
    model, folder = ck.pruned_model("llama-256", False).float(), tmp_path / "s"
    convert(ck.write_dense(model, tmp_path / "d"), folder, weights="int4")
    assert_same_answers(two_ranks, folder, tensor_parallel_size=2)


@pytest.mark.slow
def test_w4a8_over_two_ranks(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """int4 groups; a rank rounds its own columns of the activations, as in W8A8."""
    rounded = FORMATS["int8-dynamic"]
    dense = ck.write_dense(ck.pruned_model("llama-256", False).float(), tmp_path / "d")
    convert(dense, tmp_path / "s", weights="w4a8")
    convert(tmp_path / "s", tmp_path / "t", to="dense")
    two = two_ranks.score(tmp_path / "s", MANY_PROMPTS, tensor_parallel_size=2)
    split = rounding(rounded, ranks=2)
    expected = score_twin(tmp_path / "t", ck.VOCAB, MANY_PROMPTS, rounding(rounded), row_parallel=split)
    assert_parity(two, expected, "w4a8 over two ranks")


@pytest.mark.slow
@pytest.mark.parametrize("projection", ["pooled", "dense"])
def test_outliers_and_low_rank_over_two_ranks(two_ranks: TwoRanks, tmp_path: Path, projection: str) -> None:
    """Rows and columns of the sparse matrix are cut for each rank, fused parts and one KV head included."""
    model = ck.pruned_model("one-kv-head", False).float()
    folder = ck.write_bitmask(model, tmp_path / "s")
    add_low_rank(model, folder, projection)
    add_outliers(model, folder)
    assert_same_answers(two_ranks, folder, tensor_parallel_size=2)


@pytest.mark.slow
def test_experts_split_by_width(two_ranks: TwoRanks, tmp_path: Path) -> None:
    name = "int8-static"
    folder = written_by_library("qwen3-moe", [name], tmp_path)[name].sparse
    assert_same_answers(two_ranks, folder, name, tensor_parallel_size=2)


@pytest.mark.slow
def test_int4_experts_split_by_width(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """Groups of 128 columns stay whole: two of each expert's 256 columns."""
    convert(write_pruned("qwen3-moe-wide", tmp_path / "d"), tmp_path / "s", weights="int4")
    assert_same_answers(two_ranks, tmp_path / "s", tensor_parallel_size=2)


@pytest.mark.slow
def test_experts_split_by_expert(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """--enable-expert-parallel: whole experts on each rank."""
    name = "int8-static"
    folder = written_by_library("qwen3-moe", [name], tmp_path)[name].sparse
    assert_same_answers(two_ranks, folder, name, tensor_parallel_size=2, enable_expert_parallel=True)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [("llama", "bf16"), ("llama", "int8"), ("qwen3-moe", "int8")])
def test_pipeline_parallel(two_ranks: TwoRanks, tmp_path: Path, family: str, name: str) -> None:
    """Compiled, because vLLM's CPU worker has no eager pipeline for any model."""
    folder = written_by_library(family, [name], tmp_path)[name].sparse
    assert_same_answers(two_ranks, folder, name, pipeline_parallel_size=2, enforce_eager=False)


@pytest.mark.parametrize(
    ("k", "ranks", "group", "message"),
    [
        (72, 2, None, r"down_proj: in_features 72 over 2 .* is 36 each.* not a multiple of 8.* divides 9"),
        (384, 2, 128, r"down_proj: in_features 384 over 2 .* is 192 each.* multiple of 128.* divides 3"),
        (192, 1, 128, r"down_proj: in_features 192 is not a multiple of 128"),
        (66, 1, None, r"down_proj: in_features 66 is not a multiple of 4"),
    ],
)
def test_linears_that_do_not_split_are_named(k: int, ranks: int, group: int | None, message: str) -> None:
    layout = ScaleLayout.CHANNEL if group is None else ScaleLayout.GROUP
    scheme = SparseScheme(
        Storage.BITMASK, WeightQuant(WeightFormat.INT4, layout, group), ActivationQuant.NONE
    )
    method = Sparse24BitmaskLinearMethod(scheme, "model.layers.0.mlp.down_proj", LoadReport())
    with pytest.raises(UnsupportedError, match=message):
        method.create_weights(torch.nn.Module(), k // ranks, [64], k, 64, torch.bfloat16, weight_loader=None)


def test_experts_that_do_not_split_are_named() -> None:
    parallel = SimpleNamespace(tp_size=2, tp_rank=0, use_all2all_kernels=False)
    config = SimpleNamespace(moe_parallel_config=parallel, intermediate_size=24)
    method = Sparse24ExpertsMethod.__new__(Sparse24ExpertsMethod)
    method.prefix = "model.layers.0.mlp.experts"
    method.scheme = SimpleNamespace(weight_quant=None)
    message = r"layers\.0\.mlp\.experts: .*hidden width is 64, .*width 24 over 2 .* is 12 each.*divides 3"
    with pytest.raises(UnsupportedError, match=message):
        method.create_weights(SimpleNamespace(moe_config=config), 4, 64, 12, torch.bfloat16)


def test_scales_of_experts_are_float32_whatever_is_served() -> None:
    """vLLM makes layers with the served dtype as default; scales in bf16 would lose a third digit."""
    from vllm.utils.torch_utils import set_default_torch_dtype

    parallel = SimpleNamespace(tp_size=1, tp_rank=0, use_all2all_kernels=False)
    layer = torch.nn.Module()
    layer.moe_config = SimpleNamespace(moe_parallel_config=parallel, intermediate_size=16)
    layer.load_weights = lambda weights: weights
    method = Sparse24ExpertsMethod.__new__(Sparse24ExpertsMethod)
    quant = WeightQuant(WeightFormat.INT8, ScaleLayout.CHANNEL, None)
    static = ActivationQuant.INT8_PER_TOKEN
    method.prefix, method.report, method._columns = "experts", LoadReport(), 2
    method.scheme = SimpleNamespace(weight_quant=quant, static_quant=static)
    with set_default_torch_dtype(torch.bfloat16):
        method.create_weights(layer, 4, 64, 16, torch.bfloat16)
    scales = {name: p.dtype for name, p in layer.named_parameters() if name.endswith("_scale")}
    assert len(scales) == 4
    assert set(scales.values()) == {torch.float32}
