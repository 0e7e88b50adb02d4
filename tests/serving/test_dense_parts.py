"""Fused layers of which the checkpoint stores some parts 2:4 and others dense."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, engine, packed_layers, score, serve_and_score
from tests.serving.test_formats import assert_parity
from vllm_sparse import sparse24
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.quantization.config import Sparse24Config

pytestmark = pytest.mark.e2e
DENSE = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj")
ONLY_HEAD = {"sparsity_config": {**ck.SPARSE_ONLY, "ignore": ["lm_head"]}}


def mixed_model(*dense: str) -> PreTrainedModel:
    """2:4 with biases, but for the named linears."""
    model = ck.pruned_model("llama-bias", False)
    torch.manual_seed(4)
    for name in dense:
        torch.nn.init.normal_(model.get_submodule(name).weight, std=0.02)
    return model


def counts(llm: Any) -> dict[str, int]:
    return dict(llm.llm_engine.vllm_config.quant_config.report.layers)


def test_each_part_is_served_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ignore list; and with a config.json that knows nothing of it, a whole dense layer among them."""
    model = mixed_model(*DENSE)
    twin = serve_and_score(ck.write_dense(model, tmp_path / "d"), ck.VOCAB, count=MANY_PROMPTS)
    folder = ck.write_bitmask(model, tmp_path / "s", skip=("lm_head", *DENSE))
    with engine(folder) as llm:
        assert len(packed_layers(llm)) == 8
        assert counts(llm) == {"sparse": 8, "dense": 3}  # The head is the third.
        assert_parity(score(llm, ck.VOCAB, MANY_PROMPTS), twin, "parts on the ignore list")
    ck.set_quantization(folder, ONLY_HEAD)
    with engine(folder) as llm:
        assert counts(llm) == {"sparse": 8, "dense": 1, "fallback": 2}
        assert_parity(score(llm, ck.VOCAB, MANY_PROMPTS), twin, "parts stored dense unannounced")
    monkeypatch.setenv("VLLM_SPARSE_STRICT", "1")
    message = r"layers\.0\.self_attn\.k_proj runs dense, not 2:4: .*layers\.0\.self_attn\.qkv_proj are 2:4"
    with pytest.raises(UnsupportedError, match=message), engine(folder):
        pass


def test_a_whole_layer_that_is_stored_dense_falls_back(tmp_path: Path) -> None:
    whole = tuple(f"model.layers.0.self_attn.{part}_proj" for part in "qkvo")
    model = mixed_model(*whole)
    folder = ck.write_bitmask(model, tmp_path / "s", skip=("lm_head", *whole))
    ck.set_quantization(folder, ONLY_HEAD)
    with engine(folder) as llm:
        assert counts(llm) == {"sparse": 6, "dense": 1, "fallback": 2}
        ours = score(llm, ck.VOCAB)
    twin = serve_and_score(ck.write_dense(model, tmp_path / "d"), ck.VOCAB)
    assert_parity(ours, twin, "whole layers stored dense unannounced")


def test_a_layer_that_config_leaves_dense_and_the_file_does_not(tmp_path: Path) -> None:
    """Named before its weight is missed; converted, the checkpoint is served."""
    model = mixed_model()
    folder = ck.write_bitmask(model, tmp_path / "s")
    attention = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    block = {"sparsity_config": {**ck.SPARSE_ONLY, "ignore": ["lm_head", *attention]}}
    ck.set_quantization(folder, block)
    with (
        pytest.raises(FormatError, match=r"layers\.1\.self_attn\.qkv_proj: .* 2:4 .*it dense.*convert"),
        engine(folder),
    ):
        pass
    convert(folder, tmp_path / "c")
    with engine(tmp_path / "c") as llm:
        assert len(packed_layers(llm)) == 8


def test_a_part_stored_twice_or_in_a_dense_8_bit_type_is_named(tmp_path: Path) -> None:
    folder = ck.write_bitmask(mixed_model(), tmp_path / "s")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    for weight, message in (
        (torch.ones(192, 64, dtype=torch.bfloat16), r"gate_up_proj: .*same rows dense \(weight\) and 2:4"),
        (torch.ones(192, 64, dtype=torch.int8), r"gate_up_proj: .*dense torch\.int8 weight \[192, 64\]"),
        (torch.ones(192, 32, dtype=torch.bfloat16), r"gate_up_proj: .*\[192, 32\] .*matrix \[192, 64\]"),
    ):
        save_file({**tensors, name: weight}, path, metadata={"format": "pt"})
        with pytest.raises(FormatError, match=message), engine(folder):
            pass


N, K, SCALE = 48, 128, 3.0 / 127


def layer_case(weights: str) -> tuple[Sparse24Config, dict[str, Tensor], Tensor]:
    """Config, the 2:4 part's tensors, and its dense weight."""
    dense = torch.randn(N, K)
    dense *= sparse24.topk_mask(dense.abs())
    linear: dict[str, Any] = {"pattern": "2:4", "weights": weights}
    if weights == "int4":
        linear |= {"group_size": 64}
        scale = dense.abs().unflatten(1, (-1, 64)).amax(-1) / 7
        numbers = (dense / scale.repeat_interleave(64, 1)).round()
        tensors = ck.packed("", numbers.to(torch.int8))
        nibbles = tensors[".compressed"].to(torch.uint8) & 0x0F
        tensors[".compressed"] = nibbles[:, ::2] | nibbles[:, 1::2] << 4
        dense = numbers * scale.repeat_interleave(64, 1)
    else:
        numbers, scale = ck.quantize(dense, "int" if weights == "int8" else "float")
        tensors = ck.packed("", numbers)
        if weights == "int8":
            linear |= {"activations": "int8_static"}
            tensors[".input_scale"] = torch.tensor([SCALE])
        dense = numbers.float() * scale
    block = {"quant_method": "sparse24", "format_version": 2, "linear": linear, "ignore": ["model.up_proj"]}
    made = Sparse24Config.from_config(block)
    assert isinstance(made, Sparse24Config)
    made.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    return made, {**tensors, ".weight_scale": scale}, dense


def test_quantised_parts_beside_dense_ones(tmp_path: Path) -> None:
    """Int8 with a fixed activation scale, which dense rows do not see; fp8; int4 with scales per group."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    torch.manual_seed(0)
    other, bias, x = torch.randn(N // 2, K), torch.randn(3 * N // 2), torch.randn(5, K)
    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s")
    with engine(folder) as llm, set_current_vllm_config(llm.llm_engine.vllm_config):
        for weights in ("int8", "fp8_e4m3", "int4"):
            config, tensors, dense = layer_case(weights)
            layer = MergedColumnParallelLinear(
                K, [N, N // 2], params_dtype=torch.float32, quant_config=config, prefix="model.gate_up_proj"
            )
            for name, tensor in tensors.items():
                parameter = getattr(layer, name.removeprefix("."))
                parameter.weight_loader(parameter, tensor, 0)
            layer.weight.weight_loader(layer.weight, other, 1)
            layer.bias.data.copy_(bias)
            layer.quant_method.process_weights_after_loading(layer)
            seen = (x / SCALE).round().clamp(-128, 127) * SCALE if weights == "int8" else x
            expected = torch.cat([seen @ dense.T, x @ other.T], dim=-1) + bias
            out, _ = layer(x)
            assert (out - expected).abs().max() <= 1e-4, weights
