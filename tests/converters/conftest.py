"""Fixtures of the converter tests; the makers themselves are in checkpoint_maker.py."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread only waits, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint under the test's own folder."""
    from checkpoint_maker import llama_tensors, write_checkpoint

    def make(name: str = "src", tensors: Mapping | None = None, config: Mapping | None = None, **kw) -> Path:
        return write_checkpoint(
            tmp_path / name, llama_tensors() if tensors is None else tensors, config, **kw
        )

    return make


def _library(tmp_path_factory, folder: str, requirement: str) -> Path:
    """A folder with a release that must not be installed beside vLLM; `make setup` makes it."""
    made = Path(sys.prefix) / folder
    if made.is_dir():
        return made
    target = tmp_path_factory.mktemp(folder)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    done = subprocess.run([*pip, requirement], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{requirement} is not installed and cannot be fetched: {done.stderr[-200:]}")
    return target


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """The folder that holds compressed-tensors 0.13, the last that reads and writes 2:4."""
    return _library(tmp_path_factory, "compressed-tensors-0.13", "compressed-tensors==0.13.0")


@pytest.fixture(scope="session")
def torchao_library(tmp_path_factory) -> Path:
    """The folder that holds torchao 0.14, the last that packs for the 2:4 Marlin kernel."""
    return _library(tmp_path_factory, "torchao-0.14", "torchao==0.14.1")
