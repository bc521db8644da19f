"""What messages leave out, and what they keep: credentials by their place, secrets by their strength, remedies by their end."""

from __future__ import annotations

import pytest

from cedkv.core.text import one_line, redact, sanitize, shorten

ORDINARY = "random_span · attention · 20241126 · float32 · a1 · /data/select/me"


@pytest.mark.parametrize("weak", ["a", "1", "e", "select", "random", "attention", "20241126", "float32"])
def test_a_weak_password_blanks_no_part_of_ordinary_values(weak: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is used as a credential its place shows it, however weak it is."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", weak)
    assert redact(ORDINARY) == ORDINARY
    assert redact(f"http://me:{weak}@host/x password={weak} 'password': '{weak}'") == (
        "http://host/x password=*** 'password': '***'"
    )


@pytest.mark.parametrize("strong", ["pa55word!", "hf_abcdefgh", "AKIAIOSFODNN7EXAMPLE", "abcdefghijklmnop", "tr0ub4dor&3"])
def test_a_secret_that_is_no_word_is_removed_wherever_it_stands(strong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", strong)
    assert redact(f"x{strong}y and {strong}") == "x***y and ***"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE", "MY_TOKEN_FILE_PATH", "PASSWORD_STORE_DIR", "hf_token_path", "TOKEN_HOME"],
)
def test_where_a_secret_is_kept_is_no_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/home/me/.cache/token-1")
    assert redact("/home/me/.cache/token-1/model") == "/home/me/.cache/token-1/model"


@pytest.mark.parametrize("name", ["HF_TOKEN", "PATH_TOKEN", "TOKEN_FILE_SECRET", "FILE_PASSWORD", "MY_API_KEY", "PGPASSWORD"])
def test_a_secret_named_after_a_file_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "abcdefg-12345")
    assert redact("(abcdefg-12345)") == "(***)"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("http://u:p@h/x", "http://h/x"),
        ("http://u:p/a@h/x", "http://h/x"),
        ("http://u:p@a@h", "http://h"),
        ("http://u:p@ss/word@h/x", "http://h/x"),
        ("http://u:p#x@h", "http://h"),
        ("http://u:p?x@h/q", "http://h/q"),
        ("http://u:p//x@h/", "http://h/"),
        ("http://u:@h http://:p@h http://token@h", "http://h http://h http://h"),
        ("http://a/?u=http://u:p@h/x", "http://a/?u=http://h/x"),
        ("postgresql://me:1@h/db", "postgresql://h/db"),
    ],
)
def test_credentials_of_an_address_are_removed_whatever_is_in_them(text: str, left: str) -> None:
    assert redact(text) == left


@pytest.mark.parametrize(
    "text",
    ["http://h:5000/a@b", "http://[::1]:5000/a@b", "https://github.com/o/r@v1", "sqlite:////data/a@b.db", "s3://b/k@x",
     "http://h/x?mail=a@b", "http://h:5000", "see http://h:5000, then a@b", "u:p@h"],
)  # fmt: skip
def test_an_address_without_credentials_stays(text: str) -> None:
    assert redact(text) == text


def test_a_long_message_keeps_its_cause_and_its_remedy() -> None:
    message = f"510 The store is in maintenance mode.\n{'It says why. ' * 400}\nSet X=true to opt out of this."
    for shown, limit in ((one_line(ValueError(message)), 600), (sanitize(message), 4000), (shorten(message, 100), 100)):
        assert len(shown) == limit
        assert shown.startswith("510 The store is in maintenance mode.")
        assert shown.endswith("Set X=true to opt out of this.")
    assert one_line(" a\n b ") == "a b"
