"""Who may import what: read from the source, and seen in processes that import it."""

import ast
import configparser
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache", "pipeline", "trainer")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
TENSORFLOW = {"tensorflow", "tensorflow_hub"}
DASK = {"dask", "dask_jobqueue", "distributed"}
SCORING = {"museval", "norbert", "stempeg"}
HEAVY = {*TENSORFLOW, *DASK, *SCORING, "keras", "librosa", "scipy", "tensorboard", "torch"}
# The one place where the trainer calls the pipeline, if it is installed.
LAZY_PIPELINE = ("trainer/inference/embedder.py", "flsep.pipeline.teachers.teacher")
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


class Import(NamedTuple):
    """One import in the source."""

    file: str
    module: str
    at_top: bool

    @property
    def package(self) -> str:
        return self.file.partition("/")[0]

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]


def find_imports(source: str, file: str) -> Iterator[Import]:
    """Yield what a module imports, also through importlib.import_module; not for typing alone."""
    tree = ast.parse(source)
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    lazy = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        modules: list[str] = []
        match node:
            case ast.Import(names=names):
                modules = [alias.name for alias in names]
            case ast.ImportFrom(module=module, level=0) if module:
                modules = [module]
                if module == "flsep":
                    modules = [f"flsep.{alias.name}" for alias in node.names]
            case ast.ImportFrom():
                modules = [f"{'.' * node.level}{node.module or ''}"]
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                if ast.unparse(function).endswith(("import_module", "__import__")):
                    modules = [name]
        yield from (Import(file, module, node not in lazy) for module in modules)


IMPORTS = [
    found
    for path in SOURCES
    for found in find_imports(path.read_text(), path.relative_to(ROOT).as_posix())
]


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
    importlib.import_module("flsep.pipeline.teachers.teacher")
    importlib.import_module(name)
from . import i
"""
    assert {(found.module, found.at_top) for found in find_imports(source, "x.py")} == {
        ("a.b", True),
        ("c", True),
        ("d.e", True),
        ("flsep.cache", True),
        ("h", False),
        ("flsep.pipeline.teachers.teacher", False),
        (".", True),
    }
    assert {found.package for found in IMPORTS} == set(PACKAGES)


def test_imports_are_absolute() -> None:
    assert [found for found in IMPORTS if found.module.startswith(".")] == []


def test_cache_imports_numpy_and_h5py_alone() -> None:
    allowed = {*sys.stdlib_module_names, "numpy", "h5py"}
    for found in IMPORTS:
        if found.package == "cache" and (found.file, found.root) != ("cache/commands.py", "click"):
            assert found.module.startswith("flsep.cache.") or found.root in allowed, found


def test_siblings_do_not_import_each_other() -> None:
    crossing = [
        (found.file, found.module)
        for found in IMPORTS
        if found.root == "flsep" and found.module.split(".")[1] not in (found.package, "cache")
    ]
    assert crossing == [LAZY_PIPELINE]
    assert all(not found.at_top for found in IMPORTS if (found.file, found.module) == LAZY_PIPELINE)


def test_each_heavy_package_has_one_home() -> None:
    assert importers(*TENSORFLOW) == {"pipeline"}
    assert importers(*DASK) == {"pipeline"}
    assert importers("librosa") == {"pipeline"}
    assert importers("torch", "safetensors") == {"trainer"}
    homes = {found.file for found in IMPORTS if found.root in DASK}
    assert homes == {"pipeline/execution/cluster.py", "pipeline/execution/runners.py"}


@pytest.mark.parametrize("module", sorted({*TENSORFLOW, *DASK, *SCORING, "librosa", "tensorboard"}))
def test_imported_inside_functions_only(module: str) -> None:
    assert [found for found in IMPORTS if found.root == module and found.at_top] == []


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
    paths = [path.relative_to(ROOT) for path in SOURCES if path.is_relative_to(ROOT / package)]
    return [".".join(("flsep", *path.with_suffix("").parts)) for path in paths]


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
