"""int4 weights with int8 activations (``convert --weights w4a8``) through a real vLLM engine, in bf16."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, engine, packed_layers, score
from tests.serving.foreign import FORMATS, write_pruned
from tests.serving.reference import rounding, score_twin
from tests.serving.test_formats import assert_bf16_parity, assert_parity
from vllm_sparse.kernels import library

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not library.cpu_facts().built, reason="the compiled kernels are not built"),
]
ROUND = rounding(FORMATS["int8-dynamic"])


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoint and the dense twin of its weights."""
    dense = ck.write_dense(ck.pruned_model("llama", False).float(), tmp_path / "d")
    convert(dense, tmp_path / "int4", weights="int4")
    # From int4 only the promise about activations changes.
    convert(tmp_path / "int4", tmp_path / "s", weights="w4a8")
    convert(tmp_path / "s", tmp_path / "t", to="dense")
    return tmp_path / "s", tmp_path / "t"


def test_the_compiled_kernel_serves_it(llama: tuple[Path, Path]) -> None:
    sparse, twin = llama
    linear = json.loads((sparse / "config.json").read_text())["quantization_config"]["linear"]
    assert (linear["weights"], linear["activations"]) == ("int4", "int8_per_token")
    int4 = load_file(sparse.parent / "int4" / "model.safetensors")
    w4a8 = load_file(sparse / "model.safetensors")
    assert set(w4a8) == set(int4)
    assert all(torch.equal(w4a8[name], tensor) for name, tensor in int4.items())
    with engine(sparse, "bfloat16") as llm:
        layers = packed_layers(llm)
        assert len(layers) == 8
        assert set(layers.values()) == {"cpu"}
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    exact = score_twin(twin, ck.VOCAB, MANY_PROMPTS, ROUND)
    dense = score_twin(twin, ck.VOCAB, MANY_PROMPTS, ROUND, torch.bfloat16)
    assert_bf16_parity(ours, dense, exact, "w4a8")


@pytest.mark.slow
def test_float32_answers_as_the_twin_with_rounded_activations(llama: tuple[Path, Path]) -> None:
    """The reference backend, which is what the compiled kernel is checked against."""
    sparse, twin = llama
    with engine(sparse) as llm:
        assert set(packed_layers(llm).values()) == {"reference"}
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_twin(twin, ck.VOCAB, MANY_PROMPTS, ROUND), "w4a8 in float32")


@pytest.mark.slow
def test_experts_are_one_call_of_the_compiled_kernel(tmp_path: Path) -> None:
    write_pruned("qwen3-moe", tmp_path / "d", torch.float32)
    convert(tmp_path / "d", tmp_path / "s", weights="w4a8")
    convert(tmp_path / "s", tmp_path / "t", to="dense")
    with engine(tmp_path / "s", "bfloat16") as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        layers = [module.sparse_experts for module in model.modules() if hasattr(module, "sparse_experts")]
        assert len(layers) == ck.SHAPE["num_hidden_layers"]
        assert {layer.not_in_one_call for layer in layers} == {None}
        assert {layer.gate_up.backend.name for layer in layers} == {"cpu"}
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    exact = score_twin(tmp_path / "t", ck.VOCAB, MANY_PROMPTS, ROUND)
    dense = score_twin(tmp_path / "t", ck.VOCAB, MANY_PROMPTS, ROUND, torch.bfloat16)
    assert_bf16_parity(ours, dense, exact, "w4a8, experts")
