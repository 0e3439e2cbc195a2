"""Errors for people: each says what is wrong, where, and what to do, and knows its exit code (README, "Exit codes")."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


class RefusedError(Exception):
    """Something that must be mended before training can start: config, data or environment. Exit code 2, no traceback."""

    exit_code = EXIT_REFUSED


class ConfigError(RefusedError):
    """A config value that cannot be. `key` is the full dotted key, `why` a sentence with the remedy."""

    def __init__(self, key: str, value: object, why: str) -> None:
        super().__init__(f"{key}={'null' if value is None else value}: {why}")
        self.key = key


class DataError(RefusedError):
    """A data file or a line of it that cannot be used; the message starts with the file (and `line N`)."""


class TrainingError(Exception):
    """Training that cannot go on, with a message that stands on its own (no traceback needed). Exit code 1."""

    exit_code = EXIT_FAILED
