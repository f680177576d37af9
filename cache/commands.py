"""The frame of both command-line programs: how a command reports what went wrong."""

import errno
import platform
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from flsep.cache.errors import FlsepError

INTERRUPTED_STATUS = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""

BUG_STATUS = 70
"""Exit status for a bug in flsep: EX_SOFTWARE of sysexits.h."""

_PACKAGES = ("flsep", "numpy", "h5py", "torch", "tensorflow", "dask", "museval")


class CommandGroup(click.Group):
    """Group of commands that reports expected failures in one line and bugs with a traceback.

    Exit status: 1 for `FlsepError`, `OSError` and a package that is not installed, 2 for wrong
    usage (click's own message), 130 for Ctrl-C, 70 for anything else: a bug.
    """

    interrupted = "Interrupted."
    extras = "pipeline"  # what to install if a package is missing

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(f"\n{self.interrupted}", err=True)
            ctx.exit(INTERRUPTED_STATUS)
        # click itself handles these, a closed pipe included.
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            # The chained error keeps its traceback for debuggers; click prints the line only.
            if line := self.explain(error):
                raise click.ClickException(line) from error
            # The arguments stay out of the report: they may contain passwords in addresses.
            name = f"{ctx.info_name} {ctx.invoked_subcommand}"
            click.echo(describe_bug(error, name), err=True)
            ctx.exit(BUG_STATUS)

    def explain(self, error: Exception) -> str | None:
        """Return one line for an expected failure, None for a bug."""
        match error:
            case FlsepError():
                # Callers attach the place of a failure (track, file) as notes.
                text = " ".join([str(error), *getattr(error, "__notes__", [])])
            case MemoryError():
                text = "out of memory; use fewer workers, smaller batches, or a larger machine"
            case OSError():
                text = explain_os_error(error)
            case ModuleNotFoundError(name=str(name)) if name.partition(".")[0] != "flsep":
                text = f"{name} is not installed; run `pip install 'flsep[{self.extras}]'`"
            case _:
                return None
        # One line, whatever line breaks a library's message has; never an empty one.
        return " ".join(text.split()) or type(error).__name__


def explain_os_error(error: OSError) -> str:
    """Return what the operating system refused, and what to do about it."""
    text = str(error)
    # HDF5 raises errors without a number, with that of the system in the text.
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return (
            f"the disk is full ({error.filename or 'while writing'}); free some space and run the "
            "command again, finished files are kept"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and error.filename:
        return f"{error.filename}: no permission ({error.strerror}); choose another place"
    return text


def describe_bug(error: BaseException, command: str) -> str:
    """Return a traceback, the versions that matter, and the request to report them."""
    versions = [f"Python {platform.python_version()}", platform.platform()]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue  # an optional package, of another extra
    return (
        "".join(traceback.format_exception(error))
        + f"\nThis is a bug in flsep, not a mistake of yours ({command}).\n"
        + f"{', '.join(versions)}\n"
        + "Please report it, with everything above, in the project's issue tracker."
    )
