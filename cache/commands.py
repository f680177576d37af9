"""The frame of both command-line programs: how a command ends when something goes wrong."""

import errno
import platform
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from flsep.cache.errors import FlsepError

BUG_STATUS = 70
"""Exit status for a bug in flsep (EX_SOFTWARE of sysexits.h)."""

_PACKAGES = ("flsep", "numpy", "h5py", "torch", "tensorflow", "dask", "museval")


class CommandGroup(click.Group):
    """Group of commands that reports expected failures in one line and bugs with a traceback.

    ============================== ============ =================================================
    what happened                  exit status  output on stderr
    ============================== ============ =================================================
    `FlsepError`, `OSError`        1            one line
    wrong usage                    2            click's own message
    Ctrl-C                         130          `interrupted`
    anything else: a bug           70           traceback, versions, request to report it
    ============================== ============ =================================================
    """

    interrupted = "Interrupted."
    extras = "pipeline"  # what to install when a package is missing

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(f"\n{self.interrupted}", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if line := self.explain(error):
                raise click.ClickException(line) from error
            click.echo(describe_bug(error), err=True)
            ctx.exit(BUG_STATUS)

    def explain(self, error: Exception) -> str | None:
        """Return one line for an expected failure, None for a bug."""
        match error:
            case FlsepError():
                text = " ".join([str(error), *getattr(error, "__notes__", [])])
            case OSError():
                text = explain_os_error(error)
            case ModuleNotFoundError(name=str(name)) if not name.startswith("flsep"):
                text = f"{name} is not installed; run `pip install 'flsep[{self.extras}]'`"
            case _:
                return None
        return " ".join(text.split())


def explain_os_error(error: OSError) -> str:
    """Say in one line what the operating system refused, and what to do about it."""
    text = str(error)
    if error.errno == errno.ENOSPC or "No space left on device" in text:
        return (
            f"the disk is full ({error.filename or 'while writing'}); free some space and run the "
            "command again, finished files are kept"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM) and error.filename:
        return f"{error.filename}: no permission ({error.strerror}); choose another place"
    return text or type(error).__name__


def describe_bug(error: BaseException) -> str:
    """Return a traceback, the versions of what matters, and the request to report them."""
    versions = [f"Python {platform.python_version()}", platform.platform()]
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return (
        "".join(traceback.format_exception(error))
        + f"\nThis is a bug in flsep, not a mistake of yours ({' '.join(sys.argv)}).\n"
        + f"{', '.join(versions)}\n"
        + "Please report it, with everything above, in the project's issue tracker."
    )
