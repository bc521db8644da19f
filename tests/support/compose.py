"""The services of compose.yaml as processes of this machine: their own commands and environment, other addresses.

The images are not there, so PostgreSQL is the one that is installed, and nanio, which checks signatures as S3 does, takes the
place of the S3 gateway.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from cedkv.core.environment import environment_variables
from tests.support.serving import POSTGRES, Server, postgres, without_mlflow_settings

ROOT = Path(__file__).parents[2]
NO_S3 = any(importlib.util.find_spec(name) is None for name in ("boto3", "nanio"))
SETTINGS = {
    "POSTGRES_PASSWORD": "planted/pass:word@1",
    "S3_ACCESS_KEY": "planted-access-key",
    "S3_SECRET_KEY": "planted-secret-key",
    "MLFLOW_WORKERS": "2",
}
"""What .env holds here."""
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def services() -> dict[str, Any]:
    """The services of compose.yaml, as they stand there."""
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"])


def interpolated(text: str, settings: Mapping[str, str]) -> str:
    """The text with its ``${NAME}``, ``${NAME:-default}`` and ``${NAME:?message}`` replaced, as compose does."""

    def value(match: re.Match[str]) -> str:
        name, operator, argument = match.groups()
        if settings.get(name):
            return settings[name]
        if operator == "-":
            return str(argument)
        raise KeyError(f"{name}: {argument}")

    return _VARIABLE.sub(value, text)


def command_of(name: str, addresses: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a service, with the addresses that its peers have here."""
    service = services()[name]

    def here(text: str) -> str:
        text = interpolated(str(text), SETTINGS)
        for theirs, ours in addresses.items():
            text = text.replace(theirs, ours)
        return text

    command = [here(word) for word in service["command"]]
    program = {"mlflow": [sys.executable, "-m", "mlflow"], "python": [sys.executable]}[command[0]]
    return [*program, *command[1:]], {key: here(value) for key, value in service["environment"].items()}


@dataclass(frozen=True)
class SharedServer:
    """The MLflow server, and the S3 store behind it, whose log has a line a request.

    artifacts: folder with a file an object. database: address of PostgreSQL.
    """

    mlflow: Server
    s3: Server
    artifacts: Path
    database: str

    def dump(self) -> str:
        """Everything that the database holds, as SQL."""
        host, _, port = self.database.partition(":")
        command = [str(POSTGRES[-1] / "pg_dump"), "--host", host, "--port", port, "--username", "mlflow", "--inserts", "mlflow"]
        environment = {**environment_variables(), "PGPASSWORD": SETTINGS["POSTGRES_PASSWORD"]}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@contextmanager
def shared_server(folder: Path) -> Iterator[SharedServer]:
    """The MLflow server of compose.yaml, running, on a database and in a bucket in which nothing was yet."""
    for name in ("s3", "mlflow"):
        (folder / name).mkdir()
    s3 = Server(
        folder / "s3",
        lambda port: [sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", "data"],
        {
            **environment_variables(),
            "NANIO_ACCESS_KEY": SETTINGS["S3_ACCESS_KEY"],
            "NANIO_SECRET_KEY": SETTINGS["S3_SECRET_KEY"],
        },
        health="/",
        denied=True,
    )
    with TemporaryDirectory(prefix="cedkv-postgres-") as own, postgres(Path(own), SETTINGS["POSTGRES_PASSWORD"]) as database:
        s3.start()
        server: Server | None = None
        try:
            addresses = {"postgres:5432": database, "http://s3:7070": s3.uri, "0.0.0.0": "127.0.0.1"}
            for name in ("migrate", "bucket"):
                command, environment = command_of(name, addresses)
                subprocess.run(command, env={**without_mlflow_settings(), **environment}, cwd=folder, check=True)
            _, environment = command_of("mlflow", addresses)
            server = Server(
                folder / "mlflow",
                lambda port: command_of("mlflow", {**addresses, "5000": str(port)})[0],
                {**without_mlflow_settings(), **environment},
            )
            server.start()
            yield SharedServer(server, s3, folder / "s3" / "data", database)
        finally:
            if server is not None:
                server.kill()
            s3.kill()
