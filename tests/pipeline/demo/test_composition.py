import dataclasses

import pytest

from flsep.pipeline.demo.composition import MODES, Song, _nearest_tone, _syllables, compose
from flsep.pipeline.demo.voice import VOICES

SEEDS_AND_INDICES = [(seed, index) for seed in (0, 7) for index in range(14)]
HUMAN_SECONDS = 0.03  # notes are placed a little unevenly


@pytest.fixture(scope="module")
def songs() -> list[Song]:
    return [compose(seed, index, 24.0) for seed, index in SEEDS_AND_INDICES]


def bar_seconds(song: Song) -> float:
    return 4 * 60 / song.tempo_bpm


def pitched_notes(song: Song) -> list[int]:
    return [n.pitch for stem in ("bass", "other") for p in song.parts[stem] for n in p.notes] + [
        syllable.pitch for syllable in song.melody
    ]


def test_every_pitched_note_lies_in_the_scale_of_the_key(songs):
    for song in songs:
        pitch_classes = {pitch % 12 for pitch in pitched_notes(song)}
        assert pitch_classes <= set(song.scale), song.key
        assert len(pitch_classes) >= 6, "a key that is hardly used proves nothing"
    for song in songs:
        tonic, mode = song.key.split()
        names = ("C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B")
        expected = {(names.index(tonic) + step) % 12 for step in MODES[mode]}
        assert set(song.scale) == expected


def test_the_form_covers_the_song_without_gaps_and_starts_without_vocals(songs):
    for song in songs:
        assert song.sections[0].name == "intro"
        assert "vocals" in song.sections[0].resting
        assert {section.name for section in song.sections} >= {"intro", "verse", "chorus"}
        bar = 0
        for section in song.sections:
            assert section.first_bar == bar
            assert section.num_bars >= 1
            bar += section.num_bars
        assert (bar - 1) * bar_seconds(song) < 24 <= bar * bar_seconds(song) + 1e-9


def test_stems_rest_where_the_form_says_so_and_play_elsewhere(songs):
    for song in songs:
        onsets = {
            stem: [note.start_seconds for part in parts for note in part.notes]
            for stem, parts in song.parts.items()
        }
        onsets["vocals"] = [syllable.start_seconds for syllable in song.melody]
        for section in song.sections:
            first = section.first_bar * bar_seconds(song)
            last = first + section.num_bars * bar_seconds(song)
            for stem, times in onsets.items():
                playing = any(first - HUMAN_SECONDS < t < last - HUMAN_SECONDS for t in times)
                assert playing == (stem not in section.resting), (song.name, section, stem)


def test_bass_plays_the_root_of_the_chord_at_the_start_of_a_bar(songs):
    song = songs[0]
    chords = next(part for part in song.parts["other"])
    triads = {}  # bar -> pitch classes of the accompaniment
    for note in chords.notes:
        bar = int((note.start_seconds + HUMAN_SECONDS) // bar_seconds(song))
        triads.setdefault(bar, set()).add(note.pitch % 12)
    checked = 0
    for note in song.parts["bass"][0].notes:
        place, off = divmod(note.start_seconds + HUMAN_SECONDS, bar_seconds(song))
        if off < 2 * HUMAN_SECONDS and place in triads:
            checked += 1
            assert note.pitch % 12 in triads[int(place)]
    assert checked >= 4


def test_melodies_stay_in_the_voice_and_rest_between_phrases(songs):
    for song in songs:
        voice = VOICES[song.voice]
        assert all(voice.lowest <= syllable.pitch <= voice.highest for syllable in song.melody)
        gaps = [
            after.start_seconds - before.end_seconds
            for before, after in zip(song.melody, song.melody[1:], strict=False)
        ]
        assert min(gaps) > 0
        assert max(gaps) > 0.2
        assert len({syllable.pitch for syllable in song.melody}) >= 4


def test_a_corpus_is_varied(songs):
    corpus = songs[:14]
    assert {song.voice for song in corpus} == set(VOICES)
    assert {song.key.split()[1] for song in corpus} == set(MODES)
    assert len({song.tempo_bpm for song in corpus}) >= 8
    assert len({song.name for song in corpus}) == 14
    for stem, kinds in (("drums", 5), ("bass", 5), ("other", 7)):
        assert len({song.parts[stem][0].program for song in corpus}) >= kinds
    assert len({(song.voice, song.key.split()[1]) for song in corpus}) > 4, "not in lockstep"


def test_the_same_seed_and_index_give_the_same_song():
    assert compose(3, 5, 24.0) == compose(3, 5, 24.0)
    first, other_index, other_seed = compose(3, 5, 24.0), compose(3, 6, 24.0), compose(4, 5, 24.0)
    for other in (other_index, other_seed):
        assert first.melody != other.melody
        assert first.parts != other.parts


@pytest.mark.parametrize("seconds", [4.0, 9.0, 90.0])
def test_short_and_long_songs_have_vocals_and_an_intro(seconds):
    for index in range(8):
        song = compose(1, index, seconds)
        assert any(syllable.start_seconds < seconds - 0.3 for syllable in song.melody)
        assert song.melody[0].start_seconds >= bar_seconds(song)
        assert all(note.end_seconds > note.start_seconds >= 0 for part in song.parts["bass"]
                   for note in part.notes)  # fmt: skip


def test_songs_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        compose(0, 0, 4.0).tempo_bpm = 3


def test_rhythms_are_read_as_syllables():
    assert _syllables("x-x..x--") == [(0, 2), (2, 1), (5, 3)]
    assert _syllables("....") == []


def test_nearest_chord_tone():
    # Degrees 0..6 of one octave; the triad on degree 1 is 1, 3, 5.
    assert _nearest_tone(list(range(7)), 6, 1) == 5
    assert _nearest_tone(list(range(7)), 3, 1) == 3
    assert _nearest_tone(list(range(7)), 0, 1) == 1
