"""Who may import what: read from the source, and seen in processes that import it."""

import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import (
    PACKAGES,
    ROOT,
    build_graph,
    find_cycle,
    find_imports,
    find_longest_chain,
    list_files,
    name_module,
    read_imports,
)

TENSORFLOW = {"tensorflow", "tensorflow_hub"}
DASK = {"dask", "dask_jobqueue", "distributed"}
SCORING = {"museval", "norbert", "stempeg"}
HEAVY = {*TENSORFLOW, *DASK, *SCORING, "keras", "librosa", "scipy", "tensorboard", "torch"}
# The only import of the pipeline in the trainer: inside a function, for use where it is installed.
LAZY_PIPELINE = ("trainer/inference/embedder.py", "flsep.pipeline.teachers")
# Names of distributions that differ from what is imported.
DISTRIBUTIONS = {
    "tensorflow_hub": "tensorflow-hub",
    "distributed": "dask",
    "dask_jobqueue": "dask-jobqueue",
}
EXTRAS = {
    "cache": (),
    "pipeline": ("pipeline", "cluster", "demo"),
    "trainer": ("trainer", "evaluate"),
}
# A room is a folder; `cli` and `verify` are files that stand above the rooms. A room may import the
# rooms that are listed for it, what those may import, and the ground; nothing else. The diagram in
# docs/architecture.md shows the same arrows.
ROOMS = {
    "pipeline": {
        "cli": ("commands",),
        "commands": ("shards", "mixes", "demo"),
        "shards": ("corpus", "teachers", "execution"),
        "mixes": ("teachers", "execution"),
        "corpus": (),
        "teachers": (),
        "execution": (),
        "demo": (),
    },
    "trainer": {
        "cli": ("study", "training"),
        "study": ("scoring",),
        "scoring": ("inference",),
        "training": ("runs", "data"),
        "inference": ("runs",),
        "runs": ("approaches",),
        "approaches": ("separators",),
        "separators": (),
        "data": (),
    },
    "cache": {
        "verify": ("mixes",),
        "mixes": ("shards",),
        "shards": (),
    },
}
# Files that all rooms of a package may import, and that import no room.
GROUND = {
    "pipeline": {"config", "features", "packages", "stopwatch", "errors"},
    "trainer": {
        *("config", "settings", "recipes", "registry", "parallel", "teacher", "stft", "errors"),
    },
    "cache": {"commands", "errors", "files", "format", "hdf5", "memory", "sealed"},
}

ALL_IMPORTS = read_imports()
IMPORTS = [found for found in ALL_IMPORTS if found.kind != "typing"]


def importers(*modules: str) -> set[str]:
    """Return the packages that import one of these modules."""
    return {found.package for found in IMPORTS if found.root in modules}


def test_imports_are_found() -> None:
    source = """
import a.b, c
from d.e import f
from flsep import cache
if TYPE_CHECKING:
    import g
def function():
    import h
    importlib.import_module("flsep.pipeline.teachers.loading")
    importlib.import_module(name)
from . import i
"""
    assert {(found.module, found.kind) for found in find_imports(source, "x.py")} == {
        ("a.b", "module"),
        ("c", "module"),
        ("d.e", "module"),
        ("flsep.cache", "module"),
        ("g", "typing"),
        ("h", "function"),
        ("flsep.pipeline.teachers.loading", "function"),
        (".", "module"),
    }
    assert {found.package for found in IMPORTS} == set(PACKAGES)


def test_members_are_resolved_to_their_modules(tmp_path: Path) -> None:
    for package in PACKAGES:
        (tmp_path / package / "room").mkdir(parents=True)
    (tmp_path / "cache" / "reader.py").write_text("Shards = 1\n")
    (tmp_path / "cache" / "__init__.py").write_text("from flsep.cache.reader import Shards\n")
    lines = "from flsep.cache import Shards, reader\nfrom flsep.trainer.room import table\n"
    (tmp_path / "trainer" / "cli.py").write_text(lines)
    (tmp_path / "trainer" / "room" / "__init__.py").write_text("")
    (tmp_path / "trainer" / "room" / "table.py").write_text("")
    graph = build_graph(read_imports(tmp_path))
    assert graph["flsep.trainer.cli"] == {
        "flsep.cache",
        "flsep.cache.reader",
        "flsep.trainer.room.table",
    }
    assert graph["flsep.cache"] == {"flsep.cache.reader"}


def test_levels_are_counted() -> None:
    graph = {
        "flsep.cache": {"flsep.cache.a"},
        "flsep.cache.a": {"flsep.cache.b", "flsep.cache.d", "flsep.trainer.x"},
        "flsep.cache.b": {"flsep.cache.c"},
        "flsep.cache.c": {"flsep.cache.b", "flsep.cache.d"},
        "flsep.trainer.x": {"flsep.cache.a"},
    }
    chain = find_longest_chain(graph, "cache")
    names = ["flsep.cache", "flsep.cache.a", "flsep.cache.b", "flsep.cache.c", "flsep.cache.d"]
    assert chain == [names[:1], names[1:2], names[2:4], names[4:]]
    assert find_cycle(graph) != []
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_import_cycle() -> None:
    # Imports inside functions and for typing count: a cycle hides just as well behind them.
    assert find_cycle(build_graph(ALL_IMPORTS)) == []


def name_room(module: str) -> tuple[str, str]:
    """Return the package and the room of a module of flsep, or the file if it lies in no room."""
    _, package, *rest = module.split(".")
    return package, rest[0] if rest else "__init__"


def list_rooms_below(package: str, room: str) -> set[str]:
    """Return the rooms that a room may import."""
    below: set[str] = set()
    for lower in ROOMS[package][room]:
        below |= {lower, *list_rooms_below(package, lower)}
    return below


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_are_those_of_the_tree(package: str) -> None:
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / package).glob("*.py")}
    assert set(ROOMS[package]) <= folders | files
    assert folders | files <= {*ROOMS[package], *GROUND[package], "__init__"}
    tested = {path.name for path in (ROOT / "tests" / package).iterdir() if path.is_dir()}
    assert tested - {"__pycache__"} == folders, "tests/ mirrors the rooms"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_downward_only(package: str) -> None:
    for found in ALL_IMPORTS:
        if found.package != package or not found.module.startswith(f"flsep.{package}."):
            continue
        (_, room), (_, target) = name_room(found.importer), name_room(found.module)
        if room == "__init__":
            continue  # it gathers what others import from the package
        allowed = set(GROUND[package])
        if room in ROOMS[package]:
            allowed |= {room, *list_rooms_below(package, room)}
        assert target in allowed, f"{found.file} may not import {found.module}"


def test_data_and_separators_do_not_meet() -> None:
    for room, other in (("data", "separators"), ("separators", "data")):
        assert other not in list_rooms_below("trainer", room)


def test_imports_are_absolute() -> None:
    assert [found for found in IMPORTS if found.module.startswith(".")] == []


def test_cache_imports_numpy_and_h5py_alone() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "h5py"}
    for found in IMPORTS:
        if found.package == "cache" and (found.file, found.root) != ("cache/commands.py", "click"):
            assert found.module.startswith("flsep.cache") or found.root in allowed, found


def test_siblings_do_not_import_each_other() -> None:
    crossing = [
        found
        for found in ALL_IMPORTS
        if found.root == "flsep" and name_room(found.module)[0] not in (found.package, "cache")
    ]
    file, room = LAZY_PIPELINE
    for found in crossing:
        assert (found.file, found.kind) == (file, "function"), found
        assert found.module.startswith(f"{room}."), found
    assert len(crossing) == 1


def test_each_heavy_package_has_one_home() -> None:
    assert importers(*TENSORFLOW) == {"pipeline"}
    assert importers(*DASK) == {"pipeline"}
    assert importers("librosa") == {"pipeline"}
    assert importers("torch", "safetensors") == {"trainer"}
    homes = {found.file for found in IMPORTS if found.root in DASK}
    assert homes == {"pipeline/execution/cluster.py", "pipeline/execution/runners.py"}


@pytest.mark.parametrize("module", sorted({*TENSORFLOW, *DASK, *SCORING, "librosa", "tensorboard"}))
def test_imported_inside_functions_only(module: str) -> None:
    assert [found for found in IMPORTS if found.root == module and found.kind == "module"] == []


def test_every_import_is_declared() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def names(requirements: str) -> set[str]:
        lines = [line for line in requirements.split("\n") if line and not line.startswith("#")]
        return {re.split(r"[\[<>=~!; ]", line, maxsplit=1)[0].lower() for line in lines}

    core = names(setup["options"]["install_requires"])
    for found in IMPORTS:
        if found.root in sys.stdlib_module_names or found.root == "flsep":
            continue
        declared = core.union(
            *(names(setup["options.extras_require"][extra]) for extra in EXTRAS[found.package])
        )
        assert DISTRIBUTIONS.get(found.root, found.root) in declared, found


def list_modules(package: str) -> list[str]:
    """Return the full names of the modules of a package."""
    return [name_module(path) for path in list_files() if path.parts[0] == package]


def loaded_by(code: str) -> set[str]:
    """Run code in a new interpreter; return the heavy packages that it has loaded."""
    report = "\nimport sys\nprint('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    return HEAVY.intersection(line.split())


def test_loaded_packages_are_seen() -> None:
    assert loaded_by("import scipy.fft") == {"scipy"}


def test_cache_loads_nothing_heavy() -> None:
    assert loaded_by(f"import {', '.join(list_modules('cache'))}") == set()


def test_trainer_loads_torch_alone() -> None:
    assert loaded_by(f"import {', '.join(list_modules('trainer'))}") == {"torch"}


def test_event_log_does_not_load_tensorflow(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from flsep.trainer.runs.folder import EventLog\n"
        f"with EventLog(Path({str(tmp_path)!r}), 0) as log:\n"
        "    log.add(0, {'loss': 1.0})"
    )
    assert loaded_by(code) == {"tensorboard"}


@pytest.mark.parametrize(
    "program", ["flsep.pipeline.cli.cli", "flsep.trainer.cli.main"], ids=["precompute", "train"]
)
def test_help_loads_nothing_heavy(program: str) -> None:
    module, _, function = program.rpartition(".")
    code = (
        f"import click\nfrom {module} import {function} as root\n"
        "def show(command, *names):\n"
        "    root.main([*names, '--help'], standalone_mode=False)\n"
        "    for name in getattr(command, 'commands', {}):\n"
        "        show(command.commands[name], *names, name)\n"
        "show(root)"
    )
    assert loaded_by(code) == set()


def test_verify_and_inspect_load_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import numpy as np
from flsep.cache import Layout, ShardFile, ShardWriter, TrackPlan, build_index, write_index
from flsep.pipeline.cli import cli

folder = Path({str(tmp_path)!r})
layout = Layout(
    sample_rate_hz=8000, num_channels=1, n_fft=8, hop_samples=4, stft_dtype="float32",
    sources=("a",), teacher="t", teacher_digest="0", embedding_size=1,
    window_seconds=0.1, window_hop_seconds=0.1,
)
plan = TrackPlan(name="x", split="test", num_samples=8, num_windows=1, with_audio=False)
with ShardWriter(folder / "0.h5", layout, [plan], config={{}}, packages={{}}) as shard:
    for signal in range(2):
        shard.tracks[0].append("stft", signal, np.zeros((3, 1, 5, 2)))
        shard.tracks[0].append_embedding(signal, np.ones((1, 1), "f4"), np.zeros(1, "f4"))
        shard.tracks[0].append("magnitude_moments", signal, np.zeros(5))
write_index(folder, build_index([ShardFile(folder / "0.h5")]))
for command in ("verify", "inspect"):
    cli.main([command, str(folder)], standalone_mode=False)
"""
    assert loaded_by(code) == set()
