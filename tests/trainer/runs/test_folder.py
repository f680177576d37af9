import json
import struct
from pathlib import Path

import pytest

from flsep.trainer.errors import RunError
from flsep.trainer.runs.folder import EventLog, Run, describe_environment


def read_records(path: Path) -> list[bytes]:
    """Read TensorBoard's record format: length, its checksum, data, its checksum."""
    content, records = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        records.append(content[12 : 12 + length])
        content = content[16 + length :]
    return records


def test_events_can_be_read(tmp_path: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    with EventLog(tmp_path, 4) as events:
        events.add(4, {"train/total": 1.5, "learning_rate": 0.5})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    first, start, scalars = [Event.FromString(record) for record in read_records(path)]
    assert first.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (4, SessionLog.START)
    assert scalars.step == 4
    values = {value.tag: value.simple_value for value in scalars.summary.value}
    assert values == {"train/total": 1.5, "learning_rate": 0.5}


def test_a_run_that_is_there_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path / "a" / "run")
    run.prepare(overwrite=False)
    run.best.write_text("weights")
    with pytest.raises(RunError, match=r"is not empty: add --resume .* --overwrite"):
        run.prepare(overwrite=False)
    assert run.best.read_text() == "weights"


def test_overwrite_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name in ("best.safetensors", "last.safetensors", "metrics.jsonl", "events.out.1", "notes"):
        (tmp_path / name).touch()
    (run.evaluation / "scores").mkdir(parents=True)
    run.prepare(overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunError, match=r"cannot write the run folder .* choose another"):
            Run(folder).prepare(overwrite=False)


def test_metrics_are_trimmed_to_the_epochs_that_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trim_metrics(3)  # nothing to trim
    for epoch in range(4):
        run.append_metrics({"epoch": epoch})
    run.trim_metrics(2)
    run.append_metrics({"epoch": 2, "again": True})
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert lines == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2, "again": True}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_environment_names_versions() -> None:
    import torch

    environment = describe_environment("cpu", 3)
    # The installed version may carry a local label that the metadata lacks, or the reverse.
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["seed"] == 3
    assert environment["device"] == "cpu"


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / ".last.safetensors.123.part").write_bytes(b"half")
    run.last.write_bytes(b"whole")
    run.require_writable()
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]
