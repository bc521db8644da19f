"""Errors a user can act on.

Each message names the value, the limit, the consequence and the remedy. The command line prints the message alone and
exits with the error's code; anything else that is raised is a defect or the machine's (code 3).
"""

import os
import re


class CedkvError(Exception):
    """Base of all errors whose message is meant for the user."""

    exit_code = 2


class ConfigError(CedkvError):
    """The configuration cannot be used."""


class DataError(CedkvError):
    """A sample, or a file of samples, cannot be used."""


class ModelError(CedkvError):
    """The model cannot be had, or cannot do what is asked of it."""


class NumericsError(CedkvError):
    """A computed value is not finite."""


class BrokenOff(CedkvError):  # noqa: N818  (what happened to the run, not what is wrong with the input)
    """The run cannot go on, through no fault of its input (a full disk); it can be resumed."""

    exit_code = 3


class TrackingError(CedkvError):
    """The tracking store cannot be used; the message says where the results are."""

    exit_code = 4


_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_CREDENTIALS = re.compile(r"//[^/\s]*@")


def has_credentials(text: str) -> bool:
    """Whether the text holds a URI with ``user:password@``."""
    return _CREDENTIALS.search(text) is not None


def without_secrets(text: str) -> str:
    """The text without ``user:password@`` in any URI, and without the values of environment variables that are secrets."""
    text = _CREDENTIALS.sub("//", text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text
