"""What can go wrong through no fault of alignkit: one exception a kind of mistake, each with a message made for its reader.

The command line prints these without a traceback. Anything else that escapes is a bug and is shown in full.
"""

from __future__ import annotations

from collections.abc import Sequence


class AlignkitError(Exception):
    """A mistake that the user can repair. The message names the place, what was found, what is allowed and what to do."""

    exit_code = 2


class SettingError(AlignkitError):
    """Raised in a config dataclass's ``__post_init__``: the value of ``key`` cannot be accepted. The config loader adds the position."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message


class ConfigError(AlignkitError):
    """A config with one or more problems, each already a full line ``file:line:column: key ...``."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class DataError(AlignkitError):
    """A row, a file or a whole data set that cannot be used."""


class ModelError(AlignkitError):
    """A model or tokenizer that cannot be found, read or used."""


class PluginError(AlignkitError):
    """A plugin that failed to load, or whose declaration cannot be accepted."""


class CheckpointError(AlignkitError):
    """A checkpoint that cannot be written or trusted."""


class SaveError(CheckpointError):
    """The disk refuses to take a run's work: a checkpoint, an artifact, figures. ``problem`` is the message without what to do."""

    exit_code = 74  # EX_IOERR of sysexits.h

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; what was saved before is intact: repair this and run the same command again")
        self.problem = problem


class PoisonedError(CheckpointError):
    """A state with a NaN or an infinity in it, which is never saved."""


class RunError(AlignkitError):
    """A run that cannot go on: what happened, and what to look at."""


class Stopped(AlignkitError):
    """A guard ended a stage before its policy was ruined. Its state is saved, and it goes on when its settings are changed."""

    exit_code = 3


class Interrupted(AlignkitError):
    """The run was asked to stop and has saved its state; the same command continues it. ``exit_code`` follows the shell's custom."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Unavailable(Interrupted):
    """What the run needs from outside, such as a reward service, has been away for too long. The message says what to look at."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=75)  # EX_TEMPFAIL: to be tried again later
