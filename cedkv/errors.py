"""Errors a user can act on.

Each message names the value, the limit, the consequence and the remedy. The command line prints the message alone and
exits with code 2; anything else that is raised is a defect and keeps its traceback.
"""


class CedkvError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(CedkvError):
    """The configuration cannot be used."""


class DataError(CedkvError):
    """A sample, or a file of samples, cannot be used."""


class ModelError(CedkvError):
    """The model cannot be had, or cannot do what is asked of it."""


class NumericsError(CedkvError):
    """A computed value is not finite."""


class TrackingError(CedkvError):
    """The tracking store cannot be used; the message says where the results are."""
