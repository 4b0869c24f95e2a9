"""The documents as a site (`make docs`), and the pages that are made from the code."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from checkout import PROJECT, commands, module

from mrcore.cli.main import cli
from mrcore.queue import job as jobs


class Page(HTMLParser):
    """What a page leads to, what it loads, and the places in it that something can lead to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found["id"]} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif "src" in found or (tag == "link" and "href" in found):
            self.loads.append(found.get("src") or found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: strictly."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_every_link_and_anchor_of_the_site_leads_somewhere_and_nothing_is_loaded_from_the_network(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    assert len(pages) > 50
    for path, page in pages.items():
        assert [each for each in page.loads if re.match(r"(https?:)?//", each)] == [], path
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", target) or path.name == "404.html":
                continue
            aim = (path.parent / unquote(target)).resolve() if target else path
            assert aim.exists(), f"{path.relative_to(site)}: {link}"
            if anchor and aim in pages:
                assert unquote(anchor) in pages[aim].anchors | {"__skip"}, f"{path.relative_to(site)}: {link}"


@pytest.mark.slow
def test_the_first_page_is_the_readme_and_no_link_of_it_got_lost(site: Path) -> None:
    shown = (site / "index.html").read_text(encoding="utf-8")
    assert "A job from nothing to its output" in shown and "](" not in re.sub(r"<code>.*?</code>", "", shown)
    assert {"install.html", "changelog.html", "runbooks/index.html"} <= set(Page(site / "index.html").links)


@pytest.mark.parametrize("path", sorted(PROJECT.glob("docs/pictures/*.svg")), ids=lambda path: path.stem)
def test_a_picture_fetches_nothing(path: Path) -> None:
    assert not re.search(r"@import|url\(.?(https?:)?//|href=.https?:", path.read_text(encoding="utf-8"))


def test_the_reference_of_jobs_has_every_key_with_its_default() -> None:
    shown = module("tools/docs_reference.py").jobs_page()
    for kind in jobs.MODELS:
        section = shown.split(f"\n## {kind}\n")[1].split("\n## ")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| (?:`([^`]*)`)? ?\| [^|]*\|$", section, re.MULTILINE))
        assert set(rows) == set(jobs.template(kind)) - set(jobs.FILLED)
    assert '| `on_changed_input` | `fail`, `reprocess_all`, `ignore` | `"fail"` |' in shown
    assert "| `number_of_partitions` | whole number from 1 to 65,536 |" in shown


def test_the_reference_of_commands_has_every_command() -> None:
    shown = module("tools/docs_reference.py").commands_page()
    assert set(commands(cli)) <= set(re.findall(r"^## (.*)$", shown, re.MULTILINE))
    assert "--dry-run" in shown.split("## mrcore upload\n")[1].split("\n## ")[0]
