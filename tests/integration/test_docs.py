"""The documentation: pages made from the code are fresh, links lead somewhere, examples run, and the site needs no network."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import yaml
from click.testing import CliRunner

import cedkv
from cedkv.analysis.results import verdict_word
from cedkv.checks.base import all_checks
from cedkv.cli import app
from cedkv.config.extensions import SELECTORS
from cedkv.config.options import OPTIONS
from cedkv.config.resolve import with_values
from cedkv.core.environment import environment_variables
from cedkv.core.files import SCHEMA_VERSION
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))]
SMALL = (
    "runtime.device=cpu,runtime.batch_size=4,eval.on_samples=4,eval.off_samples=4,eval.gate_a_samples=2,eval.n_random_trials=2,"
    "prefix_len=24,select.span_len=4,select.span_budget=3,select.min_span_distance=4"
)


def test_pages_made_from_the_code_are_fresh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``make docs`` writes them."""
    monkeypatch.setattr(sys, "argv", ["reference.py", "--check"])
    monkeypatch.syspath_prepend(str(DOCS))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(DOCS / "reference.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().out


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^(```+)\w*\n.*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Relative ones: to a file of the repository, and to a heading where they name one."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if link.startswith(("https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_menu_has_every_page() -> None:
    def files(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for item in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
                yield from files(item)

    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8").replace("!!python/object/apply:", "!!str #"))["nav"]
    assert sorted(files(menu)) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_api_page_has_every_public_name() -> None:
    listed = re.findall(r"^::: cedkv\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(["__version__", *listed]) == sorted(cedkv.__all__)


def test_every_record_has_its_table() -> None:
    settings = runpy.run_path(str(DOCS / "reference_settings.py"))
    shown = re.findall(r"^<!-- records: (\w+) -->\n\| field", (DOCS / "outputs.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted([*shown, "PrefixRecord"]) == sorted(settings["record_classes"]()), "PrefixRecord is the base of two others"


def test_the_readme_is_short_and_says_what_is_so() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert code in (DOCS / "library.md").read_text(encoding="utf-8"), (
        "the library's page, whose blocks a test runs, begins with it"
    )
    families = json.loads((ROOT / "cedkv" / "models" / "families.json").read_text(encoding="utf-8"))["families"]
    rejected = sum(row["verdict"] == "rejected" for row in families)
    words = " ".join(text.split())
    assert f"{len(families) - rejected} of {len(families)} [model families" in words
    assert f"{rejected} are rejected by name" in words
    assert f"**{len(SELECTORS.builtin)} selectors" in words
    assert f"{sum(check.gate in ('A', 'B') for check in all_checks())} named checks" in words


def test_pages_spell_out_the_recommended_configuration(tmp_path: Path) -> None:
    """Once as keyword arguments, once as a configuration, and once as a file."""
    recommended = cedkv.resolve(ROOT / "configs" / "recommended.yaml")
    library = (DOCS / "library.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^best = (.*)$", library, re.MULTILINE)
    best = ast.literal_eval(line)
    values = {"select.mode": best.pop("selector"), "select.params": best.pop("params")}
    assert with_values(cedkv.Phase2Config(), values | {OPTIONS[name][0]: value for name, value in best.items()}) == recommended
    (call,) = re.findall(r"^recommended = (cedkv\.resolve\(.*?^\))$", library, re.MULTILINE | re.DOTALL)
    assert eval(call) == recommended
    (file,) = re.findall(
        r"^`best.yaml`\n\n```yaml\n(.*?)^```$", (DOCS / "tutorial.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "best.yaml").write_text(file)
    assert cedkv.resolve(tmp_path / "best.yaml") == recommended


@pytest.mark.weights
def test_the_readme_s_python_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    prefix, text = re.findall(r"  # (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out == f"{prefix}\n{ast.literal_eval(text)}\n"


def test_the_tutorial_works_as_it_stands(
    llama_folder: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files, commands and Python in order, on a small model, in a folder that holds nothing else: no checkout is needed.

    The files of its runs are those that docs/outputs.md lists.
    """
    monkeypatch.syspath_prepend(str(tmp_path))
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    session: dict[str, object] = {}
    ran = []
    for name, language, block in re.findall(r"(?:^`([\w.]+)`\n\n)?^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if name:
            Path(name).write_text(block, encoding="utf-8")
        elif language == "python":
            exec(compile(block.replace('"smollm2-135m"', repr(str(llama_folder))), "tutorial.md", "exec"), session)
        elif language == "sh":
            for command in block.replace("\\\n", " ").splitlines():
                words = shlex.split(command.replace("smollm2-135m", str(llama_folder)), comments=True)
                if words[:3] == ["python", "-m", "cedkv"]:
                    done = CliRunner().invoke(app.main, [*words[3:], "--set", f"{SMALL},data.answer=whole"])
                    assert done.exit_code == 0, (command, done.output)
                    ran.append(words[3])
    assert {"data", "--phase", "ablate-selector"} <= set(ran)
    assert "prefix" in session
    folders = list(Path("outputs").iterdir())
    single = next(run for run in map(cedkv.read_run, folders) if run.comparison is None)
    for folder in folders:
        files_are_documented(folder)
    assert single.verdicts.keys() == {"gateA", "gateB", "phase2"}
    metrics_are_documented(single)
    report_is_documented(single)


def files_are_documented(folder: Path) -> None:
    text = (DOCS / "outputs.md").read_text(encoding="utf-8")
    listed = re.findall(r"`([\w./*]+)`", text.partition("## Written again")[0])
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix().removeprefix("tables/")
            assert any(fnmatch(name, pattern) for pattern in listed), name


def report_is_documented(run: cedkv.Run) -> None:
    section = (DOCS / "outputs.md").read_text(encoding="utf-8").partition("## report_phase2.json")[2].partition("\n## ")[0]
    keys = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))))
    assert set(run.report) == keys
    assert run.report["schema_version"] == SCHEMA_VERSION
    assert set(run.verdicts.values()) <= {verdict_word(True), verdict_word(False)}
    for field in run.checks.columns:
        assert f"`{field}`" in section, field


def metrics_are_documented(run: cedkv.Run) -> None:
    rows = re.findall(r"^\| (`phase2_.*?) \|", (DOCS / "metrics.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(run.metrics)


class Resources(HTMLParser):
    """What a page loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        address = given.get("src") or (given.get("href") if tag == "link" else None)
        if address is not None:
            self.found.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings_handlers") is None:
        pytest.skip("mkdocs is not installed; pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**environment_variables(), "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert len(pages) == len(list(DOCS.glob("*.md"))) + 1  # 404.html
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert resources.found, page.name
        for address in resources.found:
            assert not address.startswith(("http:", "https:", "//")), (page.name, address)
            if page.name != "404.html":
                assert (page.parent / address.partition("?")[0].partition("#")[0]).exists(), (page.name, address)
    assert (site / "search" / "search_index.js").stat().st_size > 100_000


PROBE = """
const measured = {};
(async () => {
  for (const page of PAGES) {
    const frame = document.createElement("iframe");
    Object.assign(frame, {width: WIDTH, height: 800, src: page, style: "border: 0"});
    document.body.append(frame);
    await new Promise(loaded => { frame.onload = loaded; });
    await new Promise(laidOut => setTimeout(laidOut, 100));
    const {documentElement: root, body} = frame.contentDocument;
    measured[page] = [root.clientWidth, Math.max(root.scrollWidth, body.scrollWidth)];
    frame.remove();
  }
  const written = document.createElement("pre");
  written.id = "measured";
  written.textContent = JSON.stringify(measured);
  document.body.append(written);
})();
"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_of_the_site_scrolls_sideways(chromium: str, site: Path, tmp_path: Path, width: int) -> None:
    """Wide tables, code and pictures scroll in their own boxes."""
    pages = sorted(page.name for page in site.glob("*.html"))
    probe = PROBE.replace("PAGES", json.dumps(pages)).replace("WIDTH", str(width))
    (site / "probe").write_text(f"<!doctype html><body><script>{probe}</script></body>", encoding="utf-8")
    with serving(site) as address:
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=60000",
                   f"--user-data-dir={tmp_path / 'profile'}", f"{address}/probe"]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True).stdout.decode()
    found = re.search(r'id="measured">([^<]*)<', dom)
    assert found is not None
    measured = json.loads(found[1])
    assert sorted(measured) == pages
    assert all(0 < client <= width for client, _ in measured.values())
    assert {page: widths for page, widths in measured.items() if widths[1] > widths[0]} == {}


@pytest.mark.browser
def test_search_works_in_pages_opened_from_a_disk(chromium: str, site: Path, tmp_path: Path) -> None:
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=20000",
               f"--user-data-dir={tmp_path / 'profile'}", f"{(site / 'index.html').as_uri()}?q=oracle"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=True).stdout.decode()
    found = re.search(r"(\d+) matching documents", dom)
    assert found is not None
    assert int(found[1]) >= 5


class Handler(SimpleHTTPRequestHandler):
    """Serves every file quietly; one without an ending is a page."""

    extensions_map: ClassVar[dict[str, str]] = {**SimpleHTTPRequestHandler.extensions_map, "": "text/html"}

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of a folder, on this machine only."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
