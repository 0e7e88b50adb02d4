"""2:4 experts through a real vLLM engine: what is found wrong, and experts stored densely.

That they answer right is shown in test_formats.py (by format and family) and test_parallel.py.
"""

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
from vllm_sparse.errors import FormatError, UnsupportedError

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
    ],
    ids=["missing", "one-expert-too-many", "a-scale-without-a-config"],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    folder = write_experts(tmp_path / "s")
    change(folder, **tensors)
    with pytest.raises(FormatError, match=message), engine(folder):
        pass


def test_values_of_another_kind_are_not_converted(tmp_path: Path) -> None:
    folder = write_experts(tmp_path / "s", int8=True)
    with pytest.raises(FormatError, match=r"stores torch\.int8, its config\.json announces"), engine(folder):
        pass


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
