"""docs/tutorial.md, typed on a terminal as it stands: every command, every file, in one home."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from checkout import text_of
from daemons import own_address
from screen import Terminal

FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
STATUS = re.compile(r"# exit status (\d+)$")


def steps(text: str) -> list[tuple[str, str]]:
    """What a reader does, in order: ("type", a command), ("write", a file with its path in the first line), ("see", a
    line of output)."""
    found: list[tuple[str, str]] = []
    at = 0
    for fence in FENCE.finditer(text):
        found += [("type", line[4:]) for line in text[at : fence.start()].splitlines() if line.startswith("    ")]
        at = fence.end()
        if fence[1] == "text":
            found += [("see", line) for line in fence[2].splitlines()]
        else:
            found.append(("write", fence[2]))
    return found + [("type", line[4:]) for line in text[at:].splitlines() if line.startswith("    ")]


def script_of(text: str, staged: Path) -> str:
    """The whole as a script of bash that ends with 9 at the first command that does not end as the text says."""
    lines = []
    for number, (what, content) in enumerate(steps(text)):
        if what == "write":
            path = content.split("\n")[0].removeprefix("# ")
            (staged / str(number)).write_text(content)
            lines.append(f"cp {staged / str(number)} {shlex.quote(path)}")
        elif what == "type":
            expected = STATUS.search(content)
            lines += [f"echo {shlex.quote('$ ' + content)}", content]
            lines.append(f's=$?; [ $s = {expected[1] if expected else 0} ] || {{ echo "ended with $s"; exit 9; }}')
        else:
            lines.append(f"echo {shlex.quote('EXPECTED ' + content)}")
    return "\n".join(lines)


@pytest.mark.slow
def test_the_tutorial_leads_from_a_text_to_a_workflow(tmp_path: Path) -> None:
    text = text_of("docs/tutorial.md")
    assert len(FENCE.findall(text)) > 10
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "staged").mkdir()
    home = tmp_path / "tutorial/home"
    home.mkdir(parents=True)
    (home / "cluster.json").write_text(json.dumps({"address": own_address()}))
    own_address()  # the second node's
    script = script_of(text, tmp_path / "staged")
    terminal = Terminal(["bash", "-c", script], columns=160, cwd=tmp_path, env={"MRCORE_CONFIG": ""})
    try:
        assert terminal.wait(280) == 0, terminal.output[-3000:]
    finally:
        terminal.kill()
    lines = terminal.screen()
    missing, since = [], 0  # what the text shows must have come since it showed something before
    for number, line in enumerate(lines):
        if line.startswith("EXPECTED "):
            wanted = line.removeprefix("EXPECTED ")
            missing += [] if any(each.startswith(wanted) for each in lines[since:number]) else [wanted]
            since = (
                since if lines[number + 1 : number + 2] != [] and lines[number + 1].startswith("EXPECTED ") else number
            )
    assert missing == [], "\n".join(lines)
