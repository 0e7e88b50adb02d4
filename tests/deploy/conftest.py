"""Tools of `make deploy-tools`, and one small model served by a real vLLM."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def find_tool(name: str) -> str:
    """The tool's path; without it the test is skipped with the remedy, in CI it fails."""
    beside = Path(sys.prefix) / "deploy-tools" / "bin" / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        message = f"{name} is not installed: run `make deploy-tools`"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="session")
def tool() -> Callable[[str], str]:
    return find_tool


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random 2:4 model and its dense twin, with a tokenizer, by variant."""
    import torch

    from converters.train.models import ModelShape, build_model
    from converters.train.tokenizer import train_tokenizer
    from tests.serving import checkpoints
    from vllm_sparse.sparse24 import topk_mask

    text = [path.read_text() for path in sorted((ROOT / "bench").glob("*.py"))]
    tokenizer = train_tokenizer(text, 320, 512)
    # Wide enough for kernels to take a half of it, as each of two ranks does, without padding.
    shape = ModelShape(hidden_size=128, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2)
    model = build_model(shape, 320, tokenizer.eos_token_id, seed=0)
    with torch.no_grad():
        for name in checkpoints.linear_names(model):
            weight = model.get_submodule(name).weight
            weight.mul_(topk_mask(weight.abs()))
    model = model.bfloat16()
    folder = tmp_path_factory.mktemp("models")
    made = {
        "compressed": checkpoints.write_bitmask(model, folder / "compressed"),
        "dense": checkpoints.write_dense(model, folder / "dense"),
    }
    for directory in made.values():
        tokenizer.save_pretrained(directory)
    return made
