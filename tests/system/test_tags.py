"""Lines of a task are tagged with time, job, run and task, whatever it prints and however it arrives."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from mrcore.system import tags
from mrcore.system.tags import Tagger, parse_tag

WHOSE = "word_count/3 map-0-1"
HEAD = re.compile(rb"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d word_count/3 map-0-1 \| ")


def untagged(lines: bytes) -> bytes:
    """The lines without their tags, each of which must have one."""
    assert lines == b"" or lines.endswith(b"\n")
    texts = [HEAD.subn(b"", line, count=1) for line in lines.split(b"\n")[:-1]]
    assert all(count == 1 for _, count in texts)
    return b"".join(text + b"\n" for text, _ in texts)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.binary(max_size=20) | st.sampled_from([b"\n", b"\r", b"a\nb\n"])))
def test_however_bytes_arrive_each_line_has_one_tag_and_none_is_lost(pieces: list[bytes]) -> None:
    tagger, printed = Tagger(WHOSE), b"".join(pieces)
    told = b"".join(map(tagger.lines, pieces)) + tagger.rest()
    assert untagged(told) == printed + (b"" if not printed or printed.endswith(b"\n") else b"\n")


def test_a_line_without_end_is_held_up_to_a_bound() -> None:
    tagger = Tagger(WHOSE)
    assert tagger.lines(b"x" * tags.MAX_PARTIAL_BYTES) == b""
    assert untagged(tagger.lines(b"y")) == b"x" * tags.MAX_PARTIAL_BYTES + b"y\n"
    assert tagger.rest() == b""


def test_a_tag_is_read_back_and_other_lines_have_none() -> None:
    line = Tagger("a.b-c/12 reduce-31-2").lines("of | bars é\n".encode()).decode().rstrip("\n")
    found = parse_tag(line)
    assert found is not None
    assert (found.job, found.run, found.task, found.text) == ("a.b-c", 12, "reduce-31-2", "of | bars é")
    for other in ("", "2026-11-27 20:16:10 INFO started", "a b/1 sort-1-1 | x", "a b/x map-1-1 | x", "a b/1 map-1-1|x"):
        assert parse_tag(other) is None


def test_the_lines_of_a_run_come_in_order_of_their_times_and_no_others() -> None:
    late, early = b"2026-11-27T20:16:11 j/1 map-0-1 | late\n", b"2026-11-27T20:16:10 j/1 reduce-0-1 | \xff\n"
    others = [
        b"the server's own j/1 line\n",
        b"2026-11-27T20:16:10 j/2 map-0-1 | x\n",
        b"2026-11-27T20:16:10 k/1 map-0-1 | x\n",
    ]
    assert tags.of_run([late, *others, early], "j", 1) == [early, late]
