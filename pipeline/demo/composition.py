"""Compose the songs of the demo corpus: notes and mixing decisions, no audio.

Drums, bass, accompaniment and melody of a song follow the same tempo, key, form and pair of chord
progressions. Everything is drawn from ``(seed, index)``, so that a song does not depend on the size
of the corpus.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from flsep.pipeline.demo.voice import CONSONANTS, VOICES, VOWELS, Syllable

T = TypeVar("T")

STEPS_PER_BAR = 16
MODES = {
    "major": (0, 2, 4, 5, 7, 9, 11),
    "minor": (0, 2, 3, 5, 7, 8, 10),
    "dorian": (0, 2, 3, 5, 7, 9, 10),
    "mixolydian": (0, 2, 4, 5, 7, 9, 10),
}
_NOTE_NAMES = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
# One chord a bar, as degrees of the scale, without the diminished triad of each mode.
_PROGRESSIONS = {
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (3, 0, 4, 5), (0, 3, 0, 4), (5, 3, 0, 4), (1, 4, 0, 5)),
    "minor": ((0, 5, 2, 6), (0, 3, 5, 6), (0, 6, 5, 6), (5, 6, 0, 0), (0, 2, 6, 3), (3, 0, 6, 5)),
    "dorian": ((0, 3, 0, 3), (0, 6, 3, 0), (0, 2, 3, 0), (3, 0, 6, 0)),
    "mixolydian": ((0, 6, 3, 0), (0, 3, 6, 0), (6, 3, 0, 0), (0, 4, 3, 6)),
}

# Drum patterns: sixteenths of a bar; X loud, x normal, o soft. Keys: General MIDI percussion.
_KICK, _STICK, _SNARE, _CLAP, _CLOSED, _OPEN, _CRASH, _RIDE, _SHAKER = (
    36, 37, 38, 39, 42, 46, 49, 51, 70,
)  # fmt: skip
_GROOVES = {
    "rock": {_KICK: "X.......X.x.....", _SNARE: "....X.......X...", _CLOSED: "x.o.x.o.x.o.x.o."},
    "disco": {_KICK: "X...X...X...X...", _CLAP: "....X.......X...", _OPEN: "..x...x...x...x.",
              _CLOSED: "x.o.x.o.x.o.x.o."},
    "slow": {_KICK: "X.....x...x.....", _SNARE: "........X.......", _CLOSED: "x.x.x.x.x.x.x.xx"},
    "break": {_KICK: "X.x.......x.x...", _SNARE: "....X..o.o..X..o", _CLOSED: "x.x.x.x.x.x.x.x."},
    "bossa": {_KICK: "X..xX..xX..xX..x", _STICK: "X..x..x...x..x..", _SHAKER: "xoxoxoxoxoxoxoxo"},
    "funk": {_KICK: "X..X..x...X..x..", _SNARE: "....X..o....X.o.", _CLOSED: "xoxoxoxoxoxoxoxo"},
}  # fmt: skip
_FILL = {12: _SNARE, 13: _SNARE, 14: 47, 15: 43}  # the last beat of a section: snare, two toms
_LOUDNESS = {"X": 112, "x": 88, "o": 58}

# Bass patterns: (step, length in steps, scale degrees above the root). None is the note above the
# root of the next bar, and leads there.
_BASS_LINES: dict[str, tuple[tuple[int, int, int | None], ...]] = {
    "eighths": tuple((step, 2, 0 if step < 14 else None) for step in range(0, 16, 2)),
    "root and fifth": ((0, 6, 0), (6, 2, 0), (8, 5, 4), (14, 2, None)),
    "walking": ((0, 4, 0), (4, 4, 2), (8, 4, 4), (12, 4, None)),
    "octaves": tuple((step, 2, 0 if step % 4 == 0 else 7) for step in range(0, 16, 2)),
    "syncopated": ((0, 3, 0), (3, 3, 0), (6, 2, 4), (10, 2, 0), (12, 2, 7), (14, 2, None)),
    "long": ((0, 10, 0), (10, 4, 4), (14, 2, None)),
}
# Accompaniment: (step, length in steps) of each stroke, or an arpeggio.
_STROKES = {
    "sustained": ((0, 15),),
    "quarters": ((0, 3), (4, 3), (8, 3), (12, 3)),
    "offbeats": ((2, 2), (6, 2), (10, 2), (14, 2)),
    "charleston": ((0, 5), (6, 4), (11, 4)),
    "strummed": ((0, 4), (4, 2), (6, 2), (10, 2), (12, 2), (14, 2)),
    "arpeggio": tuple((step, 3) for step in range(0, 16, 2)),
}
# A lead's bar in eighths, as degrees above the root of the chord.
_HOOKS = (
    (0, 2, 4, None, 1, 4, 2, None),
    (4, 2, 3, None, 2, 0, 1, None),
    (4, None, 4, 5, 4, 2, None, None),
)
# Melody rhythms: sixteen eighths (two bars); x begins a syllable, - holds it, . rests.
_VERSE_RHYTHMS = ("x-xxx-x-x---....", "xxx-x-x-x-----..", ".xxxx-x-xx-x--..", "..xxx-xxx-x---..")
_CHORUS_RHYTHMS = ("x---x-x-x-----..", "x--x--x-x--x--..", "x---xxx-x---x-..", "x-x---x-x-----..")

_KITS = (0, 8, 16, 24, 25, 32)
_BASSES = (33, 34, 32, 38, 35, 39, 36)
_CHORDS = ((0, "quarters"), (4, "charleston"), (25, "strummed"), (16, "sustained"),
           (27, "offbeats"), (24, "arpeggio"), (11, "arpeggio"), (7, "charleston"))  # fmt: skip
_PADS_OR_LEADS = ((48, "pad"), (65, "lead"), (89, "pad"), (73, "lead"), (81, "lead"), (50, "pad"),
                  (56, "lead"), (12, "lead"))  # fmt: skip
_WORDS = (("Amber", "Quiet", "Paper", "Northern", "Velvet", "Copper", "Salt", "Second", "Silver"),
          ("Harbour", "Lantern", "Season", "Rooftops", "Signal", "Garden", "Mirrors", "Weather",
           "Engine"))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One MIDI note; on a drum part the pitch is the percussion key."""

    pitch: int
    start_seconds: float
    end_seconds: float
    velocity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One instrument: General MIDI program (of the drum bank for drums), pan (-1..1) and notes."""

    program: int
    is_drum: bool
    pan: float
    notes: tuple[Note, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section of the form: name, first bar, length in bars, and the stems that rest."""

    name: str
    first_bar: int
    num_bars: int
    resting: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Mixing decisions: levels (dB, while a stem is active), pans (-1..1) and one room."""

    levels_db: dict[str, float]
    pans: dict[str, float]
    reverb_db: dict[str, float]
    reverb_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Song:
    """A composed song.

    Attributes
    ----------
    name : str
        Unique in a corpus.
    key : str
        Tonic and mode, such as "Eb dorian".
    scale : tuple of int
        The seven pitch classes that bass, other and vocals use.
    parts : dict
        Instruments of "drums", "bass" and "other"; the vocals are ``melody``, sung by ``voice``.
    """

    name: str
    tempo_bpm: int
    key: str
    scale: tuple[int, ...]
    sections: tuple[Section, ...]
    parts: dict[str, tuple[Part, ...]]
    melody: tuple[Syllable, ...]
    voice: str
    mix: Mix


def compose(seed: int, index: int, seconds: float) -> Song:
    """Compose song number ``index`` of a corpus, at least ``seconds`` long."""
    return _Composer(seed, index, seconds).song()


class _Composer:
    """Shared by all parts of a song: random numbers, tempo, key, chords and form."""

    def __init__(self, seed: int, index: int, seconds: float) -> None:
        self.seed, self.index = seed, index
        self.rng = np.random.default_rng([seed, index])
        self.tempo_bpm = int(self.rng.integers(84, 137))
        self.step_seconds = 60 / self.tempo_bpm / 4
        self.swing = self.turn("swing", (0.0, 0.0, 0.25, 0.0, 0.15))
        self.num_bars = max(2, math.ceil(seconds / (STEPS_PER_BAR * self.step_seconds)))
        self.tonic = int(self.rng.integers(12))
        self.mode = self.turn("mode", tuple(MODES))
        progressions = _PROGRESSIONS[self.mode]
        first, second = self.rng.permutation(len(progressions))[:2]
        self.progressions: dict[str, tuple[int, ...]] = {
            "chorus": progressions[int(second)],
            "verse": progressions[int(first)],
        }
        self.sections = self._form()

    def turn(self, what: str, choices: Sequence[T]) -> T:
        """Choose in turn over the songs, in a new order each round, for variety."""
        round_, place = divmod(self.index, len(choices))
        order = np.random.default_rng([self.seed, zlib.crc32(what.encode()), round_])
        return choices[int(order.permutation(len(choices))[place])]

    def choose(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    def seconds_at(self, bar: int, step: float) -> float:
        # Swing delays every second sixteenth.
        late = self.swing if step % 2 == 1 else 0.0
        return (bar * STEPS_PER_BAR + step + late) * self.step_seconds

    def note(self, pitch: int, bar: int, step: float, length: float, velocity: float) -> Note:
        """Place a note with the slight unevenness of a player."""
        start = max(0.0, self.seconds_at(bar, step) + self.rng.normal(0, 0.004))
        loudness = int(np.clip(velocity + self.rng.normal(0, 5), 20, 127))
        end = start + length * self.step_seconds * 0.95
        return Note(pitch=pitch, start_seconds=start, end_seconds=end, velocity=loudness)

    def pitch(self, degree: int, octave: int) -> int:
        """Return the MIDI note of a scale degree (0: tonic; 7: one octave above)."""
        return 12 * (octave + 1 + degree // 7) + self.tonic + MODES[self.mode][degree % 7]

    def chord(self, section: Section, bar: int) -> int:
        progression = self.progressions["chorus" if section.name == "chorus" else "verse"]
        return progression[(bar - section.first_bar) % len(progression)]

    def bars(self, stem: str) -> list[tuple[Section, int]]:
        """Return the bars in which a stem plays, each with its section."""
        return [
            (section, bar)
            for section in self.sections
            if stem not in section.resting
            for bar in range(section.first_bar, section.first_bar + section.num_bars)
        ]

    def _form(self) -> tuple[Section, ...]:
        """Lay out an intro and rounds of verse, chorus and break, cut to the number of bars."""
        long = 4 if self.num_bars >= 10 else 2 if self.num_bars >= 5 else 1
        short = max(1, long // 2)
        intro = ("vocals", *self.turn("intro", ((), ("drums",), ("bass",), ("drums", "bass"))))
        rests = (("drums",), ("drums", "bass"), ("bass",), ("other",), ("vocals", "other"))
        sections = [Section(name="intro", first_bar=0, num_bars=short, resting=intro)]
        bar = short
        for name, length in itertools.cycle((("verse", long), ("chorus", long), ("break", short))):
            resting = self.choose(rests) if name == "break" else ()
            length = min(length, self.num_bars - bar)
            sections.append(Section(name=name, first_bar=bar, num_bars=length, resting=resting))
            bar += length
            if bar == self.num_bars:
                break
        return tuple(sections)

    def song(self) -> Song:
        title = " ".join(self.turn(words[0], words) for words in _WORDS)
        voice = self.turn("voice", tuple(VOICES))
        return Song(
            name=f"Demo {self.index + 1:02d} - {title}",
            tempo_bpm=self.tempo_bpm,
            key=f"{_NOTE_NAMES[self.tonic]} {self.mode}",
            scale=tuple(sorted((self.tonic + step) % 12 for step in MODES[self.mode])),
            sections=self.sections,
            parts={"drums": self._drums(), "bass": self._bass(), "other": self._other()},
            melody=self._melody(voice),
            voice=voice,
            mix=self._mix(),
        )

    def _drums(self) -> tuple[Part, ...]:
        groove = _GROOVES[self.turn("groove", tuple(_GROOVES))]
        notes = []
        for section, bar in self.bars("drums"):
            filled = section.num_bars > 1 and bar == section.first_bar + section.num_bars - 1
            if bar == section.first_bar and section.name in ("verse", "chorus"):
                notes.append(self.note(_CRASH, bar, 0, 4, 100))
            for key, pattern in groove.items():
                ridden = _RIDE if key == _CLOSED and section.name == "chorus" else key
                for step, mark in enumerate(pattern):
                    if mark != "." and not (filled and step in _FILL):
                        notes.append(self.note(ridden, bar, step, 1, _LOUDNESS[mark]))
            if filled:
                notes += [self.note(key, bar, step, 1, 100) for step, key in _FILL.items()]
        return (Part(program=self.turn("kit", _KITS), is_drum=True, pan=0.0, notes=tuple(notes)),)

    def _bass(self) -> tuple[Part, ...]:
        line = _BASS_LINES[self.turn("bass line", tuple(_BASS_LINES))]
        lowest = 28  # E1

        def root_degree(chord: int) -> int:
            """Return the lowest degree (octave 1) that the lowest string can play."""
            return min(d for d in (chord - 7, chord, chord + 7) if self.pitch(d, 1) >= lowest)

        notes = []
        playing = self.bars("bass")
        for place, (section, bar) in enumerate(playing):
            root = root_degree(self.chord(section, bar))
            following = root_degree(self.chord(*playing[(place + 1) % len(playing)]))
            for step, length, interval in line:
                degree = following + 1 if interval is None else root + interval
                accent = 104 if step % 8 == 0 else 92
                notes.append(self.note(self.pitch(degree, 1), bar, step, length, accent))
        program = self.turn("bass", _BASSES)
        return (Part(program=program, is_drum=False, pan=0.0, notes=tuple(notes)),)

    def _other(self) -> tuple[Part, ...]:
        side = self.choose((-1, 1))
        program, strokes = self.turn("chords", _CHORDS)
        notes = []
        for section, bar in self.bars("other"):
            voicing = self._voicing(self.chord(section, bar))
            for place, (step, length) in enumerate(_STROKES[strokes]):
                if strokes == "arpeggio":
                    up_and_down = (0, 1, 2, 3, 2, 1)[place % 6]
                    struck = [voicing[up_and_down] if up_and_down < 3 else voicing[0] + 12]
                else:
                    struck = voicing
                velocity = 88 if step % 8 == 0 else 78
                notes += [self.note(pitch, bar, step, length, velocity) for pitch in struck]
        chords = Part(
            program=program,
            is_drum=False,
            pan=side * self.rng.uniform(0.2, 0.5),
            notes=tuple(notes),
        )
        return (chords, self._second(-side * self.rng.uniform(0.3, 0.7)))

    def _second(self, pan: float) -> Part:
        """Write the second instrument: a pad under the choruses, or a lead between the vocals."""
        program, role = self.turn("second", _PADS_OR_LEADS)
        # Keep the instrument in one register whatever the key.
        octave = 4 if self.tonic < 7 else 3
        hook = self.choose(_HOOKS)
        notes = []
        for section, bar in self.bars("other"):
            chord = self.chord(section, bar)
            if role == "pad" and section.name in ("chorus", "break", "intro"):
                pitches = [pitch + 12 for pitch in self._voicing(chord)]
                notes += [self.note(pitch, bar, 0, 15.5, 74) for pitch in pitches]
            elif role == "lead" and "vocals" in section.resting:
                for place, degree in enumerate(hook):
                    if degree is not None:
                        pitch = self.pitch(chord + degree, octave)
                        notes.append(self.note(pitch, bar, 2 * place, 1.9, 92))
            elif role == "lead" and (bar - section.first_bar) % 2 == 1:  # answer the singer
                for place, degree in enumerate((chord + 4, chord + 2)):
                    pitch = self.pitch(degree, octave)
                    notes.append(self.note(pitch, bar, 12 + 2 * place, 1.9, 88))
        return Part(program=program, is_drum=False, pan=pan, notes=tuple(notes))

    def _voicing(self, chord: int) -> list[int]:
        """Return the triad on a degree in close position around middle C."""
        tones = [self.pitch(chord + third, 3) for third in (0, 2, 4)]
        return sorted((tone - 53) % 12 + 53 for tone in tones)

    def _melody(self, voice: str) -> tuple[Syllable, ...]:
        singer = VOICES[voice]
        degrees = [d for d in range(70) if singer.lowest <= self.pitch(d, -1) <= singer.highest]
        rhythms = {
            "chorus": [self.choose(_CHORUS_RHYTHMS) for _ in range(2)],
            "verse": [self.choose(_VERSE_RHYTHMS) for _ in range(2)],
        }
        melody: list[Syllable] = []
        for section in self.sections:
            if "vocals" in section.resting:
                continue
            high = section.name == "chorus"
            place = middle = round(len(degrees) * (0.6 if high else 0.4))
            for phrase, first_bar in enumerate(range(0, section.num_bars, 2)):
                rhythm = rhythms["chorus" if high else "verse"][phrase % 2]
                num_eighths = min(16, 8 * (section.num_bars - first_bar))
                for start, length in _syllables(rhythm[:num_eighths]):
                    bar = section.first_bar + first_bar + start // 8
                    # Drift back to the middle of the voice, and land on chord tones on the beat.
                    leap = self.choose((0, 1, 1, 1, 2, 2, 3))
                    place += leap if place < self.rng.uniform(0.5, 1.5) * middle else -leap
                    place = int(np.clip(place, 0, len(degrees) - 1))
                    if start % 4 == 0 or length > 2:
                        place = _nearest_tone(degrees, place, self.chord(section, bar))
                    melody.append(
                        Syllable(
                            pitch=self.pitch(degrees[place], -1),
                            start_seconds=self.seconds_at(bar, 2 * (start % 8)),
                            end_seconds=self.seconds_at(bar, 2 * (start % 8 + length) - 0.3),
                            consonant=self.choose(tuple(CONSONANTS)),
                            vowel=self.choose(VOWELS),
                            velocity=int(self.rng.integers(100, 120) if high else 95),
                        )
                    )
        return tuple(melody)

    def _mix(self) -> Mix:
        uniform = self.rng.uniform
        return Mix(
            levels_db={
                "drums": uniform(-2.5, 0.5),
                "bass": uniform(-4, -0.5),
                "other": uniform(-4, 0),
                "vocals": uniform(-1, 1.5),
            },
            pans={"drums": uniform(-0.1, 0.1), "bass": uniform(-0.08, 0.08), "other": 0.0,
                  "vocals": uniform(-0.15, 0.15)},
            reverb_db={"drums": uniform(-24, -16), "bass": uniform(-32, -26),
                       "other": uniform(-20, -12), "vocals": uniform(-18, -10)},
            reverb_seconds=uniform(0.5, 1.6),
        )  # fmt: skip


def _syllables(rhythm: str) -> list[tuple[int, int]]:
    """Return (start, length) in eighths of each syllable of a rhythm.

    >>> _syllables("x-x..x--")
    [(0, 2), (2, 1), (5, 3)]
    """
    starts = [place for place, mark in enumerate(rhythm) if mark == "x"]
    held = [len(rhythm[start + 1 :]) - len(rhythm[start + 1 :].lstrip("-")) for start in starts]
    return [(start, 1 + more) for start, more in zip(starts, held, strict=True)]


def _nearest_tone(degrees: list[int], place: int, chord: int) -> int:
    """Return the place closest to ``place`` whose degree is in the triad on ``chord``."""
    tones = [p for p, degree in enumerate(degrees) if (degree - chord) % 7 in (0, 2, 4)]
    return min(tones, key=lambda tone: abs(tone - place))
