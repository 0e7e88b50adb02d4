"""Fixtures of the converter tests; the makers themselves are in checkpoint_maker.py."""

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
