"""Errors that people see, and the exit code each one ends a command with.

A message is one line that says what was asked, what is allowed and what to change. Anything that is
not a `TrtkitError` is a bug: it keeps its traceback and ends with `EXIT_BUG`.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_GATE_FAILED = 1
EXIT_BUG = 70
EXIT_INTERRUPTED = 130


class TrtkitError(Exception):
    """Base of every error a person can cause or repair."""

    exit_code = 1


class UsageError(TrtkitError):
    """A flag, a recipe or an argument has a value that is not allowed."""

    exit_code = 2


class InputError(TrtkitError):
    """A file that was given is missing, truncated, corrupt or of the wrong shape."""

    exit_code = 3


class UnsupportedError(TrtkitError):
    """The request is understood, and this combination cannot be done; the message lists what can."""

    exit_code = 4


class CapacityError(TrtkitError):
    """The plan does not fit; the message says by how much, and what would fit."""

    exit_code = 5


class MissingDependencyError(TrtkitError):
    """A package, a GPU or a program that this step needs is not on this machine."""

    exit_code = 6


class OutputError(TrtkitError):
    """The output exists already, cannot be written, or the disk is full."""

    exit_code = 7


class EngineError(TrtkitError):
    """An engine bundle cannot be opened, or its process died."""

    exit_code = 8


class MeasurementError(TrtkitError):
    """A measurement is invalid, so no verdict can be given from it."""

    exit_code = 9


EXIT_CODES: tuple[tuple[int, str], ...] = (
    (EXIT_OK, "done"),
    (EXIT_GATE_FAILED, "a gate's rule failed"),
    *(
        (cls.exit_code, (cls.__doc__ or "").split(";")[0].rstrip("."))
        for cls in (
            UsageError,
            InputError,
            UnsupportedError,
            CapacityError,
            MissingDependencyError,
            OutputError,
            EngineError,
            MeasurementError,
        )
    ),
    (EXIT_BUG, "a bug in trtkit (traceback printed)"),
    (EXIT_INTERRUPTED, "interrupted (Ctrl-C); finished work is kept"),
)
