"""MLflow's store by its address: what is wrong with it is told at once, and by its name. Without mlflow."""

from __future__ import annotations

import os
import stat
from contextlib import closing, suppress
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import quote, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # not in typeshed

from cedkv.core.errors import ConfigError
from cedkv.core.text import one_line, redact

_SQLITE = "sqlite:///"


def database_file(uri: str) -> Path | None:
    """Return the file of an SQLite store; None for a store of any other kind, or in memory."""
    name = uri.partition("?")[0].removeprefix(_SQLITE)
    return Path(name) if uri.startswith(_SQLITE) and name and not name.startswith((":", "file:")) else None


def check_database(uri: str) -> Path | None:
    """Return what ``database_file`` returns; the folder of a database that is to be made is made.

    MLflow tries a file that is no database again and again, for 100 seconds.

    Raises:
        ConfigError: the file is no database, or cannot be read.
    """
    path = database_file(uri)
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        problem = _problem(path)
    except OSError as error:
        problem = f"cannot be opened ({error.strerror})"
    if problem is not None:
        raise ConfigError(
            f"MLflow's store {path.absolute()} {problem}, so no run can be logged: move it away, or set MLFLOW_TRACKING_URI to "
            "another one"
        )
    return path


def _problem(path: Path) -> str | None:
    import sqlite3

    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "is a link to nothing" if path.is_symlink() else None
    if not stat.S_ISREG(mode):
        return "is a folder, not a database" if stat.S_ISDIR(mode) else "is no file, and no database"
    if not os.access(path, os.R_OK):
        return "cannot be read by this user"
    try:
        # by SQLite itself: to open and close the file here would release the locks of other connections of this process
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, timeout=0)) as connection:
            connection.execute("PRAGMA schema_version")
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return f"is no SQLite database, or is damaged ({error})"
    return None


def explain(error: object, uri: str) -> str:
    """Return what an error of MLflow says, in one line, and which proxy stands before a server that was not reached."""
    text = one_line(error)
    with suppress(ValueError):  # an address that no proxy would be asked for
        return text + _proxy_hint(uri, text)
    return text


def _proxy_hint(uri: str, text: str) -> str:
    parts = urlsplit(uri)
    host, scheme = parts.hostname, parts.scheme
    if host is None or scheme not in ("http", "https"):
        return ""
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY")
    variable = next((name for name in names if os.environ.get(name)), None)
    unproxied = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if variable is None or proxy_bypass_environment(f"{host}:{parts.port or ''}", {"no": unproxied}):
        return ""
    if "proxy" not in text.lower() and (not _is_near(host) or "refused" in text):
        return ""
    return (
        f"; {variable} = {redact(os.environ[variable])} stands before {host}: set NO_PROXY="
        f"{','.join(filter(None, (unproxied, host)))} to reach it without that proxy"
    )


def _is_near(host: str) -> bool:
    """Return whether a host is this machine, or one of its network, which a proxy seldom reaches."""
    try:
        return ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith(".localhost")
