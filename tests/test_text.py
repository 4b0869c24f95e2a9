"""Text from outside: whatever it is, the result encodes, is bounded, and no terminal obeys it."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from mrcore.text import clean, one_line

ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT, st.integers(10, 200))
def test_whatever_comes_the_result_can_be_written_and_is_bounded(text, limit):
    found = clean(text, limit)
    found.encode()
    assert len(found) <= 6 * limit + 60
    assert all(unicodedata.category(each) not in ("Cc", "Cs") or each in "\n\t" for each in found)
    assert "\n" not in one_line(text, limit)


@given(ANY_TEXT)
def test_cleaning_twice_changes_nothing(text):
    assert clean(clean(text)) == clean(text)


def test_ordinary_text_stays_as_it_is():
    text = "Größe: 3 µm, 日本語, 👍🏽\n\tindented"
    assert clean(text) == text


def test_what_a_terminal_would_obey_is_escaped():
    assert clean("\x1b[31mred\x1b]0;title\x07") == "\\x1b[31mred\\x1b]0;title\\x07"
    assert clean("cut emoji \ud83d") == "cut emoji \\ud83d"
    assert clean("gpj.\u202eexe") == "gpj.\\u202eexe"


def test_the_middle_of_a_long_text_is_left_out_and_counted():
    found = clean("a" * 1000 + "b" * 1000, 100)
    assert found == "a" * 75 + " […1,900 characters left out…] " + "b" * 25


def test_an_object_that_cannot_be_shown_is_named_by_its_type():
    class Broken(Exception):
        def __str__(self):
            raise KeyboardInterrupt

    assert clean(Broken()) == "<Broken whose __str__ raises KeyboardInterrupt>"
