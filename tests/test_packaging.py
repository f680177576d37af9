"""A wheel built from the sdist holds everything and works outside the checkout."""

import configparser
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
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "runs", "tests", "docs"
)


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """Run a command elsewhere than in the checkout; return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, with the environment's setuptools."""
    folder = tmp_path_factory.mktemp("build")
    # A copy: building leaves files behind, and the checkout may be in use.
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
    run(*command, folder / "source", folder=folder)
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


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_run_outside_the_checkout(
    installed: Path, tmp_path: Path, program: str, metadata: Message
) -> None:
    script = installed / "bin" / program
    environment = {"PYTHONPATH": str(installed)}
    version = run(script, "--version", folder=tmp_path, **environment)
    assert version == f"{program}, version {metadata['Version']}\n"
    assert f"Usage: {program}" in run(script, "--help", folder=tmp_path, **environment)
