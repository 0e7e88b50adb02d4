"""2:4 checkpoints through a real vLLM engine, against their dense twins in the same vLLM."""

import json
from pathlib import Path

import pytest
import torch

from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, engine, packed_layers, score, serve_and_score
from tests.serving.test_formats import assert_bf16_parity
from vllm_sparse.errors import FormatError, UnsupportedError

pytestmark = pytest.mark.e2e
LINEARS_PER_LAYER = 4  # qkv, o, gate_up, down


def assert_twins(ours, twin, tolerance: float = 1e-4) -> None:
    assert (ours.logprobs - twin.logprobs).abs().mean() <= tolerance
    assert (ours.top1 == twin.top1).float().mean() >= 0.999


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama-bias", True), ("qwen3", True)])
def test_bitmask_answers_as_its_dense_twin(tmp_path: Path, family: str, tied: bool) -> None:
    model = ck.pruned_model(family, tied)
    twin = serve_and_score(ck.write_dense(model, tmp_path / "dense"), ck.VOCAB)
    with engine(ck.write_bitmask(model, tmp_path / "sparse")) as llm:
        assert len(packed_layers(llm)) == LINEARS_PER_LAYER * ck.SHAPE["num_hidden_layers"]
        ours = score(llm, ck.VOCAB)
    assert_twins(ours, twin)


def test_bf16_is_as_close_to_float32_as_the_dense_twin(tmp_path: Path) -> None:
    model = ck.pruned_model("qwen3")
    dense, sparse = ck.write_dense(model, tmp_path / "d"), ck.write_bitmask(model, tmp_path / "s")
    exact = serve_and_score(dense, ck.VOCAB)
    dense_error = (serve_and_score(dense, ck.VOCAB, "bfloat16").logprobs - exact.logprobs).abs().mean()
    sparse_error = (serve_and_score(sparse, ck.VOCAB, "bfloat16").logprobs - exact.logprobs).abs().mean()
    assert 0 < sparse_error <= 1.1 * dense_error


@pytest.mark.slow
def test_dense_with_zeros_in_bf16_is_as_close_to_float32_as_served_dense(tmp_path: Path) -> None:
    folder = ck.write_dense(ck.pruned_model("llama", False), tmp_path / "d")
    exact = serve_and_score(folder, ck.VOCAB, count=MANY_PROMPTS)
    dense = serve_and_score(folder, ck.VOCAB, "bfloat16", MANY_PROMPTS)
    sparse = serve_and_score(folder, ck.VOCAB, "bfloat16", MANY_PROMPTS, quantization="sparse24")
    assert_bf16_parity(sparse, dense, exact, "dense with zeros")


@pytest.mark.parametrize(("kind", "per_tensor"), [("int", False), ("int", True), ("float", False)])
def test_8_bit_weights_answer_as_the_dequantised_twin(tmp_path: Path, kind: str, per_tensor: bool) -> None:
    model = ck.pruned_model("llama", False)
    sparse = ck.write_quantized(model, tmp_path / "s", kind, activations=False, per_tensor=per_tensor)
    # The twin's weights are the dequantised values in float32, not rounded to bf16 again.
    tensors = ck.tensors_of(model.float())
    raw = ck.load_dequantised(sparse)
    model.load_state_dict({**tensors, **raw}, strict=False)
    twin = serve_and_score(ck.write_dense(model, tmp_path / "d"), ck.VOCAB)
    assert_twins(serve_and_score(sparse, ck.VOCAB), twin)


def test_ignored_layers_stay_dense(tmp_path: Path) -> None:
    model = ck.pruned_model("llama", False)
    skip = ("lm_head", "model.layers.1.mlp.down_proj")
    twin = serve_and_score(ck.write_dense(model, tmp_path / "d"), ck.VOCAB)
    with engine(ck.write_bitmask(model, tmp_path / "s", skip=skip)) as llm:
        layers = packed_layers(llm)
        ours = score(llm, ck.VOCAB)
    assert "model.layers.1.mlp.down_proj" not in layers
    assert "model.layers.0.mlp.down_proj" in layers
    assert_twins(ours, twin)


def test_a_sparse_head_with_a_padded_vocabulary(tmp_path: Path) -> None:
    model = ck.pruned_model("llama", False, head=True)  # 250 entries, which vLLM pads to 256
    twin = serve_and_score(ck.write_dense(model, tmp_path / "d"), ck.VOCAB)
    with engine(ck.write_bitmask(model, tmp_path / "s", skip=())) as llm:
        assert "lm_head" in packed_layers(llm)
        ours = score(llm, ck.VOCAB)
    assert_twins(ours, twin)


def test_dense_with_zeros_is_packed_from_its_data(tmp_path: Path) -> None:
    model = ck.pruned_model("llama", False)
    block = {"sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"]}}
    with engine(ck.write_dense(model, tmp_path / "claimed", block)) as llm:
        assert len(packed_layers(llm)) == 8
        claimed = score(llm, ck.VOCAB, MANY_PROMPTS)
    with engine(ck.write_dense(model, tmp_path / "plain"), quantization="sparse24") as llm:
        assert len(packed_layers(llm)) == 8
        asked = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert torch.equal(claimed.logprobs, asked.logprobs)
    assert_twins(claimed, serve_and_score(tmp_path / "plain", ck.VOCAB, count=MANY_PROMPTS))


def test_a_layer_that_is_not_24_falls_back_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ck.pruned_model("llama", False)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0:4] = 1.0
    folder = ck.write_dense(model, tmp_path / "d")
    with engine(folder, quantization="sparse24") as llm:
        layers = packed_layers(llm)
        ours = score(llm, ck.VOCAB)
    assert len(layers) == 7
    assert "model.layers.0.mlp.down_proj" not in layers
    assert_twins(ours, serve_and_score(folder, ck.VOCAB))
    monkeypatch.setenv("VLLM_SPARSE_STRICT", "1")
    with (
        pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.down_proj .* not 2:4"),
        engine(folder, quantization="sparse24"),
    ):
        pass


def test_a_vestigial_sparsity_config_loads_through_stock_vllm(tmp_path: Path) -> None:
    model = ck.pruned_model("llama", False)
    block = {"sparsity_config": {"format": "dense", "sparsity_structure": "0:0", "targets": ["Linear"]}}
    folder = ck.write_dense(model, tmp_path / "d", block)
    with engine(folder) as llm:
        assert packed_layers(llm) == {}
        ours = score(llm, ck.VOCAB)
    plain = serve_and_score(ck.write_dense(model, tmp_path / "p"), ck.VOCAB)
    assert torch.equal(ours.logprobs, plain.logprobs)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("popcount", r"layers\.1\.mlp\.down_proj.*not have exactly 2 bits"),
        ("missing", r"layers\.0\.self_attn\.qkv_proj.*not 2:4"),
        ("shape", r"layers\.1\.mlp\.down_proj: .*shape tensor says \[64, 200\].*a \[64, 192\] matrix"),
        ("scale", r"layers\.1\.mlp\.down_proj\.weight_scale holds values that are not finite"),
    ],
)
def test_damaged_tensors_name_the_layer(tmp_path: Path, damage: str, message: str) -> None:
    model = ck.pruned_model("llama", False)
    if damage == "scale":
        folder = ck.write_quantized(model, tmp_path / "s", "int", activations=False)
    else:
        folder = ck.write_bitmask(model, tmp_path / "s")
    ck.damage(folder, damage)
    with pytest.raises(FormatError, match=message), engine(folder):
        pass


@pytest.mark.parametrize("fmt", ["sparse-bitmask", "marlin-24"])
def test_formats_that_need_converting_say_so(tmp_path: Path, fmt: str) -> None:
    model = ck.pruned_model("llama", False)
    block = (
        {"sparsity_config": {"format": fmt, "targets": ["Linear"]}}
        if fmt == "sparse-bitmask"
        else {
            "format": fmt,
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        }
    )
    folder = ck.write_dense(model, tmp_path / "d", block)
    with pytest.raises(UnsupportedError, match=f"stored as {fmt}.*vllm-sparse convert"), engine(folder):
        pass


def test_disabled_plugin_leaves_the_refusal_to_vllm(tmp_path: Path) -> None:
    """VLLM_SPARSE_DISABLE=1 in a fresh process: vLLM's own refusal comes back."""
    import os
    import subprocess
    import sys

    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s")
    code = (
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"EngineArgs(model={json.dumps(str(folder))}, skip_tokenizer_init=True).create_engine_config()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VLLM_SPARSE_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "Sparsity support has been removed" in run.stderr
