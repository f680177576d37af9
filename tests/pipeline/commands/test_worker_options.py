import pytest

from flsep.pipeline.commands import worker_options

GIB = 1 << 30


def test_more_workers_than_the_memory_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_options, "free_host_bytes", lambda: 4 * GIB)
    for workers in (0, 1):
        worker_options.require_memory(workers)
    with pytest.raises(
        ValueError, match=r"2 worker\(s\) need about 4.5 GiB of memory, 4 GiB are free; use fewer"
    ):
        worker_options.require_memory(2)
    monkeypatch.setattr(worker_options, "free_host_bytes", lambda: 2 * GIB)
    with pytest.raises(ValueError, match=r"1 worker\(s\) need"):
        worker_options.require_memory(0)
