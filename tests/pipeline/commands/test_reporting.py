import pytest

from flsep.pipeline.commands import reporting

GIB = 1 << 30


def test_more_workers_than_the_memory_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "free_host_bytes", lambda: 4 * GIB)
    for workers in (0, 1):
        reporting.require_memory(workers)
    with pytest.raises(
        ValueError, match=r"2 worker\(s\) need about 4.5 GiB of memory, 4 GiB are free; use fewer"
    ):
        reporting.require_memory(2)
    monkeypatch.setattr(reporting, "free_host_bytes", lambda: 2 * GIB)
    with pytest.raises(ValueError, match=r"1 worker\(s\) need"):
        reporting.require_memory(0)
