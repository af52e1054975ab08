"""Which files are trusted."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from serving import files
from serving.files import Untrusted

OTHER = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")


def content(path: Path, text: str = "mine", mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def another_users_file(path: Path) -> None:
    os.chown(content(path), OTHER, OTHER)


def another_users_link(path: Path) -> None:
    target = content(path.with_name("target"))
    path.symlink_to(target)
    os.lchown(path, OTHER, OTHER)


def another_users_folder_link(path: Path) -> None:
    """A link in the middle of the path."""
    elsewhere = path.parent.with_name("elsewhere")
    elsewhere.mkdir()
    content(elsewhere / path.name)
    path.parent.rmdir()
    path.parent.symlink_to(elsewhere)
    os.lchown(path.parent, OTHER, OTHER)


def a_link_to_another_users_file(path: Path) -> None:
    another_users_file(path.with_name("target"))
    path.symlink_to("target")


@as_root
@pytest.mark.parametrize(
    "plant", [another_users_file, another_users_link, another_users_folder_link, a_link_to_another_users_file]
)
def test_what_another_user_planted(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    """A file or a link that another user made is neither read nor written, whatever it leads to, and the error names it."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    plant(path)
    for use in (files.read, lambda path: os.close(files.opened(path, os.O_RDWR | os.O_CREAT))):
        with pytest.raises(Untrusted, match=rf"{tmp_path}/.*owner is uid {OTHER}.*: chown it"):
            use(path)


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o777])
def test_what_every_user_can_write(tmp_path: Path, mode: int) -> None:
    """A file that every user can write is refused, with its mode; one that a group can write is not."""
    path = content(tmp_path / "file", mode=mode)
    with pytest.raises(Untrusted, match=f"{re.escape(str(path))}: mode {mode:04o} lets every user .* write it: chmod o-w"):
        files.read(path)
    path.chmod(mode & 0o775)
    assert files.read(path) == b"mine"


def test_a_kubernetes_volume(tmp_path: Path) -> None:
    """A Secret's file is a link through `..data`, in a folder that every user can write with the sticky bit; it is read, also
    after the volume is updated, and a file of the group's is read and replaced."""
    tmp_path.chmod(0o1777)
    for version in ("..2026_01", "..2026_02"):
        (tmp_path / version).mkdir()
        content(tmp_path / version / "tls.key", version, 0o440)
    (tmp_path / "..data").symlink_to("..2026_01")
    (tmp_path / "tls.key").symlink_to("..data/tls.key")
    assert files.read(tmp_path / "tls.key") == b"..2026_01"
    (tmp_path / "..data").unlink()
    (tmp_path / "..data").symlink_to("..2026_02")
    assert files.read(tmp_path / "tls.key") == b"..2026_02"

    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o2775)
    state = content(volume / "state", mode=0o660)
    files.replace(state, "new")
    assert files.read(state) == b"new"


def test_a_replaced_file(tmp_path: Path) -> None:
    """A file is replaced whole, by one that only its owner can read, and what lies at the draft's name is not written to."""
    victim, path = content(tmp_path / "victim"), tmp_path / "a" / "state"
    files.replace(path, "one", parents=True)
    path.with_name("state.new").symlink_to(victim)
    files.replace(path, "two")
    assert (path.read_text(), victim.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("two", "mine", 0o600)
    assert [each.name for each in path.parent.iterdir()] == ["state"]
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "b" / "state", "three")


def test_a_loop_of_links(tmp_path: Path) -> None:
    """Links that lead to each other end with an error."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        files.read(tmp_path / "a")


@as_root
def test_a_private_folder(tmp_path: Path) -> None:
    """A folder that others could enter is closed; another user's is refused."""
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o2777)
    assert files.private_folder(folder) == folder
    assert stat.S_IMODE(folder.stat().st_mode) & 0o777 == 0o700
    os.chown(folder, OTHER, OTHER)
    with pytest.raises(Untrusted, match=f"its owner is uid {OTHER}"):
        files.private_folder(folder)
