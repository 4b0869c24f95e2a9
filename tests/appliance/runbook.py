"""Documents whose commands are executed: INSTALL.md and the pages of docs/runbooks.

A fenced block says who types it, and where:

    ```sh controller                  on the machine with the checkout
    ```sh anna@m1                     as this user on this machine
    ```sh root@w2 exit 1              it ends with this status; without it: 0
    ```sh anna@m1 within 120 s        repeated until its status and output are right, for so long at most
    ```sh root@w2 by hand             only a person can do it (hardware, a terminal): read, not executed
    ```yaml anna@m1 count.yml         a file that the person writes there; any language but sh and text
    ```text                           right after a block: lines that it prints, in this order; … stands for anything

Other blocks are only read. A runbook has four sections, and its last block, the check, fails before the other blocks
have done their work and succeeds afterwards.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

SECTIONS = ("What you see", "What it means", "What to type", "How you know that it worked")
BLOCK_SECONDS = 1800.0  # a first deploy on slow machines
PAUSE_SECONDS = 0.5
_PLACE = r"controller|[a-z][a-z0-9-]*@[a-z][a-z0-9-]*"
_OPTIONS = re.compile(rf"({_PLACE})(?: exit (\d+))?(?: within (\d+) s)?( by hand)?")
_FILE = re.compile(rf"({_PLACE}) (\S+)")
_MARK = "\x01"  # before the folder that a block ended in, which is the next one's


class Unreadable(Exception):
    """The document does not have the form that is executed."""


class Failed(Exception):
    """A block did not do what its document says."""


@dataclass(frozen=True)
class Block:
    """What one person types at one place, or a file that is written there (`file` is its path then)."""

    source: str  # document:line
    section: str
    place: str
    text: str
    exit_status: int = 0
    within_seconds: float = 0.0
    by_hand: bool = False
    file: str = ""
    output: str = ""


@dataclass(frozen=True)
class Document:
    """A title, the text of each section in order, and the blocks."""

    title: str
    sections: Mapping[str, str]
    blocks: Sequence[Block]

    @property
    def check(self) -> Block:
        """The last block: how one knows that it worked."""
        return self.blocks[-1]

    @property
    def steps(self) -> list[Block]:
        """What is executed before the check."""
        return [block for block in self.blocks[:-1] if not block.by_hand]


class Place(Protocol):
    """Where blocks are executed."""

    def run(self, script: str, timeout_seconds: float) -> tuple[int, str]:
        """Execute a script of bash; gives its exit status and all that it printed."""
        ...


def read(path: Path) -> Document:
    """Read a document. Raises Unreadable, naming file and line."""
    return parse(path.read_text(encoding="utf-8"), path.name)


def read_runbook(path: Path) -> Document:
    """Read a page that must have the four sections, each with something in it, and end in a check."""
    document = read(path)
    if tuple(document.sections) != SECTIONS:
        raise Unreadable(f"{path.name}: its sections are {list(document.sections)}, a runbook's are {list(SECTIONS)}")
    for section, text in document.sections.items():
        if not text.strip():
            raise Unreadable(f"{path.name}: nothing stands under {section!r}")
    for section in SECTIONS[2:]:
        if not any(block.section == section and not block.by_hand for block in document.blocks):
            raise Unreadable(f"{path.name}: {section!r} has no block that can be executed")
    if document.check.section != SECTIONS[3] or document.check.by_hand or document.check.file:
        raise Unreadable(f"{path.name}: its last block is no check under {SECTIONS[3]!r}")
    return document


def parse(text: str, name: str) -> Document:
    """Take a document apart. Raises Unreadable, naming the line."""
    title, section, sections, blocks = "", "", dict[str, str](), list[Block]()
    paragraph, fresh, after_block = "", True, False
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        if line.startswith("```"):
            code = _fenced(lines, f"{name}:{number}")
            if line == "```text" and after_block:
                blocks[-1] = replace(blocks[-1], output=code)
            elif block := _block(line[3:], code, f"{name}:{number}", section):
                _told(block, paragraph)
                blocks.append(block)
            after_block = line not in ("```", "```text")
            sections[section], fresh = sections.get(section, "") + code, True
            continue
        if line.startswith("# "):
            title = line[2:]
        elif line.startswith("## "):
            section = line[3:]
            if section in sections:
                raise Unreadable(f"{name}:{number}: a second section {section!r}")
            sections[section] = ""
        elif line.strip():
            paragraph, fresh, after_block = line if fresh else f"{paragraph} {line}", False, False
            sections[section] = sections.get(section, "") + line + "\n"
        else:
            fresh = True
    if not title:
        raise Unreadable(f"{name}: it has no title")
    return Document(title, {key: value for key, value in sections.items() if key}, blocks)


def _fenced(lines: Iterator[tuple[int, str]], start: str) -> str:
    code = []
    for _, line in lines:
        if line == "```":
            return "".join(each + "\n" for each in code)
        if line.startswith("```"):
            break
        code.append(line)
    raise Unreadable(f"{start}: the block does not end")


def _block(info: str, code: str, source: str, section: str) -> Block | None:
    language, _, rest = info.partition(" ")
    if not rest and language != "sh":
        return None
    if language == "sh":
        if not (found := _OPTIONS.fullmatch(rest)):
            raise Unreadable(f"{source}: ```{info}: write ```sh PLACE, then exit N, within N s or by hand")
        status, seconds = int(found[2] or 0), float(found[3] or 0)
        return Block(source, section, found[1], code, status, seconds, bool(found[4]))
    if not (found := _FILE.fullmatch(rest)):
        raise Unreadable(f"{source}: ```{info}: write ```{language} PLACE FILE")
    return Block(source, section, found[1], code, file=found[2])


def _told(block: Block, paragraph: str) -> None:
    """A browser does not show what stands after the fence, so the text above must say it as well."""
    user, at, machine = block.place.partition("@")
    words = [user, machine] if at else [user]
    words += [f"status {block.exit_status}"] if block.exit_status else []
    words += ["(?:seconds?|minutes?|until)"] if block.within_seconds else []
    for word in words:
        if not re.search(rf"\b{word}\b", paragraph):
            raise Unreadable(f"{block.source}: the text above does not say {word!r}, as the fence does")


def substituted(block: Block, names: Mapping[str, str]) -> Block:
    """The block with the names of the document replaced by those of the machines that are there."""
    if not names:
        return block
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w.])(?:{words})(?!\w)")

    def swap(text: str) -> str:
        return pattern.sub(lambda found: names[found[0]], text)

    return replace(block, text=swap(block.text), output=swap(block.output), file=swap(block.file))


def once(block: Block) -> Block:
    """The same block without patience."""
    return replace(block, within_seconds=0.0)


def execute(blocks: Sequence[Block], places: Mapping[str, Place], names: Mapping[str, str] | None = None) -> None:
    """Execute the blocks one after another. Raises Failed, naming the block, what it printed and what was expected."""
    for block in blocks:
        if not block.by_hand:
            execute_block(block, places, names)


def execute_block(block: Block, places: Mapping[str, Place], names: Mapping[str, str] | None = None) -> str:
    """Execute one block until it is as its document says, or its time is over; gives what it printed."""
    block = substituted(block, names or {})
    place = places[block.place]
    deadline = time.monotonic() + block.within_seconds
    while True:
        status, output = place.run(script_of(block), BLOCK_SECONDS)
        missing = missing_line(block.output, output)
        if status == block.exit_status and missing is None:
            return output
        if time.monotonic() > deadline:
            break
        time.sleep(PAUSE_SECONDS)
    wrong = f"exit status {status}, not {block.exit_status}" if status != block.exit_status else f"no line {missing!r}"
    raise Failed(f"{block.source} ({block.place}): {wrong}\n{block.text}--- printed:\n{output[-6000:]}")


def script_of(block: Block) -> str:
    """What the shell gets: the text, or the writing of the file."""
    if not block.file:
        return block.text
    return f"cat >{shlex.quote(block.file)} <<'END_OF_FILE'\n{block.text}END_OF_FILE\n"


def missing_line(expected: str, output: str) -> str | None:
    """The first expected line that the output does not have after those before it; None: it has all."""
    printed = iter(line.strip() for line in output.splitlines())
    for line in filter(None, (line.strip() for line in expected.splitlines())):
        words = [r"\s+".join(re.escape(word) for word in part.split()) for part in line.split("…")]
        pattern = re.compile(r"\s*.*\s*".join(words))
        if not any(pattern.fullmatch(each) for each in printed):
            return line
    return None


@dataclass
class Shell:
    """A place that is reached by a command: [] for this machine, ["podman", "exec", …], ["ssh", …] (`quoted`).

    Each block starts in the folder that the one before has changed to, as with a person's terminal.
    """

    prefix: Sequence[str] = ()
    folder: str = "."
    quoted: bool = False
    environment: Mapping[str, str] | None = field(default=None, repr=False)
    log: Path | None = None

    def run(self, script: str, timeout_seconds: float = BLOCK_SECONDS) -> tuple[int, str]:
        """Execute a script of bash that ends at its first failing command."""
        whole = "exec 2>&1\n"  # podman exec would bring the two streams one after the other, as it likes
        whole += f"cd {shlex.quote(self.folder)} || exit\nset -eo pipefail\n"
        whole += f'trap \'printf "{_MARK}%s" "$PWD"\' EXIT\n{script}'
        command = ["bash", "-lc" if self.prefix else "-c", whole]  # our own environment is as it should be
        if self.quoted:
            command = [shlex.join(command)]
        process = subprocess.Popen(
            [*self.prefix, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self.environment,
            start_new_session=True,
        )
        try:
            printed, status = process.communicate(timeout=timeout_seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            printed, status = process.communicate()[0] + f"\nnot done after {timeout_seconds:.0f} s".encode(), -1
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if self.log:
            with self.log.open("ab") as log:
                log.write(f"\n$ {' '.join(self.prefix)} status {status}\n{script}\n".encode() + printed)
        output, mark, folder = printed.decode(errors="replace").rpartition(_MARK)
        if mark:
            self.folder = folder
        return status, output if mark else folder
