import hashlib
import http.server
import io
import os
import shutil
import socket
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers import model_folder
from flsep.pipeline.teachers.loading import load_teacher
from flsep.pipeline.teachers.model_folder import (
    VGGISH_HANDLE,
    canonical_handle,
    content_digest,
    fetch,
    published_folder,
    resolve,
)

WAYS_OUT = r"teacher fetch .* FOLDER`.*teacher export musicnn\|vggish OUT` and give --teacher OUT$"


class Hub(http.server.ThreadingHTTPServer):
    """A server that speaks TensorFlow Hub's protocol, or breaks it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.status, self.body, self.num_announced, self.stalls = 200, b"", None, False
        self.requests = []
        self.done = threading.Event()

    @property
    def handle(self):
        return f"http://127.0.0.1:{self.server_port}/google/tiny/1"


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        hub = self.server
        hub.requests.append(self.path)
        self.send_response(hub.status)
        self.send_header("Content-Length", str(hub.num_announced or len(hub.body)))
        self.end_headers()
        self.wfile.write(hub.body)
        if hub.stalls:
            self.wfile.flush()
            hub.done.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tfhub_cache):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.done.set()
        server.shutdown()
        thread.join()


def pack(folder: Path, mode: str = "w:gz", skip: str = "") -> bytes:
    """An archive as TensorFlow Hub serves it; the variables, the bulk, come last."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name in ["variables", *model_folder.own_files(folder)]:
            if name != skip:
                tar.add(folder / name, f"./{name}", recursive=False)
    return buffer.getvalue()


def only_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- folders --------------------------------------------------------------------------------------


def test_digest_covers_names_and_bytes_of_own_files_in_order(tmp_path):
    files = {"assets/deep/words.txt": b"words", "saved_model.pb": b"graph"}
    files |= {"variables/variables.data-00000-of-00001": b"123", "variables/variables.index": b""}
    for name, content in reversed(files.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    joined = b"".join(b"%s\0%d\0%s" % (n.encode(), len(c), c) for n, c in files.items())
    expected = hashlib.sha256(joined).hexdigest()
    assert content_digest(tmp_path) == expected

    for name in ("fingerprint.pb", "LICENSE.md", "assets/.words.swp", "assets/words.txt~"):
        (tmp_path / name).write_bytes(b"not the model's own")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "saved_model.pb").write_bytes(b"neither")
    assert content_digest(tmp_path) == expected

    (tmp_path / "variables/variables.index").write_bytes(b"4")
    assert content_digest(tmp_path) != expected


def test_digest_needs_a_saved_model(tmp_path):
    with pytest.raises(TeacherError, match=r"no SavedModel, no saved_model\.pb in it"):
        content_digest(tmp_path)


def test_alias_and_folder():
    assert canonical_handle("vggish") == VGGISH_HANDLE
    assert canonical_handle(Path("teachers/vggish")) == "teachers/vggish"


def test_folder_resolves_to_itself(tiny_teacher):
    assert resolve(str(tiny_teacher)) == tiny_teacher


@pytest.mark.parametrize(
    ("handle", "match"),
    [
        ("vgish", r"neither such a folder nor an alias \(vggish\)"),
        ("ftp://server/model", "expected an http"),
        ("gs://bucket/model", "must name an archive"),
    ],
)
def test_handle_that_means_nothing(handle, match):
    with pytest.raises(TeacherError, match=f"^teacher {handle}: .*{match}") as error:
        resolve(handle)
    only_line(error)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(TeacherError, match=r"no SavedModel, it has no saved_model\.pb") as error:
        resolve(tmp_path)
    only_line(error)


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_address_is_downloaded_once(hub, tfhub_cache, tiny_teacher, mode):
    hub.body = pack(tiny_teacher, mode)
    folder = resolve(hub.handle)
    assert folder.parent == tfhub_cache
    assert content_digest(folder) == content_digest(tiny_teacher)
    assert hub.requests == ["/google/tiny/1?tf-hub-format=compressed"]

    hub.status = 500
    assert resolve(hub.handle) == folder
    assert len(hub.requests) == 1


def test_downloaded_teacher_embeds_as_the_folder_does(hub, tiny_teacher):
    hub.body = pack(tiny_teacher)
    downloaded, local = load_teacher(hub.handle), load_teacher(tiny_teacher)
    assert downloaded.info.handle == hub.handle
    assert downloaded.info.digest == local.info.digest
    waveform = np.random.default_rng(1).standard_normal(8000, dtype=np.float32)
    np.testing.assert_array_equal(downloaded(waveform), local(waveform))


def break_off(hub, archive):
    hub.body, hub.num_announced = archive[:-100], len(archive)


def serve_half(hub, archive):
    hub.body = archive[: len(archive) // 2]


def serve_all_but_the_end(hub, archive):
    hub.body = archive[:-2000]


def serve_page(hub, archive):
    hub.body = b"<html>log in</html>"


def serve_nothing(hub, archive):
    hub.body = b""


def serve_404(hub, archive):
    hub.status = 404


def serve_500(hub, archive):
    hub.status = 500


@pytest.mark.parametrize(
    ("harm", "match"),
    [
        (break_off, r"broke off after \d+ of \d+ bytes"),
        (serve_half, r"no complete tar archive"),
        (serve_all_but_the_end, r"no complete tar archive"),
        (serve_page, r"19 bytes served are no complete tar archive"),
        (serve_nothing, r"0 bytes served are no complete tar archive"),
        (serve_404, r"HTTP 404 Not Found"),
        (serve_500, r"HTTP 500 Internal Server Error"),
    ],
)
def test_broken_download_leaves_nothing_and_can_be_repeated(
    hub, tfhub_cache, tiny_teacher, harm, match
):
    hub.body = archive = pack(tiny_teacher)
    harm(hub, archive)
    with pytest.raises(TeacherError, match=f"{match}.*{WAYS_OUT}") as error:
        resolve(hub.handle)
    assert hub.handle in only_line(error)
    assert not list(tfhub_cache.iterdir())

    hub.status, hub.body, hub.num_announced = 200, archive, None
    assert content_digest(resolve(hub.handle)) == content_digest(tiny_teacher)


def test_plain_archive_cut_in_its_last_file(hub, tiny_teacher):
    hub.body = pack(tiny_teacher, "w")[:-11000]  # the library takes this as good
    with pytest.raises(TeacherError, match="no complete tar archive"):
        resolve(hub.handle)


def test_archive_without_a_model(hub, tfhub_cache, tiny_teacher):
    hub.body = pack(tiny_teacher, skip="saved_model.pb")
    with pytest.raises(TeacherError, match=r"the archive served has no saved_model\.pb"):
        resolve(hub.handle)
    assert not list(tfhub_cache.iterdir())


def test_server_that_stalls(hub, tfhub_cache, tiny_teacher, monkeypatch):
    monkeypatch.setattr(model_folder, "_STALL_SECONDS", 0.2)
    hub.body = pack(tiny_teacher)
    hub.num_announced, hub.stalls = len(hub.body) + 1, True
    with pytest.raises(TeacherError, match=f"timed out.*{WAYS_OUT}") as error:
        resolve(hub.handle)
    only_line(error)
    assert not list(tfhub_cache.iterdir())


def test_no_server(tfhub_cache):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        handle = f"http://127.0.0.1:{unused.getsockname()[1]}/google/vggish/1"
        with pytest.raises(TeacherError, match=f"{handle}: .*refused.*{WAYS_OUT}") as error:
            resolve(handle)
    only_line(error)
    assert not list(tfhub_cache.iterdir())


def test_lock_of_a_killed_download_is_taken_over(hub, tfhub_cache, tiny_teacher, monkeypatch):
    hub.body = pack(tiny_teacher)
    tfhub_cache.mkdir()
    name = hashlib.sha1(hub.handle.encode()).hexdigest()
    (tfhub_cache / f"{name}.lock").write_text("elsewhere.1.deadbeef")
    monkeypatch.setattr(model_folder, "_STALE_LOCK_SECONDS", 0)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert content_digest(resolve(hub.handle)) == content_digest(tiny_teacher)


def test_emptied_cache_folder_is_named(hub, tiny_teacher):
    hub.body = pack(tiny_teacher)
    folder = resolve(hub.handle)
    (folder / "saved_model.pb").unlink()
    with pytest.raises(TeacherError, match=f"{folder} has no saved_model.pb; delete that folder"):
        resolve(hub.handle)


# --- copies ---------------------------------------------------------------------------------------


def test_fetch_copies_the_model_alone(tiny_teacher, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(tiny_teacher, source)
    (source / "notes.txt").write_text("mine")
    out = tmp_path / "deep" / "copy"
    assert fetch(source, out) == out
    assert content_digest(out) == content_digest(source)
    assert not (out / "notes.txt").exists()
    assert fetch(source, out) == out  # the same once more
    assert [path.name for path in out.parent.iterdir()] == ["copy"]


def test_fetch_does_not_replace_another_model(tiny_teacher, build_tiny_teacher, tmp_path):
    other = build_tiny_teacher(tmp_path / "other", dim=4)
    before = content_digest(other)
    with pytest.raises(TeacherError, match=f"^{other}: the folder holds another SavedModel"):
        fetch(tiny_teacher, other)
    assert content_digest(other) == before
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("out", "match"),
    [
        ("full", "not empty and no SavedModel"),
        ("full/file", "found a file"),
        ("full/file/copy", "cannot be written"),
    ],
)
def test_fetch_into_an_impossible_place(tiny_teacher, tmp_path, out, match):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(TeacherError, match=match) as error:
        fetch(tiny_teacher, tmp_path / out)
    only_line(error)
    assert (tmp_path / "full" / "file").read_text() == "mine"


def write_half(out: Path, failure: BaseException) -> None:
    with published_folder(out) as staging:
        (staging / "saved_model.pb").write_bytes(b"half")
        raise failure


@pytest.mark.parametrize(
    ("failure", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left"), TeacherError)],
)
def test_nothing_is_published_by_halves(tmp_path, failure, raised):
    with pytest.raises(raised):
        write_half(tmp_path / "out", failure)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with published_folder(tmp_path / "out") as staging:
        (staging / "saved_model.pb").write_bytes(b"graph")
    assert (tmp_path / "out" / "saved_model.pb").read_bytes() == b"graph"


# --- TensorFlow's messages ------------------------------------------------------------------------


def test_start_up_noise_alone_is_dropped(capfd):
    with model_folder._start_up_noise_dropped():
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are\n")
        os.write(2, b"I0000 00:00:1795409882.392655 7730 cudart_stub.cc:31] no cuda drivers\n")
        os.write(2, b"E0000 00:00:1795409882.392655 7730 cuda.cc:1] a broken driver\n")
        os.write(2, b"of another thread\n")
    os.write(2, b"later\n")
    _, stderr = capfd.readouterr()
    assert [line.split("] ")[-1] for line in stderr.splitlines()] == [
        "a broken driver",
        "of another thread",
        "later",
    ]
