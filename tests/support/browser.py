"""Open a page in a real browser and read what it shows."""

from __future__ import annotations

import base64
import hashlib
import html as html_module
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.support.waiting import PATIENCE

FRAME = """<!doctype html><pre id="said"></pre><script>
addEventListener("message", (event) => { document.getElementById("said").textContent = JSON.stringify(event.data); });
const frame = Object.assign(document.createElement("iframe"), { sandbox: "allow-scripts", width: 1000, height: 600 });
frame.src = URL.createObjectURL(new Blob([PAGE], { type: "text/html" }));
document.body.append(frame);
</script></body>"""
"""A page as MLflow's artifact pane shows it: a blob in a sandboxed frame. ``said`` is what its probe posts to ``parent``."""


def opened(
    chromium: str, folder: Path, text: str, address: str = "", probe: str = "", width: int = 1280, framed: bool = False
) -> str:
    """The page's elements once its script has run; ``probe`` is a script of the test's own that runs last.

    ``framed`` opens ``FRAME`` with the page in it.

    Raises:
        AssertionError: anything on the browser's console.
    """
    if probe:
        digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
        text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        text = text.replace("</body>", f"<script>{probe}</script></body>")
    if framed:
        text = FRAME.replace("PAGE", json.dumps(text).replace("</", "<\\/"))
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=2000",
        "--enable-logging=stderr", "--v=0", f"--window-size={width},900", f"--user-data-dir={folder / 'profile'}",
        f"{file.as_uri()}#{address}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    console = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout.decode("utf-8", errors="replace")


def text_of(dom: str, element: str) -> str:
    found = re.search(rf'id="{element}"[^>]*>([^<]*)<', dom)
    assert found, element
    return html_module.unescape(found[1])


def listed(dom: str) -> list[str]:
    return re.findall(r'data-id="([^"]*)"', dom)


def probed(dom: str) -> Any:
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, "the probe did not finish"
    return json.loads(html_module.unescape(found[1]))
