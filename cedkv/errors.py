"""Errors a user can act on.

Each message names the value, the limit, the consequence and the remedy. The command line prints the message alone and
exits with the error's code; anything else that is raised is a defect or the machine's (code 3).
"""

import os
import re
from typing import Any


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


_SECRET_NAME = re.compile(r"(?:^|_|PG)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(?:_|$)", re.IGNORECASE)
_SECRETS = (
    (re.compile(r"//(?:[^/\s]*|[^/\s:@]+:(?!\d+/)[^\s@]*)@"), "//"),  # user:password@, the password with or without a slash
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|password|secret|signature|sig|credential)=)[^&\s'\"]+"), r"\1***"),
    (re.compile(r"(?i)\b(Bearer|Authorization:? *Basic) +[^\s'\"]+"), r"\1 ***"),
    (re.compile(r"\b(?:hf|gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}"), "***"),
)
_HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control and direction characters, and halves of characters; a newline is not one of them."""


def without_secrets(text: str) -> str:
    """The text without ``user:password@`` in any URI, tokens in queries and headers, and the values of secret environment
    variables. The one place where secrets are recognised."""
    for pattern, shown_as in _SECRETS:
        text = pattern.sub(shown_as, text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def visible(text: str) -> str:
    """The text with control and direction characters as escapes, so that a terminal shows them and obeys none."""
    return _HIDDEN.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def told(text: str) -> str:
    """A message as a terminal or a log may have it: no secrets, nothing hidden, of a length that is read."""
    text = visible(without_secrets(text))
    return text if len(text) <= 4000 else f"{text[:3000]} [...] {text[-900:]}"


def shown(value: Any, most: int = 80) -> str:
    """A value in a message: as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
