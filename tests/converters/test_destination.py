"""Mount points are seen as the kernel tells them, and refused before any work."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from converters import destination
from converters.convert import convert
from converters.destination import check_not_mounted, mount_points
from converters.train.output import check_free
from vllm_sparse.errors import UserError


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a bind mount of another one on the same file system."""
    folder = tmp_path / "a b"
    folder.mkdir()
    (tmp_path / "other").mkdir()
    mount = ["mount", "--bind", str(tmp_path / "other"), str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("bind mounts cannot be made here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_bind_mount_is_no_destination(bound: Path, make_checkpoint):
    assert not bound.is_mount()  # the same file system, which is all that `is_mount` looks at
    assert bound in mount_points()
    source = make_checkpoint()
    with pytest.raises(UserError, match="is a mount point"):
        convert(source, bound, dry_run=True)
    with pytest.raises(UserError, match="is a mount point"):
        check_free(bound)
    convert(source, bound / "model")


def test_a_model_with_a_mount_inside_is_not_replaced(bound: Path, tmp_path: Path):
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="a b is a mount point inside"):
        check_free(tmp_path, overwrite=True)


def test_names_are_unescaped_and_links_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mountinfo").write_text(
        "22 1 0:21 / /proc rw - proc proc rw\n"
        rf"30 22 8:1 /x {tmp_path}/a\040b\134c rw,relatime shared:1 - ext4 /dev/sda1 rw" + "\n"
    )
    monkeypatch.setattr(destination, "_MOUNTS", tmp_path / "mountinfo")
    assert mount_points() == [Path("/proc"), tmp_path / "a b\\c"]
    (tmp_path / "a b\\c").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a b\\c")
    with pytest.raises(UserError, match="is a mount point, which no finished folder"):
        check_not_mounted(tmp_path / "link")
    check_not_mounted(tmp_path / "a b\\c" / "model")


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(destination, "_MOUNTS", tmp_path / "absent")
    assert mount_points() == []
    check_not_mounted(tmp_path / "m")


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_place_where_nothing_can_be_made(tmp_path: Path, make_checkpoint, monkeypatch, dry_run):
    """Also in a dry run; the system's own answer would come after the work."""
    source = make_checkpoint()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make .*: .*file is no folder; choose another destination"):
        convert(source, tmp_path / "file" / "x", dry_run=dry_run)
    (tmp_path / "ro").mkdir()
    monkeypatch.setattr(destination.os, "access", lambda path, mode: path != tmp_path / "ro")
    with pytest.raises(UserError, match=r"cannot make .*: .*ro may not be written to; choose another dest"):
        convert(source, tmp_path / "ro" / "sub" / "x", dry_run=dry_run)


def test_the_source_is_never_called_a_folder_to_remove(tmp_path: Path, make_checkpoint):
    source = make_checkpoint()
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(UserError, match="is the source or lies in it; the source is never changed"):
            convert(source, target)
