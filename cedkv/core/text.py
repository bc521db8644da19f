"""Text for people: secrets redacted, control characters escaped, values previewed, numbers and words written out."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from cedkv.core.environment import environment_variables

_SECRET_NAME = re.compile(
    r"(?:^|_|PG)(?:TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CONNECTION_STRING)(?:_|$)"
    r"(?!(?:\w*_)?(?:PATHS?|FILE|FILES|FILENAME|DIR|FOLDER|HOME)$)",  # HF_TOKEN_PATH names a file, which has the secret
    re.IGNORECASE,
)
_HOST = r"(?:\[[^\]\s]*\]|[^\s/?#:@\[]*)(?::\d*)?(?:[/?#\s'\"]|$)"
"""A host with or without a port, and what ends it: without an ``@`` nothing in it is a user or a password."""
_SECRETS = (
    # user:password@, up to the last @ of the word: a password may hold a slash, a question mark or an @ that is not quoted
    (re.compile(rf"//(?:[^\s/?#]*@(?:\S*@)?|(?!{_HOST})[^\s/?#:@]*:\S*@)"), "//"),
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|password|secret|signature|sig|credential)=)[^&\s'\"]+"), r"\1***"),
    (re.compile(r"(?i)\b(Bearer|Authorization:? *Basic) +[^\s'\"]+"), r"\1 ***"),
    (re.compile(r"(?i)(\b\w*(?:password|passwd|passphrase)=['\"]?)[^\s'\"&;]+"), r"\1***"),  # host=h password=p
    (re.compile(r"(?i)(['\"]\w*(?:password|passwd|passphrase)['\"]: *['\"])[^'\"]+"), r"\1***"),  # {"password": "p"}
    (re.compile(r"\b(?:hf|gh[pousr]|github_pat)_[A-Za-z0-9_]{20,}"), "***"),
)
_HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control and direction characters, and lone surrogates; a newline is not one of them."""
_CUT = " [...] "


def redact(text: str) -> str:
    """Return the text without secrets; no other function recognises secrets.

    Removed are ``user:password@`` in any URI, tokens in queries and headers, passwords after their name, and, wherever they
    stand, the values of secret environment variables that cannot be ordinary words (``_is_secret``).
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    for name, value in environment_variables().items():
        if _is_secret(name, value):
            text = text.replace(value, "***")
    return text


def _is_secret(name: str, value: str) -> bool:
    """Return whether a variable holds a secret that is removed wherever it stands.

    A weak value (fewer than 8 characters, or fewer than 16 that are all letters or all digits) is not: ``select`` or ``1`` as
    a password would blank parts of ordinary values. Where a weak value is used as a credential, the place shows it.
    """
    if len(value) < 8 or (len(value) < 16 and (value.isalpha() or value.isdigit())):
        return False
    return _SECRET_NAME.search(name) is not None


def escape_control(text: str) -> str:
    """Return the text with control and direction characters as escapes: a terminal shows them and obeys none."""
    return _HIDDEN.sub(lambda match: match.group().encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def sanitize(text: str) -> str:
    """Return a message that may go to a terminal or a log: no secrets, control characters escaped, at most 4,000 characters."""
    return shorten(escape_control(redact(text)), 4000)


def shorten(text: str, limit: int) -> str:
    """Return the text with at most ``limit`` characters, cut in the middle: a message begins with its cause and ends with what
    to do.
    """
    if len(text) <= limit:
        return text
    head = (limit - len(_CUT)) * 3 // 5
    return text[:head] + _CUT + text[len(text) - (limit - len(_CUT) - head) :]


def one_line(error: object, limit: int = 600) -> str:
    """Return what an exception of another library says as part of a message: one line, sanitized, shortened to ``limit``."""
    return shorten(sanitize(" ".join(str(error).split())), limit)


def preview(value: Any, max_length: int = 80) -> str:
    """Return a value for a message: its ``repr``, truncated to ``max_length`` characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= max_length else f"{text[:max_length]}... ({len(text)} characters)"


def near_match(name: str, names: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` with the nearest of ``names``, or all of ``names`` when none is near."""
    candidates = list(names)
    name = name[:80]
    by_last_part = {key.rsplit(".", 1)[-1]: key for key in candidates}
    if name in by_last_part:
        return f"; did you mean {by_last_part[name]!r}?"
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not matches:
        last_parts = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=0.6)
        matches = [by_last_part[part] for part in last_parts]
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known: {', '.join(sorted(candidates))}"


def number(value: float | None, digits: int = 4) -> str:
    """Return significant digits, or a dash for a value that is missing or not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def plural(n: int, word: str) -> str:
    """Return a count with its noun: ``1 span``, ``2 spans``."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def sentence(text: str) -> str:
    """Return the text with a capital at the start."""
    return text[:1].upper() + text[1:]


def wrapped(label: str, width: int = 36) -> list[str]:
    """Return a label of a condition as lines: one if it fits, else its first part, and its settings below."""
    if len(label) <= width:
        return [label]
    first, *parts = label.split(" · ")
    lines = [first]
    for part in parts:
        if len(lines) > 1 and len(lines[-1]) + 3 + len(part) <= width + 4:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines


def escape_markdown(text: str) -> str:
    """Return a text that markdown shows literally, on one line: no markup, no HTML, no link."""
    return re.sub(r"([\\`*_\[\]<>|#!~])", r"\\\1", " ".join(text.split()))
