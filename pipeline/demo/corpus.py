"""Render a small corpus with the layout of MUSDB18-HQ: composed songs with a synthetic singer.

Drums, bass and other are General MIDI, rendered with the soundfont in pretty_midi. Songs come from
:mod:`flsep.pipeline.demo.composition`, vocals from :mod:`flsep.pipeline.demo.voice`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flsep.pipeline.demo.composition import Part, Song, compose
from flsep.pipeline.demo.voice import VOICES, sing
from flsep.pipeline.errors import CorpusError, SettingsError

RATE_HZ = 44100
STEMS = ("drums", "bass", "other", "vocals")
MANIFEST = "demo-corpus.json"
MIN_SECONDS = 4.0  # two bars at the slowest tempo; shorter songs would have no vocals
_PEAK = 0.9  # of the loudest signal, mixture or stem; full scale is 1
_FADE_SECONDS = 0.3


def render_corpus(
    out: Path,
    *,
    num_tracks: int = 14,
    seconds: float = 24.0,
    seed: int = 0,
    example: bool = True,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Render ``out/{train,valid,test}/<track>/{mixture,drums,bass,other,vocals}.wav``.

    The files are 16-bit stereo at 44.1 kHz, and each mixture is the exact sum of its stems. One
    track in eight, at least one, is for validation, as many are for testing, the others for
    training. The same arguments give the same bytes; track i depends on ``seed``, ``seconds`` and i
    only. The corpus is rendered beside ``out`` and renamed, so that ``out`` is never incomplete.

    Parameters
    ----------
    out : Path
        Folder to create. A corpus rendered with the same arguments is kept unchanged.
    num_tracks : int
        Number of tracks, at least 3.
    seconds : float
        Length of each track, at least 4.
    seed : int
        Not negative; another seed gives other songs.
    example : bool
        Copy the one real MUSDB18 track that the package stempeg carries into the test split.
    progress : callable, optional
        Called with a line of text for each finished track, or when the corpus is kept.

    Raises
    ------
    SettingsError
        If an argument is out of range.
    CorpusError
        If a package is missing, or ``out`` cannot be used.
    """
    tell = progress or (lambda line: None)
    out = Path(out).absolute()
    if num_tracks < 3:
        raise SettingsError(f"--tracks {num_tracks}: expected at least 3, one for each split")
    if not MIN_SECONDS <= seconds < float("inf"):
        raise SettingsError(f"--seconds {seconds}: expected at least {MIN_SECONDS:g}")
    if seed < 0:
        raise SettingsError(f"--seed {seed}: expected 0 or more")
    arguments = {
        "flsep": importlib.metadata.version("flsep"),
        "num_tracks": num_tracks,
        "seconds": float(seconds),
        "seed": seed,
        "example": example,
    }
    if _is_kept(out, arguments):
        tell(f"{out}: kept, it was rendered with the same arguments")
        return
    # Look for every package before the rendering starts, which takes a while.
    soundfont = (_package_folder("pretty_midi") / "TimGM6mb.sf2").read_bytes()
    for package in ("midirenderer", "soundfile", "soxr"):
        _package_folder(package)
    example_track = _example_track() if example else None

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(
            dir=out.parent, prefix=f".{out.name}-", ignore_cleanup_errors=True
        )
    except OSError as error:
        raise CorpusError(
            f"{out}: cannot be created ({error.strerror}); choose another output folder"
        ) from error
    with temporary:
        build = Path(temporary.name) / "corpus"
        tracks = {}
        for index, split in enumerate(split_names(num_tracks)):
            song = compose(seed, index, seconds)
            folder = build / split / song.name
            folder.mkdir(parents=True)
            rng = np.random.default_rng([seed, index, 1])
            _write_track(folder, render_song(song, seconds, soundfont, rng))
            tracks[song.name] = _describe(song, split)
            tell(f"{index + 1}/{num_tracks} {split}/{song.name}")
        if example_track is not None:
            shutil.copyfile(example_track, build / "test" / example_track.name)
            tell(f"test/{example_track.name}: copied from stempeg")
        manifest = {"arguments": arguments, "tracks": tracks}
        (build / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        build.rename(out)


def split_names(num_tracks: int) -> list[str]:
    """Return the split of each track: about three in four train, the others valid and test."""
    num_held_out = max(1, num_tracks // 8)
    num_train = num_tracks - 2 * num_held_out
    return ["train"] * num_train + ["valid"] * num_held_out + ["test"] * num_held_out


def render_song(
    song: Song, seconds: float, soundfont: bytes, rng: np.random.Generator
) -> dict[str, NDArray[np.int16]]:
    """Render and mix a song.

    Parameters
    ----------
    song : Song
        The composition.
    seconds : float
        Length; the song ends there with a short fade.
    soundfont : bytes
        An SF2 file with the General MIDI programs.
    rng : numpy.random.Generator
        Source of randomness for voice and room.

    Returns
    -------
    dict of str to int16 [sample, channel]
        "mixture" and the four stems, whose sum is the mixture.
    """
    num_samples = round(seconds * RATE_HZ)
    voice = sing(song.melody, VOICES[song.voice], num_samples=num_samples, rate_hz=RATE_HZ, rng=rng)
    dry = {
        stem: _play(parts, seconds, song.tempo_bpm, soundfont) for stem, parts in song.parts.items()
    }
    dry["vocals"] = np.stack([voice, voice], axis=1)

    fade_samples = round(_FADE_SECONDS * RATE_HZ)
    fade = np.ones((num_samples, 1))
    fade[-fade_samples:, 0] = np.linspace(1, 0, fade_samples)
    room = _Room(song.mix.reverb_seconds, num_samples, rng)
    # Pan with constant power, add the room, and bring each stem to its level in the mix.
    stems = {}
    for stem in STEMS:
        angle = (song.mix.pans[stem] + 1) * np.pi / 4
        panned = dry[stem] * np.sqrt(2) * np.array([np.cos(angle), np.sin(angle)])
        wet = room.answer(panned) * 10 ** (song.mix.reverb_db[stem] / 20)
        gain = 10 ** (song.mix.levels_db[stem] / 20) / active_rms(panned)
        stems[stem] = gain * fade * (panned + wet)

    # One gain for all, so that nothing clips; the mixture is summed after rounding, hence exact.
    peak = max(np.abs(signal).max() for signal in (*stems.values(), sum(stems.values())))
    quantised = {
        stem: np.rint(signal * (_PEAK * 32767 / peak)).astype(np.int16)
        for stem, signal in stems.items()
    }
    mixture = np.sum(list(quantised.values()), axis=0, dtype=np.int32)
    return {"mixture": mixture.astype(np.int16), **quantised}


def active_rms(signal: NDArray[np.float64]) -> float:
    """Return the RMS of those 0.1 s blocks that are within 30 dB of the loudest block.

    Parameters
    ----------
    signal : float64 [sample, channel]
        At 44.1 kHz, not silent.
    """
    block = RATE_HZ // 10
    power = np.square(signal) @ (0.5, 0.5)
    blocks = power[: len(power) // block * block].reshape(-1, block).mean(axis=1)
    return float(np.sqrt(blocks[blocks > blocks.max() / 1000].mean()))


def _play(
    parts: tuple[Part, ...], seconds: float, tempo_bpm: int, soundfont: bytes
) -> NDArray[np.float64]:
    """Render General MIDI parts together, float64 [sample, channel], full scale 1."""
    import midirenderer
    import pretty_midi
    import soundfile
    import soxr

    midi = pretty_midi.PrettyMIDI(resolution=480, initial_tempo=tempo_bpm)
    for part in parts:
        instrument = pretty_midi.Instrument(part.program, is_drum=part.is_drum)
        instrument.notes = [
            pretty_midi.Note(note.velocity, note.pitch, note.start_seconds, note.end_seconds)
            for note in part.notes
            if note.start_seconds < seconds
        ]
        # Volume with headroom, pan, and no effects: the room is added later. The last event
        # makes the rendering long enough.
        controls = {7: 100, 10: round(64 + 63 * part.pan), 91: 0, 93: 0}
        instrument.control_changes = [
            pretty_midi.ControlChange(number, value, 0.0) for number, value in controls.items()
        ]
        instrument.control_changes.append(pretty_midi.ControlChange(91, 0, seconds + 1.0))
        midi.instruments.append(instrument)
    file = io.BytesIO()
    midi.write(file)
    wav = midirenderer.render_wave_from(soundfont, file.getvalue())
    audio, rendered_hz = soundfile.read(io.BytesIO(wav), dtype="float64", always_2d=True)
    resampled: NDArray[np.float64] = soxr.resample(audio, rendered_hz, RATE_HZ)
    return resampled[: round(seconds * RATE_HZ)]


class _Room:
    """Reverberation of a room: stereo noise that decays by 60 dB, after a short delay."""

    def __init__(self, decay_seconds: float, num_samples: int, rng: np.random.Generator) -> None:
        t = np.arange(round(decay_seconds * RATE_HZ)) / RATE_HZ
        response = rng.standard_normal((2, len(t))) * 10 ** (-3 * t / decay_seconds)
        response[:, : RATE_HZ // 80] = 0
        response /= np.sqrt(np.square(response).sum(axis=1, keepdims=True))
        self.num_samples = num_samples
        self.size = -(-(num_samples + len(t)) // 2**16) * 2**16  # fast for FFTs
        self.spectrum = np.fft.rfft(response, self.size)

    def answer(self, signal: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the reverberation of the mono downmix; both float64 [sample, channel]."""
        spectrum = np.fft.rfft(signal @ (0.5, 0.5), self.size) * self.spectrum
        return np.fft.irfft(spectrum, self.size)[:, : self.num_samples].T


def _write_track(folder: Path, signals: dict[str, NDArray[np.int16]]) -> None:
    import soundfile

    for name, signal in signals.items():
        path = folder / f"{name}.wav"
        try:
            soundfile.write(path, signal, RATE_HZ, subtype="PCM_16")
        except soundfile.LibsndfileError as error:
            raise CorpusError(
                f"{path}: cannot be written ({error}); is the disk full, or not writable?"
            ) from error


def _describe(song: Song, split: str) -> dict[str, Any]:
    """Return the entry of a song in the manifest."""
    programs = {stem: [part.program for part in parts] for stem, parts in song.parts.items()}
    return {
        "split": split,
        "tempo_bpm": song.tempo_bpm,
        "key": song.key,
        "form": [f"{section.name} {section.num_bars}" for section in song.sections],
        "voice": song.voice,
        "general_midi_programs": programs,
    }


def _is_kept(out: Path, arguments: dict[str, object]) -> bool:
    """Tell whether ``out`` holds this corpus already; refuse a folder with anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    manifest = out / MANIFEST
    if not manifest.is_file():
        raise CorpusError(
            f"{out}: exists and is no demo corpus (no {MANIFEST}); choose another output folder"
        )
    try:
        found = json.loads(manifest.read_text())["arguments"]
        differing = [
            f"{k} {found[k]} instead of {v}" for k, v in arguments.items() if found[k] != v
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{manifest}: is no manifest of a demo corpus; remove {out} or choose another "
            "output folder"
        ) from error
    if differing:
        raise CorpusError(
            f"{out}: holds a demo corpus rendered with {', '.join(differing)}; "
            "remove it or choose another output folder"
        )
    return True


def _package_folder(package: str) -> Path:
    """Return the folder of a package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise CorpusError(
            f"the package {package} is missing, which the demo corpus needs; "
            "install it with: pip install 'flsep[demo]'"
        )
    return Path(spec.origin).parent


def _example_track() -> Path:
    """Return the MUSDB18 track that stempeg carries."""
    folder = _package_folder("stempeg") / "data"
    tracks = sorted(folder.glob("*.stem.mp4"))
    if not tracks:
        raise CorpusError(
            f"{folder}: holds no *.stem.mp4; reinstall stempeg or leave the example out"
        )
    return tracks[0]
