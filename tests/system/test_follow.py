"""Logs that grow and turn round are read on, each byte once; over a shell it is the same as here."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrcore.errors import ClusterFault
from mrcore.launchers import ssh
from mrcore.system.follow import Growth, Lines, Position, read_on
from mrcore.system.logs import MIN_LOG_BYTES, BoundedLog


def over_a_shell(file: Path, since: Position | None, back_bytes: int = 0) -> Growth | None:
    command = ssh.reading_on(file.parent, {file.stem: since}, back_bytes)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    return ssh.grown(done.stdout).get(file.stem)


WAYS = pytest.mark.parametrize("read", [read_on, over_a_shell])


@WAYS
def test_each_byte_comes_once_also_when_the_log_turns_round(read: object, tmp_path: Path) -> None:
    file, seen, written = tmp_path / "S_0.log", b"", b""
    assert callable(read) and read(file, None) is None
    file.write_bytes(b"before\n")
    at = read(file, None).position
    for number in range(12):
        line = b"%d %s\n" % (number, b"x" * number)
        with file.open("ab") as log:
            log.write(line)
        written += line
        if number % 4 == 3:
            os.replace(file, f"{file}.1")
            file.write_bytes(b"new %d\n" % number)
            written += b"new %d\n" % number
        if number % 3 == 0 or number % 4 == 3:
            grown = read(file, at)
            seen, at = seen + grown.data, grown.position
    assert seen == written
    assert read(file, at).data == b""


@WAYS
def test_it_begins_at_the_end_or_a_little_before(read: object, tmp_path: Path) -> None:
    file = tmp_path / "S_0.log"
    file.write_bytes(b"0123456789")
    assert callable(read)
    assert [read(file, None, back).data for back in (0, 3, 99)] == [b"", b"789", b"0123456789"]
    os.truncate(file, 4)
    assert read(file, Position(file.stat().st_ino, 10)).position.offset == 4


def test_a_bounded_log_is_followed_while_it_turns_round(tmp_path: Path) -> None:
    file, seen, whole = tmp_path / "S_0.log", list[bytes](), Lines()
    log = BoundedLog(file, MIN_LOG_BYTES)
    grown = read_on(file, None)
    lines = [b"%06d %s\n" % (number, b"y" * 90) for number in range(12_000)]
    for first in range(0, len(lines), 1000):
        log.write(b"".join(lines[first : first + 1000]))
        log.settle()
        assert grown
        grown = read_on(file, grown.position)
        assert grown
        seen += whole.of(grown.data)
    assert Path(f"{file}.1").exists() and seen == lines


@given(st.lists(st.binary(max_size=9)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_are_whole_however_they_are_cut(pieces: list[bytes]) -> None:
    whole, text = Lines(), b"".join(pieces)
    assert b"".join(line for piece in pieces for line in whole.of(piece)) == text[: text.rfind(b"\n") + 1]


@pytest.mark.parametrize("answer", ["S_0 1 2 =AA==", "S_0 x 2 = =", "S_0 1 2 = =!", "nonsense"])
def test_an_answer_that_cannot_be_one_is_a_fault(answer: str) -> None:
    with pytest.raises(ClusterFault, match="cannot be used"):
        ssh.grown(answer)
