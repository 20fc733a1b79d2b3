"""How commands end: with at most one line on stderr, and an exit status.

====== =====================================================================================
status meaning
====== =====================================================================================
0      done
1      done, but results differ from what was expected or from what they are compared with, or the
       evaluation of a complete training failed
2      wrong input: command line, config, data or weights; a file that cannot be read or written
3      a training diverged: its loss or its weights are NaN or infinite
75     stopped by a signal; the same command with ``--resume`` goes on
====== =====================================================================================

If the environment variable ``RESNET_BACKBONE_TRACEBACK`` is set, tracebacks are shown instead of
lines. As in a shell, a status of 128 + N means that signal N ended the process.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_DIFFERENT, EXIT_WRONG_INPUT, EXIT_DIVERGED = 1, 2, 3
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h

SYSTEM_ERRORS = {
    errno.ENOENT: "does not exist: check the path",
    errno.EISDIR: "is a folder: give the path of a file",
    errno.EACCES: "cannot be opened, permission denied: change permissions, or choose another path",
    errno.EPERM: "cannot be changed, permission denied: choose another path",
    errno.EROFS: "is on a read-only file system: choose another path",
    errno.ENOSPC: "cannot be written, the disk is full: free some space, or choose another path",
    errno.EDQUOT: "cannot be written, your quota is used up: delete files, or choose another path",
}
"""Error of the operating system -> description, and what to do."""


class UsageError(ValueError):
    """An invalid command line, config or data set; the message says what to write instead."""


class DataError(UsageError):
    """Data that cannot be used as they are; the message says what, where and how to fix it."""


class UnexpectedResults(ValueError):
    """Results that differ from expected ones; the message names all of them."""


class EvaluationFailed(UnexpectedResults):
    """A complete training whose evaluation failed; the message says how to evaluate again."""


class TrainingDiverged(FloatingPointError):
    """The loss or the weights are NaN or infinite."""


class Stopped(Exception):
    """A signal asked the run to stop, on every process; the message names the signal."""


# Detectron2 raises FloatingPointError, too. ImportError means that a library is not installed.
ONE_LINE = (ValueError, OSError, ImportError, FloatingPointError, Stopped)


def one_line_errors(main: Callable) -> Callable:
    """Decorator that turns errors of a command into one line and the exit status of the table."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except ONE_LINE as error:
            if wants_traceback():
                raise
            message, status = outcome(error)
            print(message, file=sys.stderr)
            raise SystemExit(status) from None
        except KeyboardInterrupt:
            if wants_traceback():
                raise
            print("interrupted", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None

    return wrapped


def wants_traceback() -> bool:
    return bool(os.environ.get("RESNET_BACKBONE_TRACEBACK"))


def outcome(error: Exception) -> tuple[str, int]:
    """Returns the line and the exit status for one of :data:`ONE_LINE`."""
    if isinstance(error, Stopped):
        text = f"stopped by {error}; run the same command again, a training with --resume"
        return text, EXIT_STOPPED
    status = EXIT_WRONG_INPUT
    if isinstance(error, UnexpectedResults):
        status = EXIT_DIFFERENT
    elif isinstance(error, FloatingPointError):
        status = EXIT_DIVERGED
    return f"error: {plain_message(error)}", status


def plain_message(error: Exception) -> str:
    """Returns an error's message in one line, without the stack of a PyTorch loader's worker."""
    if isinstance(error, OSError) and error.filename is not None:
        return _system_error(error, Path(os.fsdecode(error.filename)))
    text = str(error).strip()
    if text.startswith("Caught ") and "Original Traceback (most recent call last)" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text
    return " ".join(text.split())


def _system_error(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        file = next((one for one in (path, *path.parents) if one.is_file()), path)
        where = "" if file == path else f"{path}: "
        return f"{where}{file} is a file, not a folder: choose another path"
    return f"{path} {SYSTEM_ERRORS.get(error.errno, f'cannot be used ({error.strerror})')}"
