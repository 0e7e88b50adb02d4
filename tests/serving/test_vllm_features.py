"""What people turn on in vLLM beside a 2:4 model, where the plugin has a part in it (docs/serving.md)."""

from pathlib import Path
from typing import Any

import pytest

from tests.serving import checkpoints as ck
from tests.serving.engine import engine
from tests.serving.test_lora import generate
from vllm_sparse.errors import UnsupportedError

pytestmark = pytest.mark.e2e


def accepted(llm: Any) -> float:
    """Of the drafted tokens, the share that the target took."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return counts["vllm:spec_decode_num_accepted_tokens"] / counts["vllm:spec_decode_num_draft_tokens"]


def test_a_sparse_model_drafts_for_another(tmp_path: Path) -> None:
    """vLLM puts a prefix before the draft's names, under which no ignore list knows them."""
    model = ck.pruned_model("llama", False)
    skip = ("lm_head", "model.layers.1.mlp.down_proj")
    target = ck.write_bitmask(model, tmp_path / "target")
    draft = ck.write_bitmask(model, tmp_path / "draft", skip=skip)
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    with engine(target) as llm:
        alone, _ = generate(llm)
    with engine(target, speculative_config=speculative, disable_log_stats=False) as llm:
        drafted, _ = generate(llm)
        assert accepted(llm) > 0.9
    assert drafted == alone


def test_sharded_state_is_refused(tmp_path: Path) -> None:
    folder = ck.write_bitmask(ck.pruned_model("llama", False), tmp_path / "s")
    with (
        pytest.raises(UnsupportedError, match="sharded_state stores weights as the kernels have them"),
        engine(folder, load_format="sharded_state"),
    ):
        pass
