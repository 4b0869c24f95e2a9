"""Pages of docs/runbooks and INSTALL.md: they have the form that is executed, and name only what there is.

That their commands work is tested against living containers (tests/appliance).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from appliance import runbook
from appliance.runbook import Block, Failed, Shell, Unreadable

from mrcore.cli.main import cli

PROJECT = Path(__file__).resolve().parents[2]
FOLDER = PROJECT / "docs/runbooks"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
EXECUTED = [*PAGES, *PROJECT.glob("INSTALL.md")]
VERBS = [
    "deploy", "start", "stop", "kill", "status", "add-node", "remove-node", "upgrade", "rotate-certs", "doctor",
    "collect-logs", "reset",
]  # fmt: skip
PAGE = """\
# A lamp is out

## What you see

On w1 as root (status 1):

```sh root@w1 exit 1
test -e lamp
```

## What it means

Nobody has lit it.

## What to type

On w1 as root:

```sh root@w1
touch lamp
echo lit
```
```text
l…t
```

## How you know that it worked

Within 5 seconds, on w1 as root:

```sh root@w1 within 5 s
test -e lamp
```
"""


def local(folder: Path) -> dict[str, Shell]:
    return {"root@w1": Shell(folder=str(folder)), "controller": Shell(folder=str(folder))}


# --- the reader and executor ---


def test_a_page_is_read_and_executed_and_its_check_turns_green(tmp_path: Path) -> None:
    document = runbook.parse(PAGE, "lamp.md")
    places = local(tmp_path)
    assert document.title == "A lamp is out"
    assert tuple(document.sections) == runbook.SECTIONS
    red = runbook.substituted(document.check, {})
    assert places["root@w1"].run(red.text)[0] == 1
    runbook.execute(document.steps, places)
    runbook.execute([document.check], places)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("## What it means\n\nNobody has lit it.\n", "", "its sections are"),
        ("Nobody has lit it.\n", "", "nothing stands under 'What it means'"),
        ("## What it means", "## What you see", "a second section"),
        ("touch lamp\necho lit\n```", "touch lamp", "the block does not end"),
        ("root@w1 within 5 s", "root@w1 by hand", "has no block that can be executed"),
        ("sh root@w1\ntouch", "sh\ntouch", "write ```sh PLACE"),
        ("exit 1", "exit soon", "write ```sh PLACE"),
        ("sh root@w1 exit 1", "yaml root@w1", "write ```yaml PLACE FILE"),
        ("sh root@w1 exit 1", "sh root@w2 exit 1", "does not say 'w2'"),
        ("sh root@w1 exit 1", "sh anna@w1 exit 1", "does not say 'anna'"),
        ("(status 1)", "", "does not say 'status 1'"),
        ("Within 5 seconds, on", "On", "does not say .*seconds"),
        ("# A lamp is out\n", "", "no title"),
    ],
)
def test_a_page_of_another_form_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert PAGE.count(old) >= 1
    (tmp_path / "page.md").write_text(PAGE.replace(old, new, 1))
    with pytest.raises(Unreadable, match=message):
        runbook.read_runbook(tmp_path / "page.md")


def test_a_block_that_does_not_end_is_refused() -> None:
    with pytest.raises(Unreadable, match=r"page\.md:3: the block does not end"):
        runbook.parse("# Page\n\n```sh controller\ntrue\n", "page.md")


def block(text: str, info: str = "sh controller", after: str = "") -> Block:
    return runbook.parse(
        f"# Page\n\nOn the controller, within seconds, status 3:\n\n```{info}\n{text}\n```\n{after}", "page.md"
    ).blocks[0]


def test_a_wrong_exit_status_fails_and_shows_what_was_printed(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"page.md:5 \(controller\): exit status 3, not 0(.|\n)*printed:\noh dear"):
        runbook.execute([block("echo oh dear; (exit 3)")], local(tmp_path))
    runbook.execute([block("(exit 3)", "sh controller exit 3")], local(tmp_path))


def test_a_block_ends_at_its_first_failing_command(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="exit status 1"):
        runbook.execute([block("false\ntrue")], local(tmp_path))
    with pytest.raises(Failed, match="exit status 1"):
        runbook.execute([block("false | true")], local(tmp_path))


def test_expected_lines_must_come_in_their_order(tmp_path: Path) -> None:
    places = local(tmp_path)
    runbook.execute([block("printf 'a\\nb  1\\nc\\n'", after="```text\na\nb …\n```\n")], places)
    with pytest.raises(Failed, match="no line 'a'"):
        runbook.execute([block("printf 'a\\nb\\n'", after="```text\nb\na\n```\n")], places)


def test_a_block_within_a_time_is_repeated(tmp_path: Path) -> None:
    counting = block("echo x >>times; test $(wc -l <times) = 3", "sh controller within 30 s")
    runbook.execute([counting], local(tmp_path))
    assert (tmp_path / "times").read_text() == "x\nx\nx\n"


def test_a_folder_that_a_block_changes_to_is_the_next_ones(tmp_path: Path) -> None:
    places = local(tmp_path)
    runbook.execute([block("mkdir sub; cd sub"), block("touch here")], places)
    assert (tmp_path / "sub/here").exists()


def test_files_are_written_and_names_substituted(tmp_path: Path) -> None:
    file = block("address: 10.0.0.2 # not 10.0.0.21\n$HOME 'prod'", "yaml controller hosts-w1.yml")
    runbook.execute([file], local(tmp_path), {"10.0.0.2": "10.0.0.21", "10.0.0.21": "::1", "w1": "one", "prod": "test"})
    assert (tmp_path / "hosts-one.yml").read_text() == "address: 10.0.0.21 # not ::1\n$HOME 'test'\n"


def test_what_is_done_by_hand_is_not_executed(tmp_path: Path) -> None:
    runbook.execute([block("touch here", "sh controller by hand")], local(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_block_that_does_not_end_in_time_fails(tmp_path: Path) -> None:
    status, output = Shell(folder=str(tmp_path)).run("echo begun; exec sleep 600", 0.5)
    assert status == -1
    assert output == "begun\n\nnot done after 0 s"


def test_shells_that_need_quoting_get_it(tmp_path: Path) -> None:
    shell = Shell(["sh", "-c", 'eval "$1"', "sh"], str(tmp_path), quoted=True)
    assert shell.run("echo \"a 'b'\" $((1 + 1))") == (0, "a 'b' 2\n")


# --- the pages ---


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_have_the_form_of_a_runbook(path: Path) -> None:
    runbook.read_runbook(path)


def test_after_an_intrusion_the_machine_that_is_cut_off_leaves_before_the_rotation() -> None:
    """No rotation goes past a node that does not answer: in the other order the page would end there."""
    typed = [each.file or each.text for each in runbook.read_runbook(FOLDER / "suspected-intrusion.md").steps]
    order = ["make remove-node INVENTORY=prod NODE=w3 DATA=abandon", "inventory/prod/hosts.yml", "make rotate-certs"]
    places = [next(number for number, text in enumerate(typed) if wanted in text) for wanted in order]
    assert (
        places == sorted(places)
        and "w3" not in runbook.read_runbook(FOLDER / "suspected-intrusion.md").steps[places[1]].text
    )


def test_every_verb_has_its_page_and_the_index_lists_all() -> None:
    assert {f"{verb}.md" for verb in VERBS} <= {path.name for path in PAGES}
    listed = re.findall(r"\]\(([a-z-]+\.md)\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert sorted(set(listed)) == [path.name for path in PAGES]


def test_every_page_has_its_fault() -> None:
    """The proofs bring it about; `deploy` is what sets their cluster up."""
    tried = re.findall(r'^    "([a-z-]+)": ', (PROJECT / "tests/appliance/faults.py").read_text(), re.MULTILINE)
    assert {*tried, "deploy"} == {path.stem for path in PAGES}


def test_the_index_names_what_is_not_executed() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8").partition("## Not executed")[2]
    for path in PAGES:
        if any(block.by_hand for block in runbook.read(path).blocks):
            assert f"({path.name})" in text, f"{path.name} has steps by hand, which the index does not tell"


def code_of(path: Path) -> list[str]:
    """Lines of the blocks that are typed, and what stands in backquotes."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    typed = [line for block in runbook.read(path).blocks if not block.file for line in block.text.splitlines()]
    return [*typed, *re.findall(r"`([^`\n]+)`", text)]


def calls(path: Path, program: str) -> Iterator[list[str]]:
    """The words after each call of `program`, up to a pipe or the like."""
    for line in code_of(path):
        words = _words(line)
        for index, word in enumerate(words):
            if word == program and words[index - 1 : index] != ["-u"]:  # a user is called mrcore as well
                rest = words[index + 1 :]
                ends = [place for place, each in enumerate(rest) if set(each) & set("|&;()<>")]
                yield rest[: ends[0]] if ends else rest


def _words(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return line.split()


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_commands_and_options_exist(path: Path) -> None:
    for words in calls(path, "mrcore"):
        node: click.Command = cli
        rest = iter(words)
        for word in rest:
            if word.startswith("-"):
                name, equals, _ = word.partition("=")
                option = next((each for each in node.params if name in each.opts), None)
                assert option or name in ("--help", "-h"), f"{path.name}: mrcore {' '.join(words)}: no option {name}"
                if isinstance(option, click.Option) and not option.is_flag and not equals:
                    next(rest, None)
            elif isinstance(node, click.Group) and re.fullmatch("[a-z-]+", word):
                assert word in node.commands, f"{path.name}: mrcore {' '.join(words)}: no command {word}"
                node = node.commands[word]


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_targets_and_variables_of_make_exist(path: Path) -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*(?: [a-z][a-z-]*)*):", makefile, re.MULTILINE))
    targets = {name for each in targets for name in each.split()}
    for words in calls(path, "make"):
        for word in words:
            name, equals, _ = word.partition("=")
            if equals:
                assert re.search(rf"\b{name}\b", makefile), f"{path.name}: make knows no {name}"
            else:
                assert word in targets, f"{path.name}: make {word}"


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_playbooks_units_and_variables_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\bansible/[\w.-]+", text):
        assert (PROJECT / name).is_file(), name
    files = [each for top in ("roles", "ansible", "inventory/sample") for each in (PROJECT / top).rglob("*")]
    known = "\n".join(each.read_text(encoding="utf-8") for each in files if each.is_file() and each.suffix != ".pyc")
    names = "\n".join(each.name for each in files) + known
    for unit in set(re.findall(r"\bmrcore-[a-z]+(?:@S_\d+|\.(?:service|timer))", text)):
        assert unit.partition("@")[0] in names, f"{path.name}: no unit {unit}"
    for variable in set(re.findall(r"\bmrcore_[a-z_]+", text)):
        assert re.search(rf"\b{variable}\b", known), f"{path.name}: no variable {variable}"
