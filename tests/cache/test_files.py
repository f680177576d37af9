import errno
import os
import stat
from pathlib import Path

import pytest

from flsep.cache.files import (
    remove_leftovers,
    replacing,
    sync_folder,
    write_bytes,
    write_json,
    write_text,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with old content in a folder of its own."""
    path = tmp_path / "file"
    path.write_text("old")
    return path


def assert_old_content(path: Path) -> None:
    __tracebackhide__ = True
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_the_temporary_file_is_hidden_and_beside_the_final_one(path: Path) -> None:
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(f".{path.name}.")
        assert temporary.suffix == ".part"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_do_not_meet(path: Path) -> None:
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the last one to finish
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_in_the_middle_leaves_the_old_file(
    path: Path, kind: type[BaseException]
) -> None:
    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise kind("middle")

    with pytest.raises(kind, match=r"^middle$"):
        write_half()
    assert_old_content(path)


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_text(path, "new")
    monkeypatch.undo()
    assert caught.value.filename == str(path)
    assert_old_content(path)


def test_a_failed_rename_names_the_final_file_alone(path: Path) -> None:
    folder = path.with_name("folder")
    (folder / "content").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as caught:
        write_text(folder, "new")
    assert str(caught.value) == f"[Errno 21] Is a directory: '{folder}'"
    assert sorted(path.parent.iterdir()) == [path, folder]


def test_a_missing_folder_names_the_final_file(tmp_path: Path) -> None:
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        write_text(path, "new")
    assert caught.value.filename == str(path)


def test_errors_about_other_files_keep_their_names(path: Path) -> None:
    other = path.with_name("other")
    with pytest.raises(FileNotFoundError) as caught, replacing(path):
        other.read_bytes()
    assert caught.value.filename == str(other)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o007, 0o660)])
def test_the_umask_decides_the_mode(path: Path, umask: int, expected: int) -> None:
    old = os.umask(umask)
    try:
        with replacing(path) as temporary:
            temporary.chmod(0o600)  # as the library safetensors does
        assert stat.S_IMODE(path.stat().st_mode) == expected
    finally:
        os.umask(old)


def test_file_and_folder_are_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        content = path.read_text()
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), content))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with replacing(path) as temporary:
        temporary.write_text("new")
    # The file before it gets its name, the folder after.
    assert synced == [(temporary, "old"), (path.parent, "new")]
    sync_folder(path.parent)
    assert synced[2:] == [(path.parent, "new")]


def test_bytes_text_and_json(path: Path) -> None:
    write_bytes(path, memoryview(b"\x00\xff"))
    assert path.read_bytes() == b"\x00\xff"
    write_text(path, "ü\r\n")
    assert path.read_bytes() == b"\xc3\xbc\r\n"
    write_json(path, {"ü": [1, None]})
    assert path.read_text(encoding="utf-8") == '{\n "ü": [\n  1,\n  null\n ]\n}\n'


@pytest.mark.parametrize(("value", "error"), [(object(), TypeError), (float("nan"), ValueError)])
def test_what_is_no_json_leaves_the_old_file(
    path: Path, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        write_json(path, {"x": value})
    assert_old_content(path)


def test_leftovers_of_killed_writers_are_removed(path: Path) -> None:
    with replacing(path) as temporary:
        leftover = temporary.with_name(temporary.name.replace(".file.", ".other."))
        leftover.touch()
    for name in (".lock", "shown.part"):
        path.with_name(name).touch()
    remove_leftovers(path.parent)
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "file", "shown.part"]
