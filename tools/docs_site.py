"""Hook of mkdocs (mkdocs.yml): the documents of the checkout, wherever they lie, as pages of one site.

Documents stay where readers of the repository and tests expect them. Here each gets a place in the site; links between
them are led there, and a link to what is no page, such as a job file, becomes its plain text. Some pages are made from
the code (`docs_reference`), the glossary from its section in docs/architecture.md.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))
import docs_reference  # noqa: E402  a script beside this one; mkdocs loads a hook by its path

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
NAMED = {
    "README.md": "index.md",
    "INSTALL.md": "install.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


# Pages that are a section of a document.
SECTIONS = {
    "dashboard.md": ("docs/operations.md", "The dashboard"),
    "why.md": ("docs/operations.md", "Why does it not run?"),
    "glossary.md": ("docs/architecture.md", "Glossary"),
}


def places() -> dict[str, str]:
    """Return the place in the site for each document of the checkout, both relative."""
    found = dict(NAMED)
    for path in CHECKOUT.glob("docs/**/*"):
        if path.is_file():  # pictures, too
            found[path.relative_to(CHECKOUT).as_posix()] = path.relative_to(CHECKOUT / "docs").as_posix()
    for folder, name in (("projects", "examples"), ("mrcore", "packages")):
        for path in CHECKOUT.glob(f"{folder}/*/README.md"):
            found[path.relative_to(CHECKOUT).as_posix()] = f"{name}/{path.parent.name}.md"
    return found


def made() -> dict[str, str]:
    """Return the text of each page that no file holds."""
    pages = {"reference-jobs.md": docs_reference.jobs_page(), "reference-commands.md": docs_reference.commands_page()}
    for place, (source, title) in SECTIONS.items():
        whole = (CHECKOUT / source).read_text(encoding="utf-8")
        pages[place] = f"# {title}\n" + whole.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have a folder in the navigation, `runbooks/`, be all its pages, README first; what is left out comes last."""
    every = {*places().values(), *made()}
    left = sorted(
        (place for place in every if place.endswith(".md")), key=lambda place: (Path(place).name != "README.md", place)
    )

    def whole(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: whole(below) for title, below in entry.items()}
        if isinstance(entry, list):
            return [whole(each) for each in entry]
        named = [place for place in left if place == entry or (entry.endswith("/") and place.startswith(entry))]
        left[:] = [place for place in left if place not in named]
        return named if entry.endswith("/") else entry

    config.nav = whole(config.nav)
    config.nav += [{"More": list(left)}] if left else []
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents that lie outside of docs/, and the pages that are made."""
    for source, place in places().items():
        if not source.startswith("docs/"):
            files.append(File.generated(config, place, abs_src_path=str(CHECKOUT / source)))
    for place, text in made().items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead the links of a page to places of the site."""
    where = places()
    source, _ = SECTIONS.get(page.file.src_uri, ("", ""))
    source = source or next((document for document, place in where.items() if place == page.file.src_uri), "")

    def led(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_sign, anchor = target.partition("#")
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        wanted = next((name for name in (wanted, f"{wanted}/README.md") if name in where), wanted)
        if wanted not in where:
            return text if (CHECKOUT / wanted).exists() else match[0]  # which mkdocs refuses
        place = os.path.relpath(where[wanted], posixpath.dirname(page.file.src_uri) or ".")
        return f"{picture}[{text}]({place}{hash_sign}{anchor})"

    return LINK.sub(led, markdown)
