"""Text for people: secrets redacted, control characters escaped, values previewed, numbers and words written out."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable
from typing import Any

_SECRET_NAME = re.compile(r"(?:^|_|PG)(?:TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(?:_|$)", re.IGNORECASE)
_SECRETS = (
    (re.compile(r"//(?:[^/\s]*|[^/\s:@]+:(?!\d+/)[^\s@]*)@"), "//"),  # user:password@, the password with or without a slash
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|password|secret|signature|sig|credential)=)[^&\s'\"]+"), r"\1***"),
    (re.compile(r"(?i)\b(Bearer|Authorization:? *Basic) +[^\s'\"]+"), r"\1 ***"),
    (re.compile(r"\b(?:hf|gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}"), "***"),
)
_HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control and direction characters, and halves of characters; a newline is not one of them."""


def redact(text: str) -> str:
    """The text without ``user:password@`` in any URI, tokens in queries and headers, and the values of secret environment
    variables. The one place where secrets are recognised."""
    for pattern, shown_as in _SECRETS:
        text = pattern.sub(shown_as, text)
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


def escape_control(text: str) -> str:
    """The text with control and direction characters as escapes, so that a terminal shows them and obeys none."""
    return _HIDDEN.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def sanitize(text: str) -> str:
    """A message as a terminal or a log may have it: no secrets, nothing hidden, of a length that is read."""
    text = escape_control(redact(text))
    return text if len(text) <= 4000 else f"{text[:3000]} [...] {text[-900:]}"


def preview(value: Any, most: int = 80) -> str:
    """A value in a message: as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def near_match(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or the names there are when none is near."""
    known = list(names)
    name = name[:80]
    last = {key.rsplit(".", 1)[-1]: key for key in known}
    matches = [last[name]] if name in last else difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:
        matches = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known: {', '.join(sorted(known))}"


def number(value: float | None) -> str:
    """Four significant digits, or a dash for what is missing or not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def plural(n: int, word: str) -> str:
    """``1 span``, ``2 spans``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def sentence(text: str) -> str:
    """With a capital at the start."""
    return text[:1].upper() + text[1:]


def escape_markdown(text: str) -> str:
    """Text of others inside markdown: preview to the letter, on one line, neither markup nor HTML nor a link."""
    return re.sub(r"([\\`*_\[\]<>|#!~])", r"\\\1", " ".join(text.split()))
