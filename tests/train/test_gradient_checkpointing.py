"""Gradient checkpointing runs layers twice and must change nothing; masks, gates and noise included."""

import json
from pathlib import Path

import pytest
from transformers.models.llama.modeling_llama import LlamaMLP

from converters.train.compress import compress_model
from converters.train.loop import LOG

OPTIONS = {
    "ast": {},
    "cast": {},
    "gradual": {},
    "maskllm": {"samples": 4},
    "ddp": {"channel_multiple": 8},
    "hard-concrete": {"channel_multiple": 8},
}


def losses(method: str, model: Path, text: Path, out: Path, checkpointing: bool) -> list[float]:
    compress_model(
        method, model, out, str(text), quiet=True, eval_tokens=0, data_options={"sequence_length": 32},
        optimiser={"steps": 4, "batch_size": 4, "warmup": 1},
        run={"device": "cpu", "precision": "fp32", "gradient_checkpointing": checkpointing},
        **OPTIONS[method],
    )  # fmt: skip
    return [json.loads(line)["loss"] for line in (out / LOG).read_text().splitlines()]


@pytest.mark.parametrize("method", ["ast", "ddp", *(pytest.param(m, marks=pytest.mark.slow) for m in
                                    ("cast", "gradual", "maskllm", "hard-concrete"))])  # fmt: skip
def test_checkpointing_changes_no_loss(
    method: str, trained_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *a: calls.append(1) or original(*a))
    plain = losses(method, trained_dir, text_file, tmp_path / "plain", False)
    once = len(calls)
    again = losses(method, trained_dir, text_file, tmp_path / "again", True)
    assert again == pytest.approx(plain, rel=1e-6)
    # Two layers in four steps ran once more each.
    assert len(calls) - once == once + 2 * 4
