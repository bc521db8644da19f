"""Errors that the user can act on.

Each message names the value, the limit, the consequence and the remedy. The command line prints the message alone and exits
with the error's code; any other exception is a defect of the suite or a fault of the machine (code 3).
"""


class CedkvError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 2


class ConfigError(CedkvError):
    """The configuration cannot be used."""


class DataError(CedkvError):
    """A sample, or a file of samples, cannot be used."""


class UnusableSample(DataError):  # noqa: N818  (what is wrong with one sample; a run may leave it out)
    """One sample cannot be used.

    reason: why, in a few words that are the same for every sample of that kind. value: what of the sample is wrong, where all
    such values should be listed.
    """

    def __init__(self, reason: str, message: str, value: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.value = value


class ModelError(CedkvError):
    """The model cannot be loaded, or does not support what the configuration needs."""


class LackOfMemoryError(ModelError):
    """Memory ran out where nothing smaller could be tried; another process, or a later one, may find more."""


class NumericsError(CedkvError):
    """A computed value is not finite."""


class RunInterrupted(CedkvError):  # noqa: N818  (what happened to the run, not what is wrong with the input)
    """The run cannot go on for a reason other than its input (a full disk); it can be resumed."""

    exit_code = 3


class TrackingError(CedkvError):
    """The tracking store cannot be used; the message says where the results are."""

    exit_code = 4
