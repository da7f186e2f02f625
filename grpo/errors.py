"""Errors that end a run with one line, which names the flag, the file or the sample, and the fix."""


class ConfigError(ValueError):
    """A setting that cannot work."""


class ModelError(ValueError):
    """A model that cannot be trained or evaluated here."""


class RunError(RuntimeError):
    """A run that cannot go on."""


class Stopped(Exception):
    """Raised on all ranks before `step`, as soon as any rank got the signal of this number."""

    def __init__(self, step, number):
        super().__init__(f"stopped before step {step}")
        self.step, self.number = step, number
