"""Weights put into a running engine, models that are gone with their engine, and weights that are drawn."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO

from tests.serving import checkpoints as ck
from tests.serving.engine import engine, score, serve_and_score
from tests.serving.test_dense_parts import DENSE, mixed_model
from tests.serving.test_experts import write_experts
from tests.serving.test_sparse24_format import add_outliers
from vllm_sparse.errors import UnsupportedError

pytestmark = pytest.mark.e2e


def write(kind: str, seed: int, folder: Path) -> Path:
    if kind == "experts":
        write_experts(folder)
        tensors = load_file(folder / "model.safetensors")
        changed = {name: (1 - seed / 2) * x for name, x in tensors.items() if name.endswith(".compressed")}
        save_file({**tensors, **changed}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    model = ck.pruned_model("llama", False, seed)
    if kind == "bitmask":
        return ck.write_bitmask(model, folder)
    ck.write_quantized(model, folder, "int", activations=False)
    tensors = load_file(folder / "model.safetensors")
    scales = {f"{name}.input_scale": torch.tensor([0.1 + seed / 20]) for name in ck.linear_names(model)}
    save_file({**tensors, **scales}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    fixed = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = fixed
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def reload(llm: Any, folder: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


@pytest.mark.parametrize("kind", ["bitmask", "int8-static", "experts"])
def test_reloaded_weights_answer_as_if_they_had_been_there_at_first(tmp_path: Path, kind: str) -> None:
    """With the scales of fixed activations, which the checkpoints do not share."""
    first, second = (write(kind, seed, tmp_path / str(seed)) for seed in (0, 1))
    expected = serve_and_score(second, ck.VOCAB)
    with engine(first) as llm:
        assert not score(llm, ck.VOCAB).logprobs.equal(expected.logprobs)
        reload(llm, second)
        assert score(llm, ck.VOCAB).logprobs.equal(expected.logprobs)


def others_bytes(model: torch.nn.Module) -> int:
    """Of tensors that are no parameters of the model; vLLM hides those from before its freeze."""
    gc.collect()
    known = {p.data_ptr() for p in model.parameters()}
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.data_ptr() not in known}.values())


@pytest.mark.parametrize("kind", ["bitmask", "experts"])
def test_a_reload_keeps_no_second_copy(tmp_path: Path, kind: str) -> None:
    folder = write(kind, 0, tmp_path / "s")
    with engine(folder) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        weights = sum(p.nbytes for name, p in model.named_parameters() if name.endswith("_packed"))
        assert weights > 0
        before = others_bytes(model)
        reload(llm, folder)
        assert others_bytes(model) - before < weights / 10


def test_dense_parts_are_not_reloaded(tmp_path: Path) -> None:
    folder = ck.write_bitmask(mixed_model(*DENSE), tmp_path / "s", skip=("lm_head", *DENSE))
    with engine(folder) as llm, pytest.raises(UnsupportedError, match=r"cannot be reloaded into a running"):
        reload(llm, folder)


def test_a_model_is_gone_with_its_engine_and_what_was_loaded_with_the_packing(tmp_path: Path) -> None:
    """What vLLM keeps of each parameter for a reload must hold neither layers nor loaded tensors."""
    model = ck.pruned_model("llama", False).float()
    folder = ck.write_bitmask(model, tmp_path / "s")
    add_outliers(model, folder)
    gc.collect()
    before = sum(isinstance(item, LinearBase) for item in gc.get_objects())
    with engine(folder):
        noted = [t for info in LAYERWISE_INFO.values() for t in info.restore_metadata[0].values()]
        kept = [t.pieces for t in noted if hasattr(t, "pieces")]
        assert kept
        assert not any(kept)
        del noted, kept
    gc.collect()
    assert sum(isinstance(item, LinearBase) for item in gc.get_objects()) == before


@pytest.mark.parametrize("kind", ["bitmask", "int8-static", "experts"])
def test_weights_may_be_drawn_instead_of_read(tmp_path: Path, kind: str) -> None:
    """``--load-format dummy``, which measures speed without weights."""
    folder = write(kind, 0, tmp_path / "s")
    (folder / "model.safetensors").unlink()
    with engine(folder, load_format="dummy") as llm:
        assert score(llm, ck.VOCAB).logprobs.isfinite().all()
