"""docs/promises.md: each promise stands in its document as quoted, and each test that it names is there and runs."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PROJECT = TESTS.parent
TABLE = PROJECT / "docs/promises.md"
PROVED = re.compile(r"`([\w/]+\.py)::(\w+)`")
RUNBOOKS = sorted(path.name for path in (PROJECT / "docs/runbooks").glob("*.md"))
DOCUMENTS = [
    "README.md",
    "INSTALL.md",
    *(f"docs/{name}.md" for name in ("jobs", "python", "operations", "testing", "architecture")),
]


def plain(text: str) -> str:
    """The text with each run of white space as one space, however its lines are broken."""
    return " ".join(text.split())


def sections() -> dict[str, str]:
    """The sections of the table by document."""
    head, *parts = re.split(r"^## (.+)$", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert head.startswith("# ")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows() -> list[tuple[str, str, str]]:
    """Document, quotation and proof of each promise."""
    found = []
    for document, text in sections().items():
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert lines[:2] == ["| promise | proof |", "|---|---|"], f"{document}: {lines[:2]}"
        for line in lines[2:]:
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 2, line
            found.append((document, cells[0], cells[1]))
    return found


@functools.cache
def document(name: str) -> str:
    return plain((PROJECT / name).read_text(encoding="utf-8"))


@functools.cache
def defined_in(name: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((TESTS / name).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def headings(name: str) -> list[str]:
    """The headings of a document, but its title and those in blocks of code."""
    text = re.sub(r"^```.*?^```", "", (PROJECT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^##+ (.+)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", [*DOCUMENTS, *(f"docs/runbooks/{name}" for name in RUNBOOKS)])
def test_each_promise_stands_in_its_document(name: str) -> None:
    quoted = [quotation for where, quotation, _ in rows() if where == name]
    assert quoted, f"{TABLE.name} has no promise of {name}"
    gone = [quotation for quotation in quoted if plain(quotation) not in document(name)]
    assert not gone, (
        f"{name} no longer says this: change the row in {TABLE.name}, and see that its test still fits: {gone}"
    )
    assert len(set(quoted)) == len(quoted)


def test_each_proof_is_a_test_that_runs() -> None:
    faults = []
    for where, quotation, proof in rows():
        named = PROVED.findall(proof)
        if not named:
            reason = re.fullmatch(r"not tested: .{15,}", proof)
            faults += [] if reason else [f"{where}: {quotation}: neither a test nor a reason why there is none"]
        for file, name in named:
            if not (TESTS / file).is_file() or name not in defined_in(file):
                faults.append(f"{where}: {quotation}: there is no {file}::{name}")
            elif any("mark.skip" in ast.unparse(each) for each in defined_in(file)[name].decorator_list):
                faults.append(f"{where}: {quotation}: {file}::{name} is skipped")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_section_of_a_document_has_a_row_or_is_named_as_one_without_promises(name: str) -> None:
    text = (PROJECT / name).read_text(encoding="utf-8")
    (spared,) = re.findall(r"^Without promises: (.+)\.$", sections()[name], flags=re.MULTILINE)
    without = [] if spared == "none" else spared.split("; ")
    parts = re.split(r"^##+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.MULTILINE)
    by_heading = dict(zip(parts[1::2], map(plain, parts[2::2]), strict=True))
    quoted = [plain(quotation) for where, quotation, _ in rows() if where == name]
    empty = [heading for heading, body in by_heading.items() if not any(quotation in body for quotation in quoted)]
    assert sorted(empty) == sorted(without), f"{name}: these sections have no row, or the list of those is not true"


def test_few_promises_are_not_tested() -> None:
    untested = [quotation for _, quotation, proof in rows() if proof.startswith("not tested")]
    assert len(untested) <= 3 and len(rows()) >= 150, untested
