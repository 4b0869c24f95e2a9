"""The documents agree with the code where they could drift away from it."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
from checkout import PROJECT, commands, text_of
from commands import MRCORE
from daemons import made_spec

from mrcore.cli.main import cli
from mrcore.queue import job as jobs
from mrcore.settings.config import LOCAL_SHAPE, Settings
from mrcore.settings.validation import parse_yaml

DOCUMENTS = sorted(
    [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md"), *PROJECT.glob("projects/*/README.md")],
    key=lambda path: str(path),
)
EVERY = sorted({*DOCUMENTS, *PROJECT.glob("docs/**/*.md"), *PROJECT.glob("mrcore/*/README.md")}, key=str)
EVERY += sorted(PROJECT.glob("roles/*/README.md"))
UNITS = {"": 1, "%": 0.01, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20}


def tables(text: str) -> list[list[str]]:
    """The cells of all table rows but the rules under their heads."""
    rows = [line.strip()[1:-1] for line in text.splitlines() if line.startswith("|")]
    return [re.split(r"\s*\|\s*", row.strip()) for row in rows if not set(row) <= set("-| ")]


def words_in_code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_picture_of_packages_is_the_contract_that_is_checked() -> None:
    section = text_of("docs/architecture.md").split("## Packages")[1]
    picture = section.split("```")[1].strip().splitlines()
    layers = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [re.split("  +", line)[0] for line in picture] == layers


def test_every_package_has_a_readme_that_names_its_modules() -> None:
    for folder in {path.parent for path in (PROJECT / "mrcore").glob("*/*.py")}:
        text = (folder / "README.md").read_text(encoding="utf-8")
        missing = [path.name for path in folder.glob("*.py") if path.stem != "__init__" and f"`{path.stem}" not in text]
        assert not missing, f"mrcore/{folder.name}/README.md says nothing of {missing}"


def rpc_methods(module: str, kind: str) -> dict[str, Any]:
    """The names and roles that `methods()` of a daemon gives, without starting it."""
    daemon = getattr(importlib.import_module(f"mrcore.{module}"), kind)
    with tempfile.TemporaryDirectory() as folder:
        spec = made_spec(Path(folder))
        made = daemon(spec) if kind == "NodeAgent" else daemon(spec, None)
        methods: dict[str, Any] = made.methods()
    return methods


@pytest.mark.parametrize(
    ("module", "kind"), [("node.node_agent", "NodeAgent"), ("node.cluster_server", "ClusterServer")]
)
def test_every_rpc_method_has_its_row(module: str, kind: str) -> None:
    title = {"NodeAgent": "**Node agent.**", "ClusterServer": "**Cluster server.**"}[kind]
    section = text_of("docs/architecture.md").split(title)[1].split("\n\n")[1]
    told = {words_in_code(row[0])[0] for row in tables(section) if words_in_code(row[0])}
    assert told == set(rpc_methods(module, kind))


def test_only_health_is_open_to_nodes() -> None:
    """What the documents say of roles."""
    methods = rpc_methods("node.node_agent", "NodeAgent") | rpc_methods("node.cluster_server", "ClusterServer")
    assert {name for name, method in methods.items() if method.role == "member"} == {"health"}


def limits() -> list[tuple[str, str]]:
    rows = [row for row in tables(text_of("docs/architecture.md")) if len(row) == 3 and row[0].startswith("`")]
    found = [(words_in_code(row[0])[0], row[1]) for row in rows]
    return [(name, value) for name, value in found if re.search(r"[a-z_]\.[A-Z]", name)]


@pytest.mark.parametrize(("name", "value"), limits())
def test_limits_are_those_of_the_code(name: str, value: str) -> None:
    place, _, attribute = name.replace(".LIMITS.", ".LIMITS:").rpartition(".")
    found: Any = importlib.import_module(f"mrcore.{place}")
    for part in attribute.split(":"):
        found = getattr(found, part)
    number, _, unit = value.partition(" ")
    assert found == float(number.replace(",", "")) * UNITS[unit], f"docs/architecture.md says {value}"


def test_every_word_of_the_glossary_is_used() -> None:
    """In the package, or in two places of the documents but the glossary itself; and each has one row."""
    text, glossary = text_of("docs/architecture.md").split("## Glossary")
    rows = [re.sub(r" \(.*?\)", "", row[0]).split(", ") for row in tables(glossary)[1:]]
    words = [word for row in rows for word in row]
    assert len(words) > 60 and len(set(words)) == len(words)
    code = "\n".join(path.read_text(encoding="utf-8") for path in PROJECT.glob("mrcore/**/*.py"))
    prose = text + "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS if path.name != "architecture.md")
    for word in words:
        spelt = re.sub("[ -]", "[ _-]", word)
        used = re.compile(rf"(?<![a-z]){spelt}(s|es)?(?![a-z])", re.IGNORECASE)
        assert used.search(code) or len(used.findall(prose)) > 1, f"nobody says {word!r}"
    assert rows == sorted(rows, key=lambda row: row[0].lower()), "in the order of the alphabet"


def test_there_are_limits() -> None:
    assert len(limits()) > 25


def test_every_key_of_a_mapreduce_job_is_explained() -> None:
    rows = [row for row in tables(text_of("docs/jobs.md")) if len(row) == 3]
    told = {name for row in rows for name in words_in_code(row[0])}
    assert set(jobs.template("mapreduce")) <= told, "a key is missing in docs/jobs.md"
    unknown = told - set(jobs.template("mapreduce"))
    assert not unknown, f"docs/jobs.md explains keys that do not exist: {unknown}"


def test_defaults_of_keys_are_those_of_the_template() -> None:
    template = jobs.template("mapreduce")
    for row in tables(text_of("docs/jobs.md")):
        if len(row) == 3 and words_in_code(row[0]) and words_in_code(row[0])[0] in template:
            default = template[words_in_code(row[0])[0]]
            if isinstance(default, bool | int | float | str):
                told = row[1].strip("`")
                assert parse_yaml(told, row[0]) == default, row


def test_every_setting_is_explained() -> None:
    told = {name for row in tables(text_of("docs/operations.md")) for name in words_in_code(row[0])}
    assert (set(Settings.model_fields) | set(LOCAL_SHAPE)) - {"local"} <= told


@pytest.mark.parametrize("command", commands(cli))
def test_every_command_is_documented(command: str) -> None:
    assert re.search(rf"{command}\b", text_of("README.md") + text_of("docs/operations.md"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_no_document_names_a_command_or_option_that_does_not_exist(path: Path) -> None:
    known = set(commands(cli))
    words = r"(?:(?:cluster|ledger) )?[a-z][a-z-]*"
    call = re.compile(rf"^(?:\w+=\S+ )?mrcore (?:--config \S+ )?({words})([^\n]*)", re.MULTILINE)
    for found in call.finditer("\n".join(code_of(path))):
        command = f"mrcore {found[1]}"
        if found[1] == "cluster":
            continue
        assert command in known, f"{path.name}: {found[0]}"
        node: click.Command = cli
        for part in found[1].split():
            assert isinstance(node, click.Group)
            node = node.commands[part]
        options = {name for option in node.params for name in option.opts}
        for option in re.findall(r"(?<!\S)\[?(--[a-z-]+)", found[2].split("  ")[0]):
            assert option in options | {"--help"}, f"{path.name}: {found[0]}"


def code_of(path: Path) -> list[str]:
    """What stands in backquotes, and lines that are indented by four blanks."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (.*)$", text, re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The places in a document that a link may name, as GitHub and the site make them of its titles."""
    plain = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)]
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    assert len(set(slugs)) == len(slugs) or path.name in ("CHANGELOG.md", "promises.md"), "two titles are the same"
    return set(slugs)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_and_their_anchors_lead_somewhere(path: Path) -> None:
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", plain):
        if re.match(r"[a-z]+:", target):
            continue
        aim = path.parent / target if target else path
        assert aim.exists(), target
        if anchor:
            assert anchor in anchors(aim), f"{target}#{anchor}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_documents_name_no_place_of_one_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/work\b|/root\b|/home/\w|\.pyenv", text)
    assert str(PROJECT) not in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    for code in code_of(path):
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
            assert target in targets, f"{path.name}: make {target}"


def test_every_module_has_a_name_that_the_documents_use_rightly() -> None:
    """Names like `Shuffle.append` in the documents exist."""
    places = {
        "Map": "engine.mapper", "Shuffle": "engine.shuffler", "DiskSort": "engine.disk_sort",
        "DiskList": "engine.disk_list", "Reduce": "engine.reducer", "Process": "engine.process",
        "ManageCluster": "cluster.manage_cluster", "Scheduler": "queue.scheduler", "Runner": "queue.runner",
    }  # fmt: skip
    for path in DOCUMENTS:
        for kind, name in re.findall(r"`(\w+)\.(\w+)`", path.read_text(encoding="utf-8")):
            if kind in places:
                assert hasattr(getattr(importlib.import_module(f"mrcore.{places[kind]}"), kind), name), f"{kind}.{name}"


def test_what_contributing_names_is_there() -> None:
    """Paths, modules with their attributes, and parts of the tests."""
    spans = re.findall(r"`([^`\n]+)`", text_of("CONTRIBUTING.md"))
    paths = [span for span in spans if "/" in span and " " not in span and not span.startswith(".venv/")]
    dotted = [span for span in spans if re.fullmatch(r"mrcore(\.\w+)+", span)]
    names = re.findall(r"`(\w+)`[^`]{0,20} \(?`(tests/support/\w+\.py)`", text_of("CONTRIBUTING.md"))
    names += [(name, path) for name, path in re.findall(r"`(\w+)` of `(tests/\S+)`", text_of("CONTRIBUTING.md"))]
    assert len(paths) > 25 and len(dotted) >= 3 and len(names) >= 3
    assert [path for path in paths if not (PROJECT / path).exists()] == []
    for name in dotted:
        assert pkgutil.resolve_name(name), name
    for name, path in names:
        assert re.search(rf"^(def|class) {name}\b", text_of(path), re.MULTILINE), f"{path} has no {name}"
    parts = re.findall(r"PART=(\w+)", text_of("CONTRIBUTING.md") + text_of("docs/testing.md") + text_of("Makefile"))
    assert len(parts) >= 3 and all(list((PROJECT / "tests" / part).glob("test_*.py")) for part in parts), parts


def test_the_first_change_of_contributing_runs(tmp_path: Path) -> None:
    (line,) = re.findall(r"^    \.venv/bin/mrcore (try .*)$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    done = subprocess.run([MRCORE, *line.split()], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and '["MapReduce", ' in done.stdout, done.stderr


def test_the_example_of_the_readme_runs(home: Path, tmp_path: Path) -> None:
    files = {}
    for block in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text_of("README.md"), re.DOTALL):
        files[block[0]] = block[1]
        (tmp_path / block[0]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / block[0]).write_text(block[1])
    job = jobs.validate(parse_yaml(files["longest_words.yml"], "README.md"), tmp_path / "projects")
    (tmp_path / "input.txt").write_text("An ape ate apples.\nBees buzz; bears\nbecame Boring.\n")
    command = [sys.executable, "-c", "from mrcore.cli.main import main; main()", "try", "longest_words", "input.txt"]
    for option, key in (("map", "map_function_name"), ("combine", "combine_function_name")):
        command += [f"--{option}", job[key]]
    command += ["--reduce", job["reduce_function_name"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == '["a", "apples"]\n["b", "boring"]\n', done.stderr


def test_examples_of_python_in_the_documents_compile() -> None:
    for path in DOCUMENTS:
        for code in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            compile(code, str(path), "exec")


@pytest.mark.parametrize("path", sorted(PROJECT.glob("projects/*/job.yml")), ids=lambda path: path.parent.name)
def test_job_files_of_the_projects_are_valid(path: Path) -> None:
    job = jobs.validate(parse_yaml(path.read_bytes(), str(path)), PROJECT / "projects")
    assert job["job_name"] == path.parent.name
    assert (path.parent / "README.md").is_file()
