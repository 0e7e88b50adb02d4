"""2:4 experts through a real vLLM engine, against the dense twin."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.serving import checkpoints as ck
from tests.serving.engine import engine, score, serve_and_score
from vllm_sparse.errors import FormatError
from vllm_sparse.sparse24 import topk_mask

pytestmark = pytest.mark.e2e

COMMON = {**ck.SHAPE, "intermediate_size": 96}
FAMILIES = {
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    ),
}


def write_pair(family: str, folder: Path) -> tuple[Path, Path]:
    """A dense and a bitmask checkpoint of the same 2:4 experts and attention."""
    torch.manual_seed(3)
    dense, sparse = folder / "dense", folder / "sparse"
    FAMILIES[family]().bfloat16().save_pretrained(dense)
    tensors = load_file(dense / "model.safetensors")
    packed = {}
    for name, weight in tensors.items():
        if weight.ndim == 2 and "layers" in name and ".gate.weight" not in name:
            tensors[name] = weight * topk_mask(weight.abs())
            packed.update(ck.packed(name.removesuffix(".weight"), tensors[name]))
        else:
            packed[name] = weight
    assert any(".experts.0." in name and name.endswith(".bitmask") for name in packed)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    sparse.mkdir()
    save_file(packed, sparse / "model.safetensors", metadata={"format": "pt"})
    (sparse / "config.json").write_text((dense / "config.json").read_text())
    ck.set_quantization(
        sparse, {"sparsity_config": {**ck.SPARSE_ONLY, "ignore": ["lm_head", r"re:.*\.gate$"]}}
    )
    return dense, sparse


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse_experts_answer_as_the_dense_twin(tmp_path: Path, family: str) -> None:
    dense, sparse = write_pair(family, tmp_path)
    twin = serve_and_score(dense, ck.VOCAB)
    with engine(sparse) as llm:
        ours = score(llm, ck.VOCAB)
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        left = [name for name, _ in model.named_parameters() if name.endswith(("compressed", "bitmask"))]
    assert left == []
    assert (ours.logprobs - twin.logprobs).abs().mean() <= 1e-4
    assert (ours.top1 == twin.top1).float().mean() >= 0.999


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    _, sparse = write_pair("qwen3-moe", tmp_path)
    path = sparse / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.4.down_proj.bitmask"]
    save_file(tensors, path, metadata={"format": "pt"})
    with (
        pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts.*, expert 4, w2: .*no bitmask"),
        engine(sparse),
    ):
        pass
