"""The docs name every command, match the code, and what they show works."""

import importlib.util
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import click
import h5py
import numpy as np
import pytest

from flsep.cache import Layout, ShardFile, ShardWriter, TrackPlan, build_index, write_index
from flsep.cache.format import track_datasets
from flsep.trainer.approaches.interface import require_possible
from flsep.trainer.cli import CONFIG_OPTIONS
from flsep.trainer.config import TrainConfig
from flsep.trainer.recipes import resolve_config
from flsep.trainer.registry import APPROACHES, SEPARATORS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
)
GENERATED = ("cli.md", "config.md")
FORMAT = DOCS / "reference" / "shard-format.md"


def _load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("flsep_docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generator = _load_generator()
COMMANDS: dict[str, click.Command] = {
    name: command
    for program, root in generator.PROGRAMS.items()
    for name, command in generator.walk(program, root)
}
LEAVES = [name for name, command in COMMANDS.items() if not isinstance(command, click.Group)]


def read_blocks(page: Path, language: str) -> list[str]:
    """Return the fenced code blocks of a language, dedented."""
    fenced = re.findall(
        rf"^([ ]*)```{language}\n(.*?)^[ ]*```$", page.read_text(), re.MULTILINE | re.DOTALL
    )
    return [re.sub(rf"^{indent}", "", body, flags=re.MULTILINE) for indent, body in fenced]


def read_scripts(page: Path) -> list[str]:
    """Return what a reader may type: blocks of shell, and indented code."""
    outside = re.sub(r"^[ ]*```.*?^[ ]*```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    indented = [line[4:] for line in outside.splitlines() if line.startswith("    ")]
    return [*read_blocks(page, "sh"), "\n".join(indented)]


def find_commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each call of one of the programs in a shell script."""
    script = re.sub(r"\$\{?\w+\}?", "1", script.replace("\\\n", " "))
    for line in script.splitlines():
        if "flsep-" not in line:
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(lexer.punctuation_chars):
                programs = [Path(w).name in generator.PROGRAMS for w in words]
                if True in programs:
                    start = programs.index(True)
                    yield [Path(words[start]).name, *words[start + 1 :]]
                words = []
            else:
                words.append(word)


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Let click parse a call, without running it; return the command's name and its parameters."""
    name, rest = words[0], words[1:]
    while isinstance(COMMANDS[name], click.Group) and rest and not rest[0].startswith("-"):
        name, rest = f"{name} {rest[0]}", rest[1:]
        assert name in COMMANDS, f"there is no command {name!r}"
    with COMMANDS[name].make_context(name, rest) as context:
        return name, context.params


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_match_the_code(name: str) -> None:
    stored = (DOCS / "reference" / name).read_text()
    assert stored == generator.render()[name], "run `make docs` (python docs/generate.py)"


def test_every_setting_is_explained() -> None:
    text = (DOCS / "reference" / "config.md").read_text()
    configs = [TrainConfig().with_approach(name) for name in APPROACHES]
    configs += [TrainConfig().with_separator(name) for name in SEPARATORS]
    known = {
        f"{section}.{field}"
        for config in configs
        for section, values in config.to_json().items()
        for field in values
    }
    for field in known:
        assert f"`{field}`" in text
    options = {o for p in COMMANDS["flsep-precompute run"].params for o in p.opts}
    assert set(generator.OPTIONS.values()) <= options
    listed = re.findall(r"^\| `(--[\w-]+)` \| `([\w.]+)` \|$", text, re.MULTILINE)
    assert dict(listed) == {
        f"--{option.replace('_', '-')}": field for option, field in CONFIG_OPTIONS.items()
    }
    fit_options = {o for p in COMMANDS["flsep-train fit"].params for o in p.opts}
    for option, field in listed:
        assert option in fit_options
        assert field in known


@pytest.mark.parametrize("name", LEAVES)
def test_each_command_is_documented(name: str) -> None:
    assert f"### {name}\n" in (DOCS / "reference" / "cli.md").read_text()
    shown = {
        parse(words)[0]
        for page in (DOCS / "tutorial.md", DOCS / "howto.md")
        for script in read_scripts(page)
        for words in find_commands(script)
    }
    assert name in shown, "neither the tutorial nor the how-to shows it"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_command_lines_parse(page: Path) -> None:
    for script in read_scripts(page):
        for words in find_commands(script):
            name, values = parse(words)
            if name == "flsep-train fit":
                chosen = [
                    f"{field}={values[option]}"
                    for option, field in CONFIG_OPTIONS.items()
                    if values[option] is not None
                ]
                settings = [*chosen, *values["settings"]]
                require_possible(resolve_config(values["recipe"], settings))


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_parse(name: str) -> None:
    for line in inspect.cleandoc(COMMANDS[name].help or "").splitlines():
        if line.strip().startswith(tuple(generator.PROGRAMS)):
            for words in find_commands(line):
                parse(words)


@pytest.mark.parametrize(
    "line",
    [
        "flsep-train fit shards --run r --no-such-option",
        "flsep-train fit shards",
        "flsep-train fit shards --run r --approach concatenate",
        "x=1; srun flsep-precompute run corpus shards --workers many | tee log",
    ],
)
def test_a_wrong_line_is_noticed(line: str) -> None:
    (words,) = find_commands(line)
    with pytest.raises(click.UsageError):
        parse(words)


def test_call_in_a_script_is_found() -> None:
    script = 'for a in 1; do\n  srun .venv/bin/flsep-train fit "$X" \\\n --run r-${a}; done > log'
    assert list(find_commands(script)) == [["flsep-train", "fit", "1", "--run", "r-1"]]


def _slugs(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page: Path) -> None:
    text = re.sub(r"^[ ]*```.*?^[ ]*```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in _slugs(file), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_blocks_compile(page: Path) -> None:
    for block in read_blocks(page, "python"):
        compile(block, page.name, "exec")


def test_generated_reference_is_linked() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in DOCS.rglob("*.md"):
        assert page_id(page) in readme, "README.md does not link it"


LAYOUT = Layout(
    sample_rate_hz=8000,
    num_channels=2,
    n_fft=64,
    hop_samples=16,
    stft_dtype="float16",
    sources=("bass", "voice"),
    teacher="tiny",
    teacher_digest="0" * 64,
    embedding_size=3,
    window_seconds=0.02,
    window_hop_seconds=0.02,
)
NAME = "Ünder / the bridge"


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    datasets = track_datasets(LAYOUT, num_samples=400, num_windows=2, with_audio=True)
    shapes = {name: dataset.shape for name, dataset in datasets.items()}
    return {
        "stft": rng.standard_normal(shapes["stft"]).astype(np.float16),
        "embedding": rng.standard_normal(shapes["embedding"]).astype(np.float32),
        "activity": np.float32([[-10, -20], [-30, -61], [-120, -5]]),
        "magnitude_moments": rng.uniform(1, 2, shapes["magnitude_moments"]),
        "audio": rng.integers(-30000, 30000, shapes["audio"]).astype(np.float32) / 32768,
    }


@pytest.fixture
def folder(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    plan = TrackPlan(name=NAME, split="train", num_samples=400, num_windows=2, with_audio=True)
    path = tmp_path / "only.h5"
    with ShardWriter(path, LAYOUT, [plan], config={"a": 1.0}, packages={}) as shard:
        (track,) = shard.tracks
        for signal in range(3):
            track.append("stft", signal, arrays["stft"][signal])
            track.append_embedding(signal, arrays["embedding"][signal], arrays["activity"][signal])
            track.append_audio(signal, arrays["audio"][signal])
        for entry in range(2):
            track.append("magnitude_moments", entry, arrays["magnitude_moments"][entry])
    write_index(tmp_path, build_index([ShardFile(path)]))
    return tmp_path


@pytest.fixture
def format_code() -> dict[str, Any]:
    """What the page of the format defines."""
    names: dict[str, Any] = {}
    (block,) = read_blocks(FORMAT, "python")
    exec(compile(block, FORMAT.name, "exec"), names)
    return names


def test_format_reader_reads(
    folder: Path, arrays: dict[str, np.ndarray], format_code: dict[str, Any]
) -> None:
    read = format_code["read_signal"]
    for number, signal in enumerate(LAYOUT.signals):
        spectrum = (
            arrays["stft"][number, ..., 0] + np.complex64(1j) * arrays["stft"][number, ..., 1]
        )
        assert read(folder, NAME, "stft", signal).dtype == np.complex64
        np.testing.assert_array_equal(read(folder, NAME, "stft", signal), spectrum)
        for name in ("embedding", "activity", "audio"):
            np.testing.assert_array_equal(read(folder, NAME, name, signal), arrays[name][number])


def test_format_reader_notices_an_altered_byte(folder: Path, format_code: dict[str, Any]) -> None:
    path = folder / "only.h5"
    place = ShardFile(path).tracks[0].datasets["embedding"].offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"embedding of mixture .* is altered"):
        format_code["read_signal"](folder, NAME, "embedding", "mixture")
    format_code["read_signal"](folder, NAME, "embedding", "voice")


def test_format_page_defines_the_digests(folder: Path, format_code: dict[str, Any]) -> None:
    (track,) = ShardFile(folder / "only.h5").tracks
    stated = {
        "audio_scale": [1 / 32768] * 3,
        "datasets": {name: list(stored.sha256) for name, stored in track.datasets.items()},
        "track": [NAME, "train", 400, 2],
    }
    assert format_code["fingerprint"](stated) == track.digest


def test_format_page_names_everything(folder: Path) -> None:
    text = FORMAT.read_text()
    index = json.loads((folder / "index.json").read_bytes())
    names = {*index, *index["tracks"][0], *index["layout"]}
    with h5py.File(folder / "only.h5") as file:
        names |= set(file.attrs) | set(file["track-00000"].attrs)
        for name, dataset in file["track-00000"].items():
            names |= {name, *dataset.attrs}
            assert f"| `{name}` | {dataset.dtype.name}" in text
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
    statistics = re.findall(r"^(\w+)\[.*?\] += ", text, re.MULTILINE)
    assert statistics == list(index["statistics"])


def test_format_page_states_the_windows() -> None:
    (formula,) = re.findall(r"```text\n(first\(w\).*?)```", FORMAT.read_text(), re.DOTALL)
    lines = dict(re.split(r"\(w\)\s+= ", line) for line in formula.splitlines())
    layout = Layout(**{**LAYOUT.to_json(), "sources": LAYOUT.sources, "window_seconds": 0.027})
    known = {"ceil": ceil, "H": 0.02, "L": 0.027, "R": 8000, "hop_samples": 16}
    for window in range(500):
        expected = tuple(eval(lines[end], {**known, "w": window}) for end in ("first", "last"))
        assert layout.window_frames(window) == expected
