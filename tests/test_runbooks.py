"""Documents that are executed: their reader and executor."""

from __future__ import annotations

from pathlib import Path

import pytest
from appliance import runbook
from appliance.runbook import Block, Failed, Shell, Unreadable

PAGE = """\
# A lamp is out

## What you see

On w1 as root:

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

On w1 as root:

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
    return runbook.parse(f"# Page\n\nOn the controller:\n\n```{info}\n{text}\n```\n{after}", "page.md").blocks[0]


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
