"""Two real ranks: tensor parallel and pipeline parallel against the same reference."""

from pathlib import Path
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines

from vllm_sparse.models.layer_config import read_model_shape

pytestmark = pytest.mark.e2e

LAYERS: dict[str, dict[str, Any]] = {
    "llama": checkpoints.EVEN_LAYERS,
    "qwen3": checkpoints.EVEN_LAYERS,
    "qwen3_moe": {
        "1": {"num_experts": 6, "num_key_value_heads": 2, "moe_intermediate_size": 32},
        "2": {"num_experts": 5, "num_attention_heads": 2, "num_key_value_heads": 1},
    },
}


def check(family: str, folder: Path, ranks: int, **options: Any) -> None:
    config = checkpoints.make_config(family, 4, LAYERS[family])
    tensors = checkpoints.make_tensors(config)
    checkpoints.save_checkpoint(folder, config, tensors)
    with engines.engine(folder, **options) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, tensors)
        token_bytes = read_model_shape(config).kv_bytes_per_token(4, ranks)
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        if "pipeline_parallel_size" not in options:
            assert blocks == engines.KV_BYTES // (32 * token_bytes)


@pytest.fixture(autouse=True)
def one_core_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


def test_tensor_parallel_qwen3(tmp_path: Path) -> None:
    check("qwen3", tmp_path, 2, tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tensor_parallel(family: str, tmp_path: Path) -> None:
    check(family, tmp_path, 2, tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYERS)
def test_tensor_parallel_compiled(family: str, tmp_path: Path) -> None:
    check(family, tmp_path, 2, tensor_parallel_size=2, enforce_eager=False)


@pytest.mark.slow
def test_expert_parallel(tmp_path: Path) -> None:
    check("qwen3_moe", tmp_path, 2, tensor_parallel_size=2, enable_expert_parallel=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_pipeline_parallel_compiled(family: str, tmp_path: Path) -> None:
    """Compiled, because vLLM's CPU worker has no eager pipeline for any model."""
    check(family, tmp_path, 1, pipeline_parallel_size=2, enforce_eager=False)
