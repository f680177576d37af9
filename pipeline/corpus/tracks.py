"""Recognise the kind of a corpus from its folder, and list its tracks."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from flsep.pipeline.corpus.media import AudioStream, probe_all, tolerance_samples
from flsep.pipeline.errors import CorpusError, MediaError

SPLITS = ("train", "valid", "test")
MUSDB_SOURCES = ("drums", "bass", "other", "vocals")
MUSDB_VALID_TRACKS = frozenset(  # https://github.com/sigsep/sigsep-mus-db, musdb/configs/mus.yaml
    {
        "Actions - One Minute Smile",
        "Clara Berry And Wooldog - Waltz For My Victims",
        "Johnny Lokke - Promises & Lies",
        "Patrick Talbot - A Reason To Leave",
        "Triviul - Angelsaint",
        "Alexander Ross - Goodbye Bolero",
        "Fergessen - Nos Palpitants",
        "Leaf - Summerghost",
        "Skelpolu - Human Mistakes",
        "Young Griffo - Pennies",
        "ANiMAL - Rockshow",
        "James May - On The Line",
        "Meaxic - Take A Step",
        "Traffic Experiment - Sirens",
    }
)
DEFAULT_VALID_FRACTION = 0.1
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".m4a", ".aif", ".aiff"})
STEM_SUFFIX = ".stem.mp4"  # streams: the mixture, then MUSDB_SOURCES
_STEM_STREAMS = 1 + len(MUSDB_SOURCES)


@dataclass(frozen=True, slots=True)
class Track:
    """One song: where to find its signals, with the sources in the order of `Corpus.sources`.

    The name is unique in the corpus and printable, and never used as a path. Without a mixture of
    its own, the sum of the sources is the mixture.
    """

    name: str
    split: str
    mixture: AudioStream | None
    sources: tuple[AudioStream, ...]


@dataclass(frozen=True, slots=True)
class TrackInfo:
    """What the headers say about a track; `num_samples` is the length of the shortest signal.

    The decoded signals of a container may differ from this by a codec frame.
    """

    num_samples: int
    sample_rate_hz: int
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class Corpus:
    """A folder of tracks.

    Attributes
    ----------
    kind : {"musdb18", "musdb18-hq", "folder"}
        "folder" stands for any other layout or a mixed one.
    tracks : tuple of Track
        Sorted by split (train, valid, test), then by name.
    rejected : tuple of (str, str)
        Name and reason of each track that cannot be used, sorted.
    """

    root: Path
    kind: str
    sources: tuple[str, ...]
    tracks: tuple[Track, ...]
    rejected: tuple[tuple[str, str], ...]
    infos: Mapping[str, TrackInfo]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A stem file (`files` is None) or a folder of sound files, by the name of their stem."""

    name: str
    split: str
    path: Path
    files: Mapping[str, Sequence[Path]] | None


def find_corpus(
    root: Path,
    *,
    sources: Sequence[str] | None = None,
    valid_fraction: float | None = None,
    test_fraction: float = 0.0,
    seed: int = 0,
    num_channels: int = 2,
) -> Corpus:
    """Recognise a corpus and list its tracks after reading the header of each file.

    A track is a `*.stem.mp4` as in MUSDB18, or a folder with one sound file a source and optionally
    one named `mixture`, as in MUSDB18-HQ. Tracks lie in `train/`, `valid/` and `test/`, or directly
    in `root`, and then all are for training. The validation tracks are, in this order of
    preference: those in `valid/`; those of MUSDB's 14 validation tracks that are present, unless
    `valid_fraction` is given; a fraction of the training tracks.

    Parameters
    ----------
    sources : sequence of str, optional
        Names of the sources, in order. Default: MUSDB's four.
    valid_fraction, test_fraction : float
        Probability that a training track is held out for a split without a folder; if positive, at
        least one is. Default for validation: 0.1 if there is neither a folder `valid/` nor one of
        MUSDB's 14 tracks, and a track is left to train on.

    Raises
    ------
    CorpusError
        If the folder is no corpus, two tracks share a name, no track has one of the `sources`, or a
        fraction cannot take effect. Tracks that cannot be used are in `Corpus.rejected` instead.
    """
    fractions = (valid_fraction or 0.0, test_fraction)
    if min(fractions) < 0 or not sum(fractions) < 1:
        raise CorpusError(
            f"--valid-fraction {fractions[0]} and --test-fraction {fractions[1]}: expected "
            "fractions from 0 that leave something to train on"
        )
    entries, rejected = _list_entries(root)
    names = _choose_sources(root, entries, sources)

    def make(entry: _Entry) -> tuple[Track, TrackInfo] | MediaError:
        try:
            track = _make_track(entry, names)
            return track, check_track(track, num_channels=num_channels)
        except MediaError as error:
            return error

    # Threads help: both libraries release the interpreter while they open a file.
    with ThreadPoolExecutor() as pool:
        made = list(zip(entries, pool.map(make, entries), strict=True))
    rejected += [(entry.name, str(bad)) for entry, bad in made if isinstance(bad, MediaError)]
    checked = [good for _, good in made if not isinstance(good, MediaError)]
    infos = {track.name: info for track, info in checked}
    tracks = [track for track, _ in checked]
    # Draw only from the usable tracks, so that a rejected one cannot leave a split empty.
    held_out = _hold_out(root, tracks, valid_fraction, test_fraction, seed)
    tracks = [replace(track, split=held_out.get(track.name, track.split)) for track in tracks]
    tracks.sort(key=lambda track: (SPLITS.index(track.split), track.name))
    return Corpus(root, _kind(entries), names, tuple(tracks), tuple(sorted(rejected)), infos)


def check_track(track: Track, *, num_channels: int = 2) -> TrackInfo:
    """Read the headers of a track's files; raises MediaError unless they fit together.

    All lengths must be equal; if one of the files is a container (mp4, m4a, mp3), they may differ
    by a codec frame, 2048 samples, since the headers of containers are not more precise.
    """
    signals = [*filter(None, [track.mixture]), *track.sources]
    infos = probe_all(signals)
    for signal, info in zip(signals, infos, strict=True):
        if signal.path.name.endswith(STEM_SUFFIX) and info.num_streams != _STEM_STREAMS:
            raise MediaError(
                f"{signal.path}: has {info.num_streams} audio streams, expected the "
                f"{_STEM_STREAMS} of a MUSDB stem file"
            )
        if info.num_channels not in (1, num_channels):
            raise MediaError(
                f"{signal}: has {info.num_channels} channels, expected {num_channels} or 1"
            )
    rates = [info.sample_rate_hz for info in infos]
    if len(set(rates)) > 1:
        raise MediaError(
            f"its files differ in sample rate: {_list_each(signals, rates)} Hz; expected one rate"
        )
    lengths = [info.num_samples for info in infos]
    tolerance = max(map(tolerance_samples, signals))
    if max(lengths) - min(lengths) > tolerance:
        raise MediaError(
            f"its files differ in length: {_list_each(signals, lengths)} samples; expected equal "
            f"lengths, to within {tolerance}"
        )
    return TrackInfo(min(lengths), rates[0], min(lengths) / rates[0])


def _list_each(signals: Iterable[AudioStream], values: Iterable[int]) -> str:
    def label(signal: AudioStream) -> str:
        return signal.path.name if signal.stream is None else f"stream {signal.stream}"

    return ", ".join(f"{label(s)} {v}" for s, v in zip(signals, values, strict=True))


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _list_entries(root: Path) -> tuple[list[_Entry], list[tuple[str, str]]]:
    """List candidates for tracks; reject files and folders that look like one but are none."""
    if not root.is_dir():
        raise CorpusError(f"{root}: no such folder; expected a corpus")
    if not _visible(root):
        raise CorpusError(f"{root}: is an empty folder; expected a corpus")
    folders = {split: root / split for split in SPLITS if (root / split).is_dir()}
    if folders and (strays := [p for p in _visible(root) if p.name not in SPLITS and _holds(p)]):
        raise CorpusError(
            f"{strays[0]}: holds sound files beside {', '.join(folders)}; move them into "
            f"{', '.join(SPLITS)}, or out of the corpus"
        )
    # Without folders of splits, all tracks are for training until some are held out.
    entries, rejected = [], []
    for split, folder in (folders or {"train": root}).items():
        for path in _visible(folder):
            sounds = _list_sounds(path)
            if not path.name.isprintable():  # control characters, or bytes other than UTF-8
                rejected.append((ascii(path.name), "its name is not printable; rename it"))
            elif path.name.endswith(STEM_SUFFIX):
                entries.append(_Entry(path.name.removesuffix(STEM_SUFFIX), split, path, None))
            elif sounds:
                entries.append(_Entry(path.name, split, path, sounds))
            elif path.is_dir():
                rejected.append((path.name, f"{path}: holds no sound files; fill or remove it"))
            elif path.suffix.lower() in AUDIO_SUFFIXES:
                rejected.append((path.name, f"{path}: is a lone sound file, expected a folder"))
    if not entries:
        raise CorpusError(
            f"{root}: is no corpus; expected *{STEM_SUFFIX} files or a folder of sound files a "
            f"track, in it or in its folders {', '.join(SPLITS)}"
        )
    # Names identify tracks across splits too: in the index, in reports, in evaluations.
    counts = Counter(entry.name for entry in entries)
    if twice := [name for name, count in sorted(counts.items()) if count > 1]:
        raise CorpusError(
            f"{root}: has more than one track named {', '.join(map(repr, twice))}; rename them"
        )
    return entries, rejected


def _list_sounds(folder: Path) -> dict[str, list[Path]]:
    """List a folder's sound files by the name of their stem."""
    sounds: dict[str, list[Path]] = {}
    for path in _visible(folder) if folder.is_dir() else ():
        if path.suffix.lower() in AUDIO_SUFFIXES:
            sounds.setdefault(path.stem, []).append(path)
    return sounds


def _holds(path: Path) -> bool:
    """Tell whether a path is a track or contains one."""
    inside = _visible(path) if path.is_dir() else ()
    return any(p.name.endswith(STEM_SUFFIX) or _list_sounds(p) for p in (path, *inside))


def _choose_sources(
    root: Path, entries: Iterable[_Entry], asked: Sequence[str] | None
) -> tuple[str, ...]:
    """Return the requested names, or MUSDB's if some track has all of them."""
    each = [MUSDB_SOURCES if entry.files is None else entry.files for entry in entries]
    found = sorted({name for names in each for name in names} - {"mixture"})
    listing = f"found {', '.join(found) or 'none'}"
    if asked is None:
        if not any(set(MUSDB_SOURCES) <= set(names) for names in each):
            raise CorpusError(
                f"{root}: no track has all of {', '.join(MUSDB_SOURCES)} ({listing}); name the "
                "corpus's own with --sources"
            )
        return MUSDB_SOURCES
    if not asked or len(set(asked)) != len(asked) or "mixture" in asked:
        raise CorpusError(f"--sources {','.join(asked)}: expected different names, not 'mixture'")
    if unknown := [name for name in asked if name not in found]:
        raise CorpusError(f"{root}: no track has a source {', '.join(unknown)} ({listing})")
    return tuple(asked)


def _make_track(entry: _Entry, sources: tuple[str, ...]) -> Track:
    if entry.files is None:
        if unknown := [name for name in sources if name not in MUSDB_SOURCES]:
            raise MediaError(f"{entry.path}: a MUSDB stem file has no {', '.join(unknown)}")
        # Stream 0 is the mixture. The user's order of sources may differ from that of the streams.
        streams = [AudioStream(entry.path, 1 + MUSDB_SOURCES.index(name)) for name in sources]
        return Track(entry.name, entry.split, AudioStream(entry.path, 0), tuple(streams))
    if missing := [name for name in sources if name not in entry.files]:
        raise MediaError(
            f"{entry.path}: has no file for {', '.join(missing)} (found {', '.join(entry.files)})"
        )
    chosen = {name: entry.files[name] for name in ("mixture", *sources) if name in entry.files}
    if several := [path.name for paths in chosen.values() for path in paths if len(paths) > 1]:
        raise MediaError(f"{entry.path}: has {', '.join(several)}; expected one file a source")
    streams_by_name = {name: AudioStream(paths[0]) for name, paths in chosen.items()}
    mixture = streams_by_name.get("mixture")
    return Track(entry.name, entry.split, mixture, tuple(streams_by_name[s] for s in sources))


def _kind(entries: Iterable[_Entry]) -> str:
    def kind(entry: _Entry) -> str:
        if entry.files is None:
            return "musdb18"
        wavs = {path.name for paths in entry.files.values() for path in paths}
        is_hq = wavs == {f"{name}.wav" for name in ("mixture", *MUSDB_SOURCES)}
        return "musdb18-hq" if is_hq else "folder"

    kinds = {kind(entry) for entry in entries}
    return kinds.pop() if len(kinds) == 1 else "folder"


def _hold_out(
    root: Path,
    tracks: Sequence[Track],
    valid_fraction: float | None,
    test_fraction: float,
    seed: int,
) -> dict[str, str]:
    """Return the new split of each training track that is held out."""
    # A fraction and a folder for the same split contradict each other.
    for option, fraction in (("valid", valid_fraction), ("test", test_fraction or None)):
        if fraction is not None and (root / option).is_dir():
            raise CorpusError(
                f"--{option}-fraction {fraction}: {root} has a folder {option}; leave out either"
            )
    names = [track.name for track in tracks if track.split == "train"]
    musdb: frozenset[str] = frozenset()
    if valid_fraction is None and not (root / "valid").is_dir():
        musdb = MUSDB_VALID_TRACKS.intersection(names)
        if not musdb and len(names) > 1 + (test_fraction > 0):
            valid_fraction = DEFAULT_VALID_FRACTION
    valid_fraction = valid_fraction or 0.0
    held_out = dict.fromkeys(musdb, "valid")
    # A draw depends on name and seed only, so a track keeps its split when others are added.
    draws = sorted((_draw(name, seed), name) for name in names if name not in musdb)
    free = [name for _, name in draws]
    num_least = (test_fraction > 0) + (valid_fraction > 0)
    if tracks and num_least and len(free) <= num_least:
        raise CorpusError(
            f"{root}: has {len(free)} usable training tracks, expected more than {num_least} to "
            "hold out from; leave out --valid-fraction and --test-fraction"
        )

    def num_below(fraction: float) -> int:
        return sum(draw < fraction for draw, _ in draws)

    # Test tracks have the lowest draws, validation tracks those above, so the list is cut twice.
    # Each requested split gets at least one track, and one track is left to train on.
    num_test = num_held = 0
    if test_fraction:
        num_test = num_held = min(max(num_below(test_fraction), 1), len(free) - num_least)
    if valid_fraction:
        num_held = max(num_below(test_fraction + valid_fraction), num_test + 1)
        num_held = min(num_held, len(free) - 1)
    held_out |= dict.fromkeys(free[:num_test], "test")
    held_out |= dict.fromkeys(free[num_test:num_held], "valid")
    return held_out


def _draw(name: str, seed: int) -> float:
    """Draw a number in [0, 1) that depends on the name and the seed only."""
    # Not `hash`, which differs between processes.
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
