import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from flsep.cache.commands import CommandGroup
from flsep.cache.errors import DamagedDataError, FlsepError

Fail = Callable[[BaseException], Result]


@pytest.fixture
def fail() -> Fail:
    """Run a program whose command raises an exception."""

    def run(error: BaseException, *options: str) -> Result:
        @click.group(cls=CommandGroup)
        def program() -> None: ...

        @program.command("work")
        @click.option("--count", type=int)
        def work(count: int | None) -> None:
            raise error

        return CliRunner().invoke(program, ["work", *options])

    return run


def assert_one_line(result: Result, message: str) -> None:
    __tracebackhide__ = True
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {message}\n"


def test_an_expected_failure_is_one_line(fail: Fail) -> None:
    assert_one_line(fail(FlsepError("x.h5: damaged;\n  delete it")), "x.h5: damaged; delete it")


def test_notes_say_where(fail: Fail) -> None:
    error = DamagedDataError("stft is altered")
    error.add_note("in the track 'a'")
    error.add_note("of x.h5")
    assert_one_line(fail(error), "stft is altered in the track 'a' of x.h5")


def test_a_failure_without_text_has_a_name(fail: Fail) -> None:
    assert_one_line(fail(FlsepError()), "FlsepError")
    assert_one_line(fail(OSError()), "OSError")


FULL = "free some space and run the command again, finished files are kept"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left", "x.h5"), f"the disk is full (x.h5); {FULL}"),
        (OSError(errno.EDQUOT, "Quota exceeded", "x.h5"), f"the disk is full (x.h5); {FULL}"),
        # HDF5 has no number for it
        (
            OSError("Can't write data (error message = 'No space left on device')"),
            f"the disk is full (while writing); {FULL}",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x.h5"),
            "x.h5: no permission (Permission denied); choose another place",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "x.h5"),
            "x.h5: no permission (Read-only file system); choose another place",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x.h5"),
            "[Errno 2] No such file or directory: 'x.h5'",
        ),
    ],
)
def test_what_the_system_refuses_is_one_line(fail: Fail, error: OSError, message: str) -> None:
    assert_one_line(fail(error), message)


def test_a_missing_package_is_one_line(fail: Fail) -> None:
    error = ModuleNotFoundError("No module named 'librosa'", name="librosa")
    message = "librosa is not installed; run `pip install 'flsep[pipeline]'`"
    assert_one_line(fail(error), message)


def test_a_missing_module_of_flsep_is_a_bug(fail: Fail) -> None:
    assert fail(ModuleNotFoundError("x", name="flsep.cache.nothing")).exit_code == 70


def test_ctrl_c_has_status_130(fail: Fail) -> None:
    result = fail(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr == "\nInterrupted.\n"


def test_click_reports_its_own_exceptions(fail: Fail) -> None:
    assert fail(click.exceptions.Exit(3)).exit_code == 3
    assert fail(click.Abort()).stderr == "Aborted!\n"
    result = fail(click.UsageError("two of --a, --b"))
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: two of --a, --b\n")


def test_wrong_usage_has_status_2(fail: Fail) -> None:
    result = fail(AssertionError("not reached"), "--count", "many")  # type: ignore[call-arg]
    assert result.exit_code == 2
    assert "Invalid value for '--count'" in result.stderr


@pytest.mark.parametrize("kind", [ValueError, TypeError, AssertionError, RuntimeError, KeyError])
def test_anything_else_is_a_bug(fail: Fail, kind: type[Exception]) -> None:
    result = fail(kind("planted"))
    assert result.exit_code == 70
    assert result.stdout == ""
    assert "Traceback (most recent call last):" in result.stderr
    assert "planted" in result.stderr
    assert "This is a bug in flsep, not a mistake of yours (program work)" in result.stderr
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}." in result.stderr
    assert "numpy " in result.stderr
    assert result.stderr.endswith("in the project's issue tracker.\n")


PRECOMPUTE = """
import sys
from flsep.pipeline import cli
from flsep.pipeline.commands import verify as module
PLANT
sys.argv = ["flsep-precompute", "inspect", *sys.argv[1:]]
cli.main()
"""
TRAIN = """
import sys
from flsep.trainer import cli
from flsep.trainer.scoring import evaluation as module
PLANT
sys.argv = ["flsep-train", "compare", *sys.argv[1:], "--floor", "secret"]
cli.main()
"""
BUG = "module.FUNCTION = lambda *values, **options: list(zip([1], [1, 2], strict=True))"


def run_program(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


PROGRAMS = pytest.mark.parametrize(
    ("code", "function", "name"),
    [
        (PRECOMPUTE, "read_index", "flsep-precompute inspect"),
        (TRAIN, "read_evaluation", "flsep-train compare"),
    ],
    ids=["precompute", "train"],
)


@PROGRAMS
def test_a_bug_in_a_program(tmp_path: Path, code: str, function: str, name: str) -> None:
    (tmp_path / "secret").mkdir()
    planted = code.replace("PLANT", BUG.replace("FUNCTION", function))
    done = run_program(planted, tmp_path, "secret")
    assert done.returncode == 70, done.stderr
    assert done.stdout == ""
    assert "Traceback (most recent call last):" in done.stderr
    assert "ValueError: zip() argument 2 is longer than argument 1" in done.stderr
    assert f"This is a bug in flsep, not a mistake of yours ({name})" in done.stderr
    assert "numpy " in done.stderr
    assert "Please report it" in done.stderr
    assert "secret" not in done.stderr.partition("This is a bug")[2]


@PROGRAMS
def test_an_expected_failure_in_a_program(
    tmp_path: Path, code: str, function: str, name: str
) -> None:
    (tmp_path / "secret").mkdir()
    done = run_program(code.replace("PLANT", ""), tmp_path, "secret")
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")


@PROGRAMS
def test_wrong_usage_of_a_program(tmp_path: Path, code: str, function: str, name: str) -> None:
    done = run_program(code.replace("PLANT", ""), tmp_path, "x", "--nothing")
    assert done.returncode == 2, done.stderr
    assert "No such option" in done.stderr
