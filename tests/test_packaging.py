"""A wheel built from the sdist holds everything and works outside the checkout."""

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache", "pipeline", "trainer")
PROGRAMS = ("flsep-precompute", "flsep-train")


def run(*command: str | Path, folder: Path, status: int = 0, **environment: str) -> str:
    """Run a command elsewhere than in the checkout; return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if status == 0 else subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout[-2000:] + (done.stderr or "")[-2000:]
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """Copy the files of the checkout that git does not ignore, as a clone would have them."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, with the environment's setuptools."""
    folder = tmp_path_factory.mktemp("build")
    # A copy: building leaves files behind, and the checkout may be in use.
    source = copy_checkout(folder / "source")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    run(*command, source, folder=folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed") / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--target", target, built[1], folder=target.parent)
    return target


@pytest.fixture(scope="session")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def read_requirements(metadata: Message, extra: str | None) -> set[str]:
    """Return the distributions that an extra names, or those that are always needed."""
    found = set()
    for requirement in metadata.get_all("Requires-Dist", []):
        name, _, marker = requirement.partition(";")
        asked = re.search(r"extra == ['\"](\w+)['\"]", marker)
        if (asked.group(1) if asked else None) == extra:
            found.add(re.split(r"[\[<>=~!() ]", name.strip(), maxsplit=1)[0].lower())
    return found


def list_sources() -> set[str]:
    return {
        f"flsep/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }


def test_wheel_holds_all_modules_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == list_sources()
    assert {f"flsep/{package}/py.typed" for package in PACKAGES} <= names


def test_sdist_holds_what_a_build_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    needed = {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
    assert needed | {name.removeprefix("flsep/") for name in list_sources()} <= names


def test_wheel_has_licence_and_programs(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        files = {re.sub(r"^.*\.dist-info/", "", name): name for name in wheel.namelist()}
        assert "licenses/LICENSE" in files
        entries = configparser.ConfigParser()
        entries.read_string(wheel.read(files["entry_points.txt"]).decode())
    assert set(entries["console_scripts"]) == set(PROGRAMS)


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "flsep"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License"] == "MIT"
    assert metadata.get_all("Provides-Extra") == [
        "pipeline",
        "cluster",
        "trainer",
        "evaluate",
        "demo",
        "dev",
    ]


def test_extras_do_not_bring_each_other(metadata: Message) -> None:
    core, pipeline, trainer, evaluate = (
        read_requirements(metadata, extra) for extra in (None, "pipeline", "trainer", "evaluate")
    )
    assert core == {"click", "h5py", "numpy"}
    assert {"tensorflow", "tensorflow-hub", "dask", "librosa"} <= pipeline
    assert {"torch", "safetensors"} <= trainer
    assert "museval" in evaluate
    assert not {"torch", "torchaudio"} & pipeline
    assert not {"tensorflow", "tensorflow-hub", "dask", "distributed", "librosa"} & (
        trainer | evaluate
    )


def test_tested_versions_satisfy_the_metadata(metadata: Message) -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for text in metadata.get_all("Requires-Dist", []):
        requirement = Requirement(text)
        version = versions[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{text}: constraints.txt has {version}"


def test_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import flsep.cache, flsep.pipeline.cli, flsep.trainer.cli, importlib.metadata as m\n"
        "for module in (flsep.cache, flsep.pipeline.cli, flsep.trainer.cli):\n"
        "    print(module.__file__)\n"
        "print(m.distribution('flsep').locate_file(''))"
    )
    files = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert len(files) == 4
    assert [file for file in files if not Path(file).is_relative_to(installed)] == []


def test_every_module_imports_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "import flsep, importlib, pkgutil\n"
        "for found in pkgutil.walk_packages(flsep.__path__, 'flsep.'):\n"
        "    print(importlib.import_module(found.name).__file__)"
    )
    files = run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(installed)).splitlines()
    relative = {Path(file).relative_to(installed).as_posix() for file in files}
    assert relative == {name for name in list_sources() if name.endswith(".py")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run_outside_the_checkout(
    installed: Path, tmp_path: Path, program: str, metadata: Message
) -> None:
    script = installed / "bin" / program
    environment = {"PYTHONPATH": str(installed)}
    version = run(script, "--version", folder=tmp_path, **environment)
    assert version == f"{program}, version {metadata['Version']}\n"
    assert f"Usage: {program}" in run(script, "--help", folder=tmp_path, **environment)


@pytest.fixture(scope="session")
def bare(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that holds the wheel and what it requires, no extra."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder.parent)
    # The requirements come from this environment, so that the test needs no network.
    (site,) = folder.glob("lib/python*/site-packages")
    for name in ("click", "h5py", "numpy"):
        distribution = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / part).symlink_to(Path(str(distribution.locate_file(part))).resolve())
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder)
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", built[1], folder=folder.parent)
    return folder / "bin"


def test_core_works_in_an_empty_environment(bare: Path, tmp_path: Path) -> None:
    code = (
        "import flsep.cache, importlib.util, pkgutil\n"
        "for found in pkgutil.walk_packages(flsep.cache.__path__, 'flsep.cache.'):\n"
        "    print(importlib.import_module(found.name).__name__)\n"
        "print([n for n in ('torch', 'tensorflow', 'tqdm') if importlib.util.find_spec(n)])"
    )
    environment = {"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"}
    *modules, extras = run(bare / "python", "-c", code, folder=tmp_path, **environment).splitlines()
    assert extras == "[]"
    # Every file is a module but the first __init__.py, which is the package that was walked.
    assert len(modules) == len(list((ROOT / "cache").rglob("*.py"))) - 1
    for program in PROGRAMS:
        assert f"Usage: {program}" in run(bare / program, "--help", folder=tmp_path, **environment)
    command = (bare / "flsep-train", "fit", tmp_path, "--run", tmp_path / "run")
    missing = run(*command, folder=tmp_path, status=1, **environment)
    assert missing.startswith("Error: torch is not installed; run `pip install 'flsep[trainer")
    assert missing.count("\n") == 1


def test_packages_are_the_folders() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {
        ".".join(("flsep", *path.parent.relative_to(ROOT).parts))
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert listed == sorted(folders)
    sources = {
        f"flsep/{path.parent.relative_to(ROOT)}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert {name.replace("/", ".") for name in sources} == folders, "a folder lacks __init__.py"


def test_tests_pass_in_a_clone_named_flsep(tmp_path: Path) -> None:
    clone = copy_checkout(tmp_path / "flsep")
    # As in a real clone, the environment and every traceback in it lie below a folder `flsep`.
    (clone / ".venv").symlink_to(sys.prefix)
    (clone / "build" / "typing" / "flsep").mkdir(parents=True)
    for package in PACKAGES:
        (clone / "build" / "typing" / "flsep" / package).symlink_to(clone / package)
    # torchrun prints a traceback of its own, in which every file has `flsep` in its path.
    test = "tests/trainer/test_parallel.py::test_too_small_a_last_batch_is_refused"
    command = (clone / ".venv" / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    environment = {"PYTHONPATH": str(clone / "build" / "typing")}
    output = run(*command, test, folder=clone, **environment)
    assert "1 passed" in output
