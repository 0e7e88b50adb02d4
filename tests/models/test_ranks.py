"""Two real ranks: tensor parallel and pipeline parallel against the same reference."""

from pathlib import Path
from typing import Any

import pytest
import structured_checkpoints as checkpoints
import structured_engine as engines

from vllm_sparse.models.layer_config import read_model_shape

pytestmark = pytest.mark.e2e


def check(family: str, folder: Path, ranks: int, positions: bool = False, **options: Any) -> None:
    config = checkpoints.make_config(family, 4, checkpoints.even_layers_for(family))
    tensors = checkpoints.make_tensors(config)
    checkpoints.save_checkpoint(folder, config, tensors)
    with engines.engine(folder, **options) as llm:
        engines.assert_parity(engines.run(llm, engines.prompts()), config, tensors)
        if positions:
            engines.assert_contract(llm, config, tensors)
        token_bytes = read_model_shape(config).kv_bytes_per_token(4, ranks)
        cache = llm.llm_engine.vllm_config.cache_config
        if "pipeline_parallel_size" not in options:
            assert cache.num_gpu_blocks == engines.KV_BYTES // (cache.block_size * token_bytes)


@pytest.fixture(autouse=True)
def one_core_per_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize(
    "family",
    [f if f == "qwen3" else pytest.param(f, marks=pytest.mark.slow) for f in checkpoints.FAMILIES],
)
def test_tensor_parallel(family: str, tmp_path: Path) -> None:
    check(family, tmp_path, 2, positions=True, tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_tensor_parallel_compiled(family: str, tmp_path: Path) -> None:
    check(family, tmp_path, 2, positions=True, tensor_parallel_size=2, enforce_eager=False)


@pytest.mark.slow
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_pipeline_parallel_compiled(family: str, tmp_path: Path) -> None:
    """Compiled, because vLLM's CPU worker has no eager pipeline for any model."""
    check(family, tmp_path, 1, pipeline_parallel_size=2, enforce_eager=False)
