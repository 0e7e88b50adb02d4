"""2:4 experts through a real vLLM engine: what is found wrong, what runs, and experts stored densely.

That they answer right is shown in test_formats.py (by format and family) and test_parallel.py.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, engine, score
from tests.serving.foreign import write_pruned
from tests.serving.reference import score_twin
from tests.serving.test_formats import assert_parity
from vllm_sparse import sparse24
from vllm_sparse.errors import FormatError, UnsupportedError
from vllm_sparse.kernels.base import CanonicalWeight, LinearSpec, WeightFormat
from vllm_sparse.kernels.dispatch import select
from vllm_sparse.quantization.expert_layer import ExpertLayer, MoEActivation, PackedExperts, StaticScale
from vllm_sparse.quantization.spec import StaticQuant

pytestmark = pytest.mark.e2e
ROUTERS = r"re:.*\.gate$"


def write_experts(folder: Path, int8: bool = False) -> Path:
    """A bitmask checkpoint of a Qwen3-MoE, made without the library; int8 lacks its scales' config."""
    write_pruned("qwen3-moe", folder)
    path = folder / "model.safetensors"
    packed = {}
    for name, weight in load_file(path).items():
        if weight.ndim == 2 and "layers" in name and not name.endswith(".gate.weight"):
            values = ck.quantize(weight, "int")[0] if int8 else weight
            packed |= ck.packed(name.removesuffix(".weight"), values)
        else:
            packed[name] = weight
    save_file(packed, path, metadata={"format": "pt"})
    ck.set_quantization(folder, {"sparsity_config": {**ck.SPARSE_ONLY, "ignore": ["lm_head", ROUTERS]}})
    return folder


def change(folder: Path, **tensors: Any) -> None:
    """Add tensors to a checkpoint, or take those out whose value is None."""
    path = folder / "model.safetensors"
    content = {**load_file(path), **{name.replace("__", "."): value for name, value in tensors.items()}}
    save_file(
        {name: value for name, value in content.items() if value is not None}, path, metadata={"format": "pt"}
    )


EXPERTS = "model__layers__1__mlp__experts"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{EXPERTS}__4__down_proj__bitmask": None},
            r"layers\.1\.mlp\.experts.*, expert 4, w2: .*no bitmask",
        ),
        (
            {f"{EXPERTS}__6__up_proj__compressed": torch.zeros(32, 32, dtype=torch.bfloat16)},
            r"layers\.1\.mlp\.experts\.6\.up_proj\.compressed .*no place.*expert below 6",
        ),
        (
            {f"{EXPERTS}__2__up_proj__weight_scale": torch.ones(32, 1)},
            r"experts\.2\.up_proj\.weight_scale .*no place.*bitmask, compressed, shape",
        ),
        (
            {f"{EXPERTS}__2__up_proj__shape": torch.tensor([[64], [64]])},
            r"layers\.1\.mlp\.experts.*, expert 2, w3: .*says \[64, 64\].*a \[32, 64\] matrix",
        ),
    ],
    ids=["missing", "one-expert-too-many", "a-scale-without-a-config", "another-shape"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    folder = write_experts(tmp_path / "s")
    change(folder, **tensors)
    with pytest.raises(FormatError, match=message), engine(folder):
        pass


@pytest.mark.parametrize(
    "beside",
    [{"low_rank": {"projection": "pooled", "columns_per_rank": 16}}, {"outliers": {"layout": "csr"}}],
    ids=["low-rank", "outliers"],
)
def test_what_experts_cannot_have_beside_them_is_refused(tmp_path: Path, beside: dict[str, Any]) -> None:
    folder = write_experts(tmp_path / "s")
    linear = {"pattern": "2:4", "weights": "bf16", **beside}
    ignore = ["lm_head", ROUTERS, r"re:.*self_attn.*"]
    block = {"quant_method": "sparse24", "format_version": 2, "linear": linear, "ignore": ignore}
    ck.set_quantization(folder, block)
    message = r"layers\.0\.mlp\.experts.*: 2:4 experts are served without low-rank branches and outliers"
    with pytest.raises(UnsupportedError, match=message), engine(folder):
        pass


def test_values_of_another_kind_are_not_converted(tmp_path: Path) -> None:
    folder = write_experts(tmp_path / "s", int8=True)
    with pytest.raises(FormatError, match=r"stores torch\.int8, its config\.json announces"), engine(folder):
        pass


def count_operators(profile: Any) -> Counter[str]:
    return Counter({event.key.removeprefix("vllm_sparse::"): event.count for event in profile.key_averages()})


def test_bf16_layers_are_one_call_of_the_cpu_kernels(
    tmp_path: Path,
) -> None:
    """The operator is what runs, and bf16 keeps its contract: as close to float32 as the dense twin."""
    folder, twin = write_experts(tmp_path / "s"), write_pruned("qwen3-moe", tmp_path / "d")
    with engine(folder, "bfloat16") as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        layers = [module.sparse_experts for module in model.modules() if hasattr(module, "sparse_experts")]
        assert [layer.describe() for layer in layers] == ["in one call for each layer"] * 2
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            score(llm, ck.VOCAB, 1)
        sparse = score(llm, ck.VOCAB, MANY_PROMPTS)
    ran = count_operators(profile)
    assert ran["experts_packed_24"] == ran["experts_24"] > 0
    # Attention's two projections are all that is left to the operator for single layers.
    assert ran["linear_24"] == 2 * ran["experts_24"]
    exact = score_twin(twin, ck.VOCAB, MANY_PROMPTS, None)
    dense = score_twin(twin, ck.VOCAB, MANY_PROMPTS, None, torch.bfloat16)
    ours, theirs = (float((s.logprobs - exact.logprobs).abs().mean()) for s in (sparse, dense))
    print(f"experts in bf16: distance {ours:.3e}, dense twin {theirs:.3e}")
    assert 0 < ours <= 1.1 * theirs


def packed_projection(n: int, k: int, static: StaticScale | None) -> PackedExperts:
    """Three random int8 experts."""
    spec = LinearSpec(n, k, WeightFormat.INT8, torch.bfloat16)
    selection = select(spec, torch.device("cpu"))
    packed = []
    for _ in range(3):
        weight = torch.randn(n, k) * k**-0.5
        values, scale = ck.quantize(weight * sparse24.topk_mask(weight.abs()), "int")
        packed.append(selection.backend.pack(spec, CanonicalWeight(*sparse24.compress(values), scale)))
    weights, scales = zip(*((one.packed, one.scale) for one in packed), strict=True)
    packed = PackedExperts(torch.nn.Module(), "w13", spec, selection.backend, static)
    return packed.keep(torch.stack(weights), torch.stack(scales))


@pytest.mark.parametrize("fixed", [False, True], ids=["dynamic", "fixed-scales"])
def test_fixed_activation_scales_keep_the_path_by_expert(fixed: bool) -> None:
    torch.manual_seed(5)
    static = StaticScale(torch.tensor(0.05), torch.tensor(1.0), StaticQuant.INT8) if fixed else None
    layer = ExpertLayer(
        packed_projection(64, 32, static), packed_projection(32, 32, static), MoEActivation.SILU
    )
    x, ids = torch.randn(7, 32).bfloat16(), torch.tensor([[0, 2]] * 6 + [[-1, 1]])
    arguments = (x, torch.rand(7, 2), ids)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = layer.forward(*arguments)
    ran = count_operators(profile)
    expected = {"linear_24": 6} if fixed else {"experts_packed_24": 1}
    assert {name: ran[name] for name in ("linear_24", "experts_packed_24") if ran[name]} == expected
    assert ("fixed activation scales" in layer.describe()) == fixed
    torch.testing.assert_close(out, layer._by_expert(*arguments), rtol=0.03, atol=0.03)


def test_dense_experts_with_zeros_are_packed_or_fall_back_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pruned("qwen3-moe", tmp_path / "d")
    with engine(folder, quantization="sparse24") as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        layers = [module for module in model.modules() if hasattr(module, "sparse_experts")]
        assert len(layers) == 2
        assert all(layer.w13_weight.numel() == 0 for layer in layers)
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_twin(folder, ck.VOCAB, MANY_PROMPTS, None), "dense experts with zeros")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][0, :4] = 1.0
    save_file(tensors, path, metadata={"format": "pt"})
    monkeypatch.setenv("VLLM_SPARSE_STRICT", "1")
    message = r"layers\.1\.mlp\.experts runs dense.*expert 3 \(w13\) are not 2:4"
    with pytest.raises(UnsupportedError, match=message), engine(folder, quantization="sparse24"):
        pass
    monkeypatch.delenv("VLLM_SPARSE_STRICT")
    with engine(folder, quantization="sparse24") as llm:
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_twin(folder, ck.VOCAB, MANY_PROMPTS, None), "one layer of experts dense")
