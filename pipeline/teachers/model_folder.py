"""Folders that hold a SavedModel: find, download, compare and publish them."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from flsep.pipeline.errors import TeacherError

VGGISH_HANDLE = "https://tfhub.dev/google/vggish/1"

_ALIASES = {"vggish": VGGISH_HANDLE}
_MODEL_FILE = "saved_model.pb"
# Files of a SavedModel, without fingerprint.pb, which differs between two equal exports.
_OWN_FILE = re.compile(
    r"saved_model\.pb|variables/variables\.(index|data-\d+-of-\d+)|assets/(?!\.)([^/]+/)*[^/]*[^/~]"
)
_STALL_SECONDS = 30.0  # without a byte from the server
_STALE_LOCK_SECONDS = 60  # without progress of another process that downloads the same model
# TensorFlow's libraries print these lines before any setting can silence them.
_START_UP_NOISE = re.compile(rb"WARNING: All log messages before absl::|[IW]0000 ")


def import_tensorflow() -> Any:
    """Import TensorFlow and TensorFlow Hub without messages on stderr; return ``tensorflow``.

    Setting ``TF_CPP_MIN_LOG_LEVEL`` turns the messages on again. oneDNN is on, unless
    ``TF_ENABLE_ONEDNN_OPTS`` is set: its results do not depend on the number of threads.
    """
    # Once TensorFlow is loaded, the variables below have no effect.
    if "tensorflow_hub" in sys.modules:
        return sys.modules["tensorflow"]
    # Worker processes inherit the level that was set here.
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3") == "3"
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    with _start_up_noise_dropped() if quiet else contextlib.nullcontext():
        import tensorflow as tf

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from pkg_resources, which TensorFlow Hub imports
            import tensorflow_hub  # noqa: F401
    return tf


def resolve(handle: str | os.PathLike[str]) -> Path:
    """Find the local folder of a teacher's SavedModel; download it if need be.

    `handle` is ``"vggish"``, an http(s) address as TensorFlow Hub serves them, the gs address of an
    archive, or a folder. Downloads are kept in TensorFlow Hub's cache (``TFHUB_CACHE_DIR``).
    TeacherError means that a folder holds no SavedModel, or that an address cannot be downloaded
    completely.
    """
    name = canonical_handle(handle)
    if "://" not in name:
        folder = Path(name)
        if not folder.is_dir():
            raise TeacherError(
                f"teacher {name}: found neither such a folder nor an alias "
                f"({', '.join(_ALIASES)}); expected one of these or an http(s) or gs address"
            )
        if not (folder / _MODEL_FILE).is_file():
            raise TeacherError(
                f"teacher {name}: the folder is no SavedModel, it has no {_MODEL_FILE}; "
                "`flsep-precompute teacher export` or `teacher fetch` makes one"
            )
        return folder
    if not name.startswith(("http://", "https://", "gs://")):
        raise TeacherError(f"teacher {name}: expected an http(s) or gs address, or a folder")
    tf = import_tensorflow()
    try:
        folder = Path(_download(name))
    except TeacherError as error:
        raise _unreachable(name, str(error)) from error
    except urllib.error.HTTPError as error:
        # An HTTPError is an open response too.
        error.close()
        raise _unreachable(name, f"HTTP {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _unreachable(
            name, one_line(getattr(error.reason, "strerror", None) or error.reason)
        ) from error
    except (OSError, http.client.HTTPException, ValueError, tf.errors.OpError) as error:
        raise _unreachable(name, one_line(error)) from error
    if not (folder / _MODEL_FILE).is_file():
        raise TeacherError(
            f"teacher {name}: its copy {folder} has no {_MODEL_FILE}; delete that folder and retry"
        )
    return folder


def canonical_handle(handle: str | os.PathLike[str]) -> str:
    """Return a handle as text; an alias becomes its address."""
    name = os.fspath(handle)
    return _ALIASES.get(name, name)


def own_files(folder: Path) -> list[str]:
    """List the files of a SavedModel, sorted, relative to its folder.

    These are ``saved_model.pb`` and the files in ``variables`` and ``assets``, without caches,
    fingerprints and backup files of editors.
    """
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if _OWN_FILE.fullmatch(name))


def content_digest(folder: Path) -> str:
    """Return the SHA-256 of names, lengths and bytes of a SavedModel's `own_files`, in hex."""
    names = own_files(folder)
    if _MODEL_FILE not in names:
        raise TeacherError(f"teacher {folder}: the folder is no SavedModel, no {_MODEL_FILE} in it")
    digest = hashlib.sha256()
    for name in names:
        path = folder / name
        # Lengths mark where a file ends: bytes that move from one file to the next change the
        # digest.
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def have_same_content(folder: Path, other: Path) -> bool:
    """Tell whether two SavedModels are equal byte for byte."""
    return content_digest(folder) == content_digest(other)


@contextlib.contextmanager
def published_folder(
    out: Path, is_same: Callable[[Path, Path], bool] = have_same_content
) -> Iterator[Path]:
    """Fill a folder beside `out` that is renamed to `out` once it is complete.

    `out` may be missing, empty, or a folder with the same SavedModel, which then stays unchanged;
    `is_same` compares the new folder with it. The block receives the new folder, which is removed
    if the block raises. TeacherError means that `out` holds something else or cannot be written.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise TeacherError(f"{out}: found a file, expected a folder or nothing; name another")
    occupied = out.is_dir() and any(out.iterdir())
    if occupied and not (out / _MODEL_FILE).is_file():
        raise TeacherError(f"{out}: the folder is not empty and no SavedModel; name another")
    # A sibling lies on the same file system, so that it can be renamed. Two processes that publish
    # to the same place do not share it.
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise TeacherError(f"{out}: cannot be written ({error.strerror})") from error
    try:
        yield staging
        if not occupied:
            # If `out` is an empty folder, the new one replaces it.
            staging.rename(out)
        elif not is_same(staging, out):
            raise TeacherError(f"{out}: the folder holds another SavedModel; name another")
    except OSError as error:
        raise TeacherError(f"{out}: cannot be written ({one_line(error)})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def fetch(handle: str | os.PathLike[str], out: Path) -> Path:
    """Copy a teacher's SavedModel to the folder `out`, for a machine without internet."""
    source = resolve(handle)
    with published_folder(out) as staging:
        for name in own_files(source):
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, staging / name)
    return out


def one_line(error: object) -> str:
    """Format an error as one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _unreachable(handle: str, reason: str) -> TeacherError:
    return TeacherError(
        f"teacher {handle}: cannot be downloaded ({reason}); on a machine with internet run "
        f"`flsep-precompute teacher fetch {handle} FOLDER`, copy FOLDER here and give --teacher "
        "FOLDER, or build one with `flsep-precompute teacher export musicnn|vggish OUT` and give "
        "--teacher OUT"
    )


def _download(handle: str) -> str:
    """Download an address into TensorFlow Hub's cache, unless it is there already."""
    import tensorflow_hub
    from tensorflow_hub.compressed_module_resolver import (
        HttpCompressedFileResolver,
    )

    if handle.startswith("gs://"):
        if not handle.endswith((".tar", ".tar.gz", ".tgz")):
            raise TeacherError("a gs address must name an archive, .tar.gz")
        return str(tensorflow_hub.resolve(handle))

    # Download the whole archive and check it before the library unpacks anything.
    with tempfile.TemporaryFile() as archive:

        class CheckedResolver(HttpCompressedFileResolver):
            """The library's resolver, with a timeout and a check that the archive is complete."""

            def _call_urlopen(self, request: urllib.request.Request) -> IO[bytes]:
                with urllib.request.urlopen(
                    request, context=self._context, timeout=_STALL_SECONDS
                ) as response:
                    shutil.copyfileobj(response, archive)
                    announced = response.headers.get("Content-Length")
                _check_archive(archive, announced)
                return archive

            def _lock_file_timeout_sec(self) -> int:
                return _STALE_LOCK_SECONDS

        return str(CheckedResolver()(handle))


def _check_archive(archive: IO[bytes], announced: str | None) -> None:
    """Raise TeacherError unless an archive is complete and holds a SavedModel; rewind it."""
    num_bytes = archive.tell()
    if announced is not None and num_bytes != int(announced):
        raise TeacherError(f"the download broke off after {num_bytes} of {announced} bytes")
    archive.seek(0)
    try:
        with tarfile.open(fileobj=archive, mode="r:*") as tar:
            # Listing reads the archive to its end, which finds one that was cut off. Names may
            # begin with `./`.
            names = {os.path.normpath(member.name) for member in tar.getmembers()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise TeacherError(
            f"the {num_bytes} bytes served are no complete tar archive: {one_line(error)}"
        ) from error
    if _MODEL_FILE not in names:
        raise TeacherError(f"the archive served has no {_MODEL_FILE}")
    archive.seek(0)


@contextlib.contextmanager
def _start_up_noise_dropped() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, then write all but TensorFlow's noise."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        # TensorFlow's libraries write to the descriptor; a replaced `sys.stderr` would miss their
        # lines.
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if not _START_UP_NOISE.match(line):
                    os.write(2, line)
