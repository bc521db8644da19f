"""Real MLflow servers on the loopback interface, to be killed, frozen and started again; and one that only says no."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from cedkv.core.environment import environment_variables

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
NO_POSTGRES = not POSTGRES or importlib.util.find_spec("psycopg2") is None
WITHOUT_POSTGRES = "needs PostgreSQL (apt-get install postgresql) and psycopg2-binary (pip); runs where they are"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def postgres(folder: Path, password: str) -> Iterator[str]:
    """A PostgreSQL server with an empty database ``mlflow`` of the user ``mlflow``; its address.

    It does not run as root: root runs it as the user ``postgres``, who gets the folder. That may not be one of pytest's, which
    shuts everybody else out of its own (whenever another session starts).
    """
    data, port = folder / "data", free_port()
    secret = folder / "password"
    data.mkdir()
    secret.write_text(password)
    user = "postgres" if os.getuid() == 0 else None
    if user:
        for path in (folder, data, secret):
            shutil.chown(path, user)

    def tool(name: str, *arguments: str) -> None:
        environment = {**environment_variables(), "PGPASSWORD": password}
        command = [str(POSTGRES[-1] / name), *arguments]
        subprocess.run(command, check=True, user=user, cwd=data, env=environment, stdout=subprocess.DEVNULL)

    tool("initdb", "-D", str(data), "-U", "mlflow", "-A", "scram-sha-256", "--pwfile", str(secret))
    tool("pg_ctl", "-D", str(data), "-w", "-o", f"-p {port} -h 127.0.0.1 -k {data}", "-l", str(data / "log"), "start")
    try:
        tool("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow")
        yield f"127.0.0.1:{port}"
    finally:
        tool("pg_ctl", "-D", str(data), "-m", "immediate", "stop")


class Server:
    """A server process, with all its workers; its port stays the same when it is started again.

    command: made from the port. health: path that is asked until it is answered. denied: the answer is a 403, as of a server
    that knows only who signs.
    """

    def __init__(
        self,
        folder: Path,
        command: Callable[[int], list[str]],
        environment: Mapping[str, str],
        *,
        health: str = "/health",
        denied: bool = False,
    ) -> None:
        self._folder, self._port, self._health, self._denied = folder, free_port(), health, denied
        self._command, self._environment = command(self._port), dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def log(self) -> str:
        return (self._folder / "server.log").read_text()

    def start(self) -> None:
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, cwd=self._folder, env=self._environment, start_new_session=True
            )
        deadline = time.monotonic() + 300
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError(self.log[-2000:])
            time.sleep(0.1)

    def signal(self, number: signal.Signals) -> None:
        """To the server and all its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}{self._health}", timeout=10) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            return self._denied and error.code == 403
        except OSError:
            return False


def without_mlflow_settings() -> dict[str, str]:
    """The environment without MLflow's variables and without what is not asked of a server here."""
    environment = {name: value for name, value in environment_variables().items() if not name.startswith("MLFLOW_")}
    # Seven more processes.
    return {**environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def mlflow_server(folder: Path, store: str) -> Server:
    """``mlflow server`` over a store, its artifacts in a folder."""

    def command(port: int) -> list[str]:
        return [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
                "--backend-store-uri", store, "--artifacts-destination", str(folder / "artifacts")]  # fmt: skip

    return Server(folder, command, without_mlflow_settings())


Answer = tuple[int, dict[str, str], bytes]


def rejecting(status: int) -> AbstractContextManager[str]:
    """A server that answers everything with one status."""
    return answering(lambda _: (status, {}, b"no"))


@contextmanager
def answering(answer: Callable[[str], Answer]) -> Iterator[str]:
    """A server whose answers (status, headers, body) are made up from the path of what is asked; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, headers, body = answer(self.path)
            self.send_response(status)
            for header in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(*header)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
