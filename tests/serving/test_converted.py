"""Formats that no vLLM serves as they are: converted from compressed-tensors 0.13's bytes, then served."""

from pathlib import Path

import pytest
import torch

from converters.convert import convert
from tests.serving import checkpoints as ck
from tests.serving.engine import MANY_PROMPTS, engine, packed_layers, score, serve_and_score
from tests.serving.foreign import CONVERTED, Pair, to_convert, write_pruned
from tests.serving.reference import score_twin
from tests.serving.test_formats import assert_bf16_parity, assert_parity

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
LAYERS = ck.SHAPE["num_hidden_layers"]


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return to_convert("llama-wide", list(CONVERTED), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def moes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return to_convert("qwen3-moe-wide", list(CONVERTED), tmp_path_factory.mktemp("moe"))


@pytest.mark.parametrize("name", CONVERTED)
def test_serves(llamas: dict[str, Pair], tmp_path: Path, name: str) -> None:
    convert(llamas[name].sparse, tmp_path / "s")
    with engine(tmp_path / "s") as llm:
        assert len(packed_layers(llm)) == 4 * LAYERS
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_twin(llamas[name].twin, ck.VOCAB, MANY_PROMPTS, None), name)


@pytest.mark.parametrize("name", CONVERTED)
def test_bf16_is_as_close_to_float32_as_the_dense_twin(
    llamas: dict[str, Pair], tmp_path: Path, name: str
) -> None:
    convert(llamas[name].sparse, tmp_path / "s")
    exact = score_twin(llamas[name].twin, ck.VOCAB, MANY_PROMPTS, None)
    sparse, dense = (
        serve_and_score(folder, ck.VOCAB, "bfloat16", MANY_PROMPTS)
        for folder in (tmp_path / "s", llamas[name].twin)
    )
    assert_bf16_parity(sparse, dense, exact, name)


def assert_experts(folder: Path, twin: Path, what: str) -> None:
    """Every layer of experts is packed, and the model answers as its twin."""
    with engine(folder) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
        assert sum(hasattr(module, "sparse_experts") for module in model.modules()) == LAYERS
        ours = score(llm, ck.VOCAB, MANY_PROMPTS)
    assert_parity(ours, score_twin(twin, ck.VOCAB, MANY_PROMPTS, None), what)


@pytest.mark.parametrize("name", CONVERTED)
def test_moe(moes: dict[str, Pair], tmp_path: Path, name: str) -> None:
    convert(moes[name].sparse, tmp_path / "s")
    assert_experts(tmp_path / "s", moes[name].twin, f"{name}, experts")


def test_int4_experts(tmp_path: Path) -> None:
    """Scales per group of 32 columns, chosen here."""
    source, folder, twin = (
        write_pruned("qwen3-moe", tmp_path / "d", torch.float32),
        tmp_path / "s",
        tmp_path / "t",
    )
    convert(source, folder, weights="int4")
    convert(folder, twin, to="dense")
    assert_experts(folder, twin, "int4 experts")
