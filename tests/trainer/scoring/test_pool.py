"""Tracks in processes of their own; failures of single tracks injected."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from scored_track import RATE_HZ, make_track, score, table

from flsep.cache.files import write_text
from flsep.trainer.errors import ConfigError, ScoringError
from flsep.trainer.registry import ENGINES
from flsep.trainer.scoring.engine import FailedTrack, TrackJob
from flsep.trainer.scoring.pool import safe_name, score_tracks


class TestSafeName:
    ODD = (
        "AM Contra - Heart Peripheral",
        "The 'Best' \"Song\" / ever?",
        "..",
        ".hidden",
        "",
        "Motörhead – Überschall",
        "音楽",
        "a\nb\0c",
        "x" * 300,
        "x" * 301,
        "lone \udcff surrogate",
        "CASE",
        "case",
    )

    def test_is_a_short_plain_file_name(self):
        for name in self.ODD:
            assert len(safe_name(name)) <= 71
            assert set(safe_name(name)) <= set(
                "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
            )

    def test_differs_even_where_case_does_not_count(self):
        assert len({safe_name(name).lower() for name in self.ODD}) == len(self.ODD)

    def test_is_readable_and_stable(self):
        assert safe_name("Motörhead – Überschall") == "Motorhead_Uberschall-d94d532564"
        assert safe_name("..").startswith("track-")


def job(path: Path, name: str, fingerprint: str = "1", load=None) -> TrackJob:
    return TrackJob(
        name=name,
        sources=("vocals", "bass"),
        sample_rate_hz=RATE_HZ,
        fingerprint=fingerprint,
        load=load or functools.partial(np.load, path),
    )


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "track.npy"
    np.save(path, make_track())
    return path


def run_code(code: str):
    """Return a loader that runs code: `exec` can be pickled where a test's function cannot."""
    return functools.partial(exec, textwrap.dedent(code))


TOY_ENGINE = """
from flsep.trainer.scoring.engine import Engine

class Toy(Engine):
    name = "toy"

    def predict_peak_bytes(self, num_sources, num_channels, num_samples):
        return 1

    def score(self, references, estimates, *, sources, sample_rate_hz, name):
        return {"targets": [{"name": source, "frames": []} for source in sources]}
"""


class TestScoreTracks:
    def test_processes_score_like_this_one_and_failures_are_named(self, audio, tmp_path, capfd):
        threads = """
            import os, threadpoolctl
            threads = {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
            raise RuntimeError(f"{os.environ['OMP_NUM_THREADS']}\\n{threads}")
        """
        jobs = [
            job(audio, "good / one"),
            job(tmp_path / "gone.npy", "gone"),
            job(audio, "killed", load=run_code("import os; os.kill(os.getpid(), 9)")),
            job(audio, "left", load=run_code("import os; os._exit(3)")),
            job(audio, "threads", load=run_code(threads)),
            job(audio, "wordy", load=run_code("raise ValueError('x' * 10**6)")),
            job(audio, "good..two"),
        ]
        environment = dict(os.environ)
        done, failed = score_tracks(
            jobs, tmp_path / "new" / "scores", engine="museval", num_workers=2
        )

        assert [path.name for path in done] == [
            f"{safe_name(name)}.json" for name in ("good / one", "good..two")
        ]
        assert sorted(path for path in (tmp_path / "new" / "scores").iterdir()) == sorted(done)
        here = score(make_track())
        for path, name in zip(done, ("good / one", "good..two"), strict=True):
            stored = json.loads(path.read_text())
            assert stored["track"] == name
            assert stored["fingerprint"] == "1"
            np.testing.assert_array_equal(table(stored), table(here))

        assert [failure.track for failure in failed] == [
            "gone",
            "killed",
            "left",
            "threads",
            "wordy",
        ]
        reasons = {failure.track: failure.reason for failure in failed}
        assert reasons["gone"].startswith("FileNotFoundError: [Errno 2] No such file")
        assert reasons["killed"].startswith("its process was killed by SIGKILL; if memory")
        assert reasons["left"] == "its process ended with status 3 before it reported"
        assert reasons["threads"] == "a bug in flsep, RuntimeError: 1 {1}"
        assert len(reasons["wordy"]) == 2000
        assert capfd.readouterr() == ("", "")
        assert {**os.environ, "PATH": ""} == {**environment, "PATH": ""}

    def test_a_bug_is_told_from_bad_input(self, tmp_path):
        bad_input = """
            from flsep.cache.errors import CacheError
            error = CacheError("the shard is\\ndamaged")
            error.add_note("Precompute it again.")
            raise error
        """
        codes = {
            "bad input": bad_input,
            "disk": "raise OSError(28, 'No space left on device')",
            "bug": "list(zip((1,), (), strict=True))",
        }
        jobs = [job(tmp_path, name, load=run_code(code)) for name, code in codes.items()]
        done, failed = score_tracks(jobs, tmp_path, engine="museval", num_workers=0)
        assert done == []
        assert {failure.track: failure.reason for failure in failed} == {
            "bad input": "the shard is damaged Precompute it again.",
            "disk": "OSError: [Errno 28] No space left on device",
            "bug": "a bug in flsep, ValueError: zip() argument 2 is shorter than argument 1",
        }
        (bug,) = [failure.traceback for failure in failed if failure.traceback]
        assert 'File "<string>", line 1' in bug

    def test_keeps_only_results_of_the_same_estimates(self, audio, tmp_path):
        jobs = [job(audio, name) for name in "abc"]
        done, failed = score_tracks(jobs, tmp_path, engine="museval", num_workers=0)
        assert len(done) == 3
        assert failed == []
        before = [path.stat().st_mtime_ns for path in done]
        done[2].write_text(done[2].read_text()[:-20])  # truncated

        again = [jobs[0], job(audio, "b", fingerprint="2"), jobs[2]]
        assert score_tracks(again, tmp_path, engine="museval", num_workers=0) == (done, [])
        after = [path.stat().st_mtime_ns for path in done]
        assert after[0] == before[0]
        assert after[1] > before[1]
        assert json.loads(done[1].read_text())["fingerprint"] == "2"
        assert json.loads(done[2].read_text())["track"] == "c"

    def test_a_result_of_other_estimates_does_not_outlive_a_failure(self, audio, tmp_path):
        (path,), _ = score_tracks([job(audio, "a")], tmp_path, engine="museval", num_workers=0)
        other = job(tmp_path / "gone.npy", "a", fingerprint="2")
        done, (failure,) = score_tracks([other], tmp_path, engine="museval", num_workers=0)
        assert done == []
        assert isinstance(failure, FailedTrack)
        assert not path.exists()

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_an_engine_registered_from_outside(self, audio, tmp_path, monkeypatch, num_workers):
        (tmp_path / "toy_engine.py").write_text(TOY_ENGINE)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(ENGINES, "toy", "toy_engine:Toy")
        folder = tmp_path / "scores"
        (path,), failed = score_tracks(
            [job(audio, "a")], folder, engine="toy", num_workers=num_workers
        )
        assert failed == []
        stored = json.loads(path.read_text())
        assert stored == {
            "targets": [{"name": name, "frames": []} for name in ("vocals", "bass")],
            "track": "a",
            "sample_rate_hz": RATE_HZ,
            "num_samples": 2 * RATE_HZ,
            "fingerprint": "1",
            "engine": "toy",
        }
        # Kept by its own engine; a result that names no engine is museval's.
        for engine, is_kept in (("toy", True), ("museval", False)):
            before = path.read_text()
            score_tracks([job(audio, "a")], folder, engine=engine, num_workers=0)
            assert (path.read_text() == before) == is_kept
        del stored["engine"]
        path.write_text(json.dumps(stored))
        score_tracks([job(audio, "a")], folder, engine="museval", num_workers=0)
        assert json.loads(path.read_text()) == stored

    def test_an_unknown_engine_is_named(self, tmp_path):
        with pytest.raises(
            ConfigError, match="unknown scoring engine 'mir'; expected one of museval"
        ):
            score_tracks([], tmp_path, engine="mir", num_workers=0)

    def test_shows_progress_on_request(self, audio, tmp_path, capfd):
        jobs = [job(audio, "a"), job(tmp_path / "gone.npy", "b")]
        score_tracks(jobs, tmp_path, engine="museval", num_workers=0, progress=True)
        assert "museval: 100%" in capfd.readouterr().err

    def test_refuses_a_name_twice_and_a_folder_it_cannot_write(self, audio, tmp_path):
        with pytest.raises(ScoringError, match=r"tracks \['a'\] come more than once"):
            score_tracks(
                [job(audio, "a"), job(audio, "a")], tmp_path, engine="museval", num_workers=0
            )
        (tmp_path / "file").touch()
        with pytest.raises(ScoringError, match=r"cannot make the folder .*Not a directory"):
            score_tracks(
                [job(audio, "a")], tmp_path / "file" / "x", engine="museval", num_workers=0
            )

    def test_ctrl_c_ends_the_processes_quietly(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            textwrap.dedent("""
                import functools, pathlib, sys, time
                from flsep.trainer.scoring.engine import TrackJob
                from flsep.trainer.scoring.pool import score_tracks

                def load(flag):
                    pathlib.Path(flag).touch()
                    time.sleep(100)

                if __name__ == "__main__":
                    flags = sys.argv[1:]
                    jobs = [
                        TrackJob(name=flag, sources=("a", "b"), sample_rate_hz=8000,
                                 fingerprint="", load=functools.partial(load, flag))
                        for flag in flags
                    ]
                    try:
                        score_tracks(jobs, pathlib.Path("scores"), engine="museval", num_workers=2)
                    except KeyboardInterrupt:
                        sys.exit(130)
            """)
        )
        process = subprocess.Popen(
            [sys.executable, str(script), "one", "two"],
            cwd=tmp_path,
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        while not ((tmp_path / "one").exists() and (tmp_path / "two").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert errors == ""
        assert process.returncode == 130
        assert list((tmp_path / "scores").iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
