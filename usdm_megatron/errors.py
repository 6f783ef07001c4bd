"""Everything that this package raises on purpose, and the exit code of each.

A message names the field, the value, the rule and the remedy. Several problems
found together are reported together.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 3


class UserError(Exception):
    """The user's input is wrong; carries one or more problems, each a full sentence."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, *problems: str) -> None:
        if not problems:
            raise ValueError("an error without a problem tells nobody anything")
        self.problems = problems
        super().__init__("\n".join(problems))


class ConfigError(UserError):
    """A flag, a YAML key or a combination of them is wrong."""


class DataError(UserError):
    """A data file is missing, malformed, or does not belong to this model."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not belong to this run."""


class CheckpointFault(CheckpointError):
    """A checkpoint could not be written or read through no fault of the user's (disk full, a bug of ours)."""

    exit_code = EXIT_FAULT


class ConversionError(UserError):
    """A Hugging Face model cannot be converted, or does not equal its counterpart."""


class TrainingFault(Exception):
    """Training cannot go on (non-finite loss, a rank that failed); not the user's input."""

    exit_code = EXIT_FAULT


class Preempted(Exception):
    """The run was asked to stop, finished its step and saved."""

    exit_code = EXIT_PREEMPTED

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"preempted after step {step}; the checkpoint is saved")
