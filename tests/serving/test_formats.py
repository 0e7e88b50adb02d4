"""Formats that compressed-tensors 0.13 wrote, through a real vLLM engine.

Every case starts from the library's bytes and config and is judged by an independent float32 reference over
the dense weights that the library itself makes of them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, Scores, engine, packed_layers, score, serve_and_score
from tests.serving.foreign import FORMATS, Pair, written_by_library
from tests.serving.reference import rounding, score_twin
from vllm_sparse.quantization.scheme import SchemeTable, SparseScheme
from vllm_sparse.quantization.spec import parse_compressed_tensors

pytestmark = pytest.mark.e2e
# Cases that every run of the tests makes; the rest is marked slow.
QUICK = {"int8-dynamic", "int8-static", "fp8-static"}
QUICK_MOE = {"int8"}


def cases(quick: set[str]) -> list:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in FORMATS]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return written_by_library("llama", list(FORMATS), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def moes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return written_by_library("qwen3-moe", list(FORMATS), tmp_path_factory.mktemp("moe"))


def top1_agreement(one: Scores, other: Scores) -> float:
    return float((one.top1 == other.top1).float().mean())


def assert_parity(ours: Scores, twin: Scores, what: str, noise: float = 0.0) -> None:
    """The contract for float32: mean |dlogprob| <= 1e-4, top-1 >= 99.9 %, less the twin's own ``noise``."""
    distance = float((ours.logprobs - twin.logprobs).abs().mean())
    agreement = top1_agreement(ours, twin)
    print(f"{what}: {ours.logprobs.numel()} positions, mean |dlogprob| {distance:.2e}, top-1 {agreement:.4%}")
    assert float(twin.logprobs.std()) > 0.1, "a reference this flat could not tell a wrong model"
    assert distance <= 1e-4
    assert agreement >= 0.999 - noise


@pytest.mark.parametrize("name", FORMATS)
def test_reads(llamas: dict[str, Pair], name: str, tmp_path: Path) -> None:
    """Converted to dense, a checkpoint has the weights that the library makes of it."""
    convert(llamas[name].sparse, tmp_path / "dense", to="dense")
    ours = load_file(tmp_path / "dense" / "model.safetensors")
    theirs = load_file(llamas[name].twin / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        assert torch.equal(weight, theirs[key].to(weight.dtype)), key


@pytest.mark.parametrize("name", FORMATS)
def test_writes(llamas: dict[str, Pair], name: str, tmp_path: Path) -> None:
    """Converted to 2:4 with its numbers kept, a checkpoint has the library's own bytes and scheme."""
    convert(llamas[name].sparse, tmp_path / "again", weights="keep")
    ours = load_file(tmp_path / "again" / "model.safetensors")
    theirs = load_file(llamas[name].sparse / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype, key
        assert torch.equal(tensor.view(torch.uint8), theirs[key].view(torch.uint8)), key
    written, original = scheme_of(tmp_path / "again"), scheme_of(llamas[name].sparse)
    assert written == original


def scheme_of(folder: Path) -> SparseScheme | None:
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    names = ["model.layers.0.mlp.up_proj"]
    return SchemeTable(parse_compressed_tensors(block)).sparse_scheme(names, "Linear")


@pytest.mark.parametrize("name", cases(QUICK))
def test_serves(llamas: dict[str, Pair], name: str) -> None:
    pair = llamas[name]
    with engine(pair.sparse) as llm:
        assert len(packed_layers(llm)) == 4 * ck.SHAPE["num_hidden_layers"]
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, rounding(pair.format)), name)


def assert_bf16_parity(sparse: Scores, dense: Scores, exact: Scores, what: str) -> None:
    """The contract for bf16: at most 1.1 times as far from float32 as the dense twin in bf16."""
    distances = [float((scores.logprobs - exact.logprobs).abs().mean()) for scores in (sparse, dense)]
    print(f"{what} in bf16: distance {distances[0]:.3e}, dense twin {distances[1]:.3e}")
    assert 0 < distances[0] <= 1.1 * distances[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_bf16_is_as_close_to_float32_as_the_dense_twin(llamas: dict[str, Pair], name: str) -> None:
    """With rounded activations the dense twin runs in transformers."""
    pair = llamas[name]
    apply = rounding(pair.format)
    exact = score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, apply)
    if apply is None:
        dense = serve_and_score(pair.twin, ck.VOCAB, "bfloat16", MANY_PROMPTS)
    else:
        dense = score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, apply, torch.bfloat16)
    assert_bf16_parity(serve_and_score(pair.sparse, ck.VOCAB, "bfloat16", MANY_PROMPTS), dense, exact, name)


@pytest.mark.parametrize("name", cases(QUICK_MOE))
def test_moe(moes: dict[str, Pair], name: str) -> None:
    pair = moes[name]
    with engine(pair.sparse) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        layers = [module for module in model.modules() if hasattr(module, "sparse_experts")]
        assert len(layers) == ck.SHAPE["num_hidden_layers"]
        left = [key for key, _ in model.named_parameters() if key.endswith(("compressed", "bitmask"))]
        assert left == []
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    apply = rounding(pair.format)
    twin = score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, apply)
    if apply is None:
        assert_parity(ours, twin, name)
        return
    # A sum's last bit decides how a value next to a boundary is rounded, and that may choose another expert.
    exact = score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, apply, torch.float64)
    assert_parity(ours, exact, name, noise=1 - top1_agreement(twin, exact))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "int8", "fp8"])
def test_moe_in_bf16_is_as_close_to_float32_as_the_dense_twin(moes: dict[str, Pair], name: str) -> None:
    pair = moes[name]
    exact = score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, None)
    sparse, dense = (
        serve_and_score(folder, ck.VOCAB, "bfloat16", MANY_PROMPTS) for folder in (pair.sparse, pair.twin)
    )
    assert_bf16_parity(sparse, dense, exact, f"{name}, experts")


@pytest.mark.parametrize("family", ["mixtral", pytest.param("olmoe", marks=pytest.mark.slow)])
def test_moe_families(tmp_path: Path, family: str) -> None:
    pair = written_by_library(family, ["bf16"], tmp_path)["bf16"]
    with engine(pair.sparse) as llm:
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_twin(pair.twin, ck.VOCAB, MANY_PROMPTS, None), family)
