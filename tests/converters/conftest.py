"""Fixtures of the converter tests; the makers themselves are in checkpoint_maker.py."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint under the test's own folder."""
    from checkpoint_maker import llama_tensors, write_checkpoint

    def make(name: str = "src", tensors: Mapping | None = None, config: Mapping | None = None, **kw) -> Path:
        return write_checkpoint(
            tmp_path / name, llama_tensors() if tensors is None else tensors, config, **kw
        )

    return make
