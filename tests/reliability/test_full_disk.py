"""Real full disks: a small tmpfs where it can be mounted, and a limit on file sizes everywhere.

The space runs out at every stage: before the first shard, within it, in a later one, and at the small files.
"""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from converters.convert import convert
from converters.staging import partial_path
from tests.reliability.kill_points import make_source, run_child, tree
from vllm_sparse.errors import UserError

MIB = 1 << 20


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("full") / "source")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """An empty tmpfs that holds less than the conversion needs, once it is partly filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={120 * MIB}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Take all but ``leave`` bytes of a disk, to which another thread may be writing meanwhile."""
    handle = os.open(folder / "filler", os.O_CREAT | os.O_RDWR)
    try:
        while True:
            found = os.statvfs(folder)
            try:
                os.posix_fallocate(handle, 0, max(1, found.f_bavail * found.f_frsize - leave))
            except OSError as error:
                if error.errno != errno.ENOSPC or found.f_bavail == 0:
                    raise
            else:
                return
    finally:
        os.close(handle)


@pytest.mark.parametrize("leave", [0, MIB, 6 * MIB])
@pytest.mark.parametrize("when", [0.0, 0.3, 0.99])
def test_disk_that_fills_while_converting(source, small_disk, leave, when):
    before = tree(source)
    target = small_disk / "target"
    filled = False

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal filled
        if phase == "writing" and done >= when * total and not filled:
            filled = True
            fill(small_disk, leave)

    if when == 0.99 and leave:
        convert(source, target, progress=progress)
        assert "vllm-sparse-manifest.json" in tree(target)
        return
    with pytest.raises(UserError, match=r"no space left.*Nothing was left behind; free some space"):
        convert(source, target, progress=progress)
    assert filled
    assert not target.exists()
    assert not partial_path(target).exists()
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
    assert tree(source) == before
    (small_disk / "filler").unlink()
    convert(source, target)


def test_disk_that_is_too_small_from_the_start(source, small_disk):
    fill(small_disk, 8 * MIB)
    with pytest.raises(UserError, match=r"it needs \d+\.\d\d MB, \d\.\d\d MB are free"):
        convert(source, small_disk / "target")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("limit", [1000, MIB])
def test_limit_on_file_sizes(source, tmp_path, limit):
    target = tmp_path / "target"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(UserError, match=r"larger than this process.*Nothing was left behind"):
            convert(source, target)

    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    assert run_child(limited) == 0
    assert list(tmp_path.iterdir()) == []
