"""Text from outside: whatever it is, the result encodes, is bounded, and no terminal obeys it."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrcore.errors import ClusterFault, JobFault, MrcoreError, from_dict, unforeseen
from mrcore.text import clean, duration, json_text, listed, message, one_line, plain, rough, unfit

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


class Hostile:
    """Raises at whatever is asked of it (but for its repr, which pytest asks for)."""

    def __str__(self):
        raise SystemExit

    __len__ = __iter__ = __bool__ = __eq__ = __str__

    def __repr__(self):
        return "Hostile()"


class Text(str):
    def __len__(self):
        return -1

    def __getitem__(self, key):
        raise KeyError

    __str__ = __add__ = __getitem__


ODD = st.sampled_from([Hostile(), Text("a"), b"\xff", {1, 2}, 1e999, range(10**9), object, lambda: 1])
ANYTHING = st.recursive(
    ANY_TEXT | st.integers() | st.floats() | st.none() | ODD,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.tuples(inner)
        | st.dictionaries(ANY_TEXT | st.integers() | st.tuples(), inner, max_size=5)
    ),
)


def facts_of(value):
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


@given(ANYTHING)
def test_plain_facts_go_through_any_json_writer_and_stay_as_they_are(value):
    found = plain(value)
    assert not any(unicodedata.category(each) in ("Cc", "Cs") for each in facts_of(found))
    assert facts_of(plain(found)) == facts_of(found) and facts_of(plain(json.loads(facts_of(found)))) == facts_of(found)


@given(ANYTHING, st.dictionaries(ANY_TEXT, ANYTHING, max_size=4))
def test_an_error_can_be_made_of_anything_and_travels_any_number_of_times(said, details):
    details.pop("self", None)
    error = JobFault(said, **details)
    there = from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(there) is JobFault and there.to_dict() == error.to_dict()
    assert str(there) == there.message and "\n" not in there.message.replace("\n  ", "")


def test_facts_are_bounded_as_a_whole_and_say_what_is_left_out():
    assert plain(list(range(3_000)))[99:] == [99, "… and 2,900 more"]
    assert plain({str(n): n for n in range(3_000)})["…"] == "… and 2,900 more"
    assert plain(list(range(101))) == list(range(101))
    wide = plain([[["x" * 10_000] * 1_000] * 1_000] * 1_000)
    assert len(facts_of(wide)) < 250_000
    assert plain(wide) == wide
    assert plain({"n": [10**6000]}) == {"n": ["<integer of 19,932 bits>"]}  # which no JSON writer of Python takes
    endless: list[object] = []
    endless.append(endless)
    facts_of(plain(endless))
    error = JobFault("many", faults=["x" * 100] * 30_000)
    assert len(json.dumps(error.to_dict())) < 15_000


def test_names_of_details_may_be_those_of_parameters():
    assert from_dict({"message": "m", "details": {"message": 1, "self": 2, "": 3}}).details == {
        "message": 1,
        "self": 2,
        "": 3,
    }


@pytest.mark.parametrize(
    "plain", [{}, {"class": 7, "message": None}, {"class": "JobFault", "message": ["a"], "details": {"\ud83d": 1}}]
)
def test_an_error_of_a_peer_may_lack_anything(plain):
    facts_of(from_dict(plain).to_dict())


def test_a_message_has_further_lines_only_where_they_are_indented():
    assert message("no answer:\n  node-1: off\nmrcore: fine\t.") == "no answer:\n  node-1: off\\nmrcore: fine\\t."


def test_a_list_of_faults_is_cut_and_counted():
    assert listed(["a", "b", "a"]) == "a; b"
    assert listed(f"f{n}" for n in range(30_000)).endswith("; f19; and 29,980 more like these")


@given(ANY_TEXT)
def test_what_is_unfit_to_be_a_name_is_what_no_file_takes(text):
    try:
        fit = b"\0" not in text.encode()
    except UnicodeEncodeError:
        fit = False
    assert (unfit(text) is None) == fit


@given(ANY_TEXT)
def test_json_text_means_the_same_and_can_be_written(text):
    written = json_text(json.dumps({"key": text}, ensure_ascii=False))
    written.encode()
    assert json.loads(written)["key"] == text
    assert clean(written) == written


def test_a_full_machine_is_the_clusters_fault_and_any_other_surprise_the_jobs():
    assert type(unforeseen(OSError(28, "No space left"))) is ClusterFault
    found = unforeseen(ValueError(Hostile()), "at node-1")
    assert type(found).__name__ == "InternalError" and found.message.startswith("at node-1: ValueError: ")
    assert isinstance(unforeseen(MrcoreError("ours")), MrcoreError)


@pytest.mark.parametrize(
    ("seconds", "measured", "estimated"),
    [
        (0.374, "0.37 s", "0 s"),
        (9.96, "10.0 s", "10 s"),
        (59.96, "1 min 00 s", "60 s"),
        (117, "1 min 57 s", "117 s"),
        (125, "2 min 05 s", "2 min"),
        (3_599.6, "1 h 00 min", "60 min"),
        (90_000, "25 h 00 min", "25 h"),
        (400_000, "111 h 06 min", "5 d"),
    ],
)
def test_lengths_of_time_for_people(seconds: float, measured: str, estimated: str) -> None:
    assert (duration(seconds), rough(seconds)) == (measured, estimated)
