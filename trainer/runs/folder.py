"""The folder of a run: its files, its metrics, its TensorBoard events."""

import json
import os
import platform
import shutil
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flsep.cache.files import TEMPORARY_SUFFIX, remove_leftovers, write_json, write_text
from flsep.trainer.errors import RunError

_PACKAGES = ("flsep", "torch", "numpy", "h5py", "safetensors")


class Run:
    """A run folder.

    ==================== =======================================================================
    ``config.json``      the resolved configuration, the shards and their fingerprint
    ``environment.json`` versions of Python and packages, machine, device, seed
    ``metrics.jsonl``    one line an epoch: each term of the loss, in training and validation
    ``events.*``         the same for TensorBoard (``tensorboard --logdir RUN``)
    ``best.safetensors`` weights with the lowest validation loss
    ``last.safetensors`` weights and everything that ``--resume`` needs
    ``evaluation/``      scores, written by ``flsep-train evaluate``
    ==================== =======================================================================
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.best = folder / "best.safetensors"
        self.last = folder / "last.safetensors"
        self.metrics = folder / "metrics.jsonl"
        self.evaluation = folder / "evaluation"

    def prepare(self, *, overwrite: bool) -> None:
        """Make the folder for a new run; `overwrite` removes the files of an earlier one.

        Raises RunError if the folder cannot be written into, or is not empty without `overwrite`.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self._remove()
            elif any(self.folder.iterdir()):
                raise RunError(
                    f"{self.folder} is not empty: add --resume to go on with the run in it, "
                    "--overwrite to replace it, or choose another --run"
                )
        except OSError as error:
            raise self._unusable(error) from error
        self.require_writable()

    @property
    def is_unfinished(self) -> bool:
        """Whether a run started here and was killed before it saved anything."""
        began = (self.folder / "config.json").exists()
        return began and not (self.best.exists() or self.last.exists())

    def require_writable(self) -> None:
        """Raise RunError unless the folder is writable; remove temporary files of killed runs."""
        # Permission bits do not tell of a file system that is read-only, so write a file.
        probe = self.folder / f".{os.getpid()}{TEMPORARY_SUFFIX}"
        try:
            probe.touch()
            # This removes the probe as well, which has the name of a temporary file.
            remove_leftovers(self.folder)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> RunError:
        reason = error.strerror or str(error)
        return RunError(f"cannot write the run folder {self.folder} ({reason}); choose another")

    def _remove(self) -> None:
        """Remove the files of a run, and leave any others."""
        names = ("config.json", "environment.json", "metrics.jsonl", "*.safetensors", "events.*")
        for name in names:
            for path in self.folder.glob(name):
                path.unlink()
        shutil.rmtree(self.evaluation, ignore_errors=True)

    def write_description(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write ``config.json`` and ``environment.json``."""
        write_json(self.folder / "config.json", config)
        write_json(self.folder / "environment.json", environment)

    def trim_metrics(self, num_epochs: int) -> None:
        """Keep the lines of the first epochs: a resumed run writes the others again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(self.metrics, "".join(lines[:num_epochs]))

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Append the line of one epoch."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")


class EventLog:
    """Writes TensorBoard scalars without ``torch.utils.tensorboard``, which loads TensorFlow.

    TensorBoard discards `first_step` and later steps of earlier files in the folder.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # Imported here: it takes a quarter of a second, and only a training needs it.
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "wb")  # noqa: SIM115
        self._writer = RecordWriter(self._file)
        self._write(step=first_step, file_version="brain.Event:2")
        # This event makes TensorBoard discard the steps of earlier files.
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: dict[str, float]) -> None:
        """Write the scalars of one step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()  # so that TensorBoard shows an epoch when it ends

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def list_packages() -> dict[str, str]:
    """Return the versions of the packages that determine a training."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_environment(device: str, seed: int) -> dict[str, Any]:
    """Return the content of ``environment.json``."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": list_packages(),
        "device": device,
        "seed": seed,
    }
