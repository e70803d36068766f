"""Files appear whole or not at all, durably."""

import os
from pathlib import Path

import pytest

from stu import files


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is sent to the disk and renamed, in order, by name."""
    done: list[str] = []
    opened: dict[int, str] = {}
    plain_open, plain_sync, plain_replace = os.open, os.fsync, Path.replace

    def opening(path: Path, *arguments: int) -> int:
        descriptor = plain_open(path, *arguments)
        opened[descriptor] = Path(path).name
        return descriptor

    def syncing(descriptor: int) -> None:
        done.append(f"sync {opened[descriptor]}")
        plain_sync(descriptor)

    def replacing(path: Path, target: Path) -> Path:
        done.append(f"{path.name} -> {target.name}")
        return plain_replace(path, target)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "replace", replacing)
    return done


def test_contents_reach_the_disk_before_the_name_and_then_the_folder(tmp_path: Path, calls: list[str]):
    folder = tmp_path / "folder"
    folder.mkdir()
    files.write_atomically(folder / "file", "text")
    assert calls == ["sync .file.tmp", ".file.tmp -> file", "sync folder"]
    assert os.listdir(folder) == ["file"]


def test_every_file_of_a_folder_reaches_the_disk_before_its_name(tmp_path: Path, calls: list[str]):
    partial = tmp_path / "partial"
    (partial / "inner").mkdir(parents=True)
    (partial / "inner" / "file").write_text("text")
    files.put_in_place(partial, tmp_path / "whole")
    assert calls[-2:] == ["partial -> whole", f"sync {tmp_path.name}"]
    assert set(calls[:-2]) == {"sync inner", "sync file", "sync partial"}
    assert (tmp_path / "whole" / "inner" / "file").read_text() == "text"


@pytest.mark.parametrize("old", ["old", None])
def test_what_fails_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None):
    path = tmp_path / "file"
    if old:
        files.write_atomically(path, old)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, b"new")
    assert [file.read_text() for file in tmp_path.iterdir()] == ([old] if old else [])


def test_a_folder_is_deleted_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, remains = tmp_path / "folder", tmp_path / ".folder.deleted"
    for path in (folder, remains):
        path.mkdir()
        (path / "file").write_text("text")
    with monkeypatch.context() as killed:
        killed.setattr(files.shutil, "rmtree", lambda path, **options: None if not folder.exists() else _remove(path))
        files.remove_folder(folder)
    assert not folder.exists()
    assert remains.exists()  # as a kill leaves it
    folder.mkdir()
    files.remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def _remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def test_a_folder_is_replaced_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    with monkeypatch.context() as patch:
        patch.setattr(files, "put_in_place", lambda partial, path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "old").exists()
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["old", "old/new"]


@pytest.mark.parametrize("name", ["x" * 300, "~nobody_of_this_name/x", "a\0b", "nothing"])
def test_what_is_no_name_is_not_there(name: str):
    assert files.there(name) is None


def test_an_empty_file_counts_as_absent(tmp_path: Path):
    file = tmp_path / "file"
    assert not files.is_written(file)
    file.touch()
    assert not files.is_written(file)
    assert not files.is_written(file / "below a file")
    file.write_text("x")
    assert files.is_written(file)
