"""What job files and settings mean: JSON as `json.dumps` writes it, YAML without the surprises of YAML 1.1."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from mrcore.errors import UsageError
from mrcore.queue.job import validate
from mrcore.settings import validation
from mrcore.settings.config import load_settings
from mrcore.settings.validation import MAX_DEPTH, dump_yaml, parse_yaml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def refusal(content: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        parse_yaml(content, "f")
    text = str(caught.value)
    assert text.startswith("f") and "\n" not in text and len(text) < 600
    text.encode()
    return text


@hypothesis_settings(max_examples=150, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from((None, 1, "\t")))
def test_what_json_writes_is_read_as_json_reads_it(value: Any, ascii_only: bool, indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    if "\0" not in text:
        assert parse_yaml(text.encode(), "f") == value == parse_yaml("\ufeff" + text, "f")


SCALARS = st.from_regex(r"[-+]?[0-9][0-9_:.eEoxa-f-]{0,8}|[nyotNYOT][a-z]{1,4}|<<|=|~|\.[a-z]{3}", fullmatch=True)


@hypothesis_settings(max_examples=200, deadline=None)
@given(VALUES | SCALARS | st.dictionaries(SCALARS, SCALARS, max_size=3))
def test_what_is_dumped_is_read_back_by_readers_of_both_versions_of_yaml(value: Any) -> None:
    text = dump_yaml(value)
    assert parse_yaml(text, "f") == value == yaml.safe_load(text)
    quoted = yaml.safe_dump(value, default_style='"', allow_unicode=False)
    assert parse_yaml(quoted, "f") == value


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | TEXTS.map(str.encode))
def test_any_bytes_are_a_value_or_one_clear_line(content: bytes) -> None:
    try:
        parse_yaml(content, "f")
    except UsageError as error:
        assert "\n" not in error.message and error.message.startswith("f")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-05", 1e-05),
        ("1e-5", 1e-5),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("10:00", "10:00"),
        ("1:30:00", "1:30:00"),
        ("010", 10),
        ("-08", -8),
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2026-11-30", "2026-11-30"),
        ("2026-11-30T06:00:00Z", "2026-11-30T06:00:00Z"),
        ("=", "="),
        ('"\\u00e9"', "é"),
        ("\U0001f600", "\U0001f600"),
        (str(10**300), 10**300),
    ],
)
def test_plain_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(f"key: {text}\n", "f")["key"]
    assert (found, type(found)) == (value, type(value))
    assert parse_yaml(f"[{text or 'null'}]", "f") == [value]


@pytest.mark.parametrize("key", ["no", "on", "y", "2026-11-30", "1:30"])
def test_keys_that_yaml_1_1_would_turn_into_something_else_stay_texts(key: str) -> None:
    assert parse_yaml(f"{key}: 1", "f") == {key: 1}


def test_merge_keys_work_and_are_no_twins() -> None:
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {d: {<<: *b, z: 4}}\nlist: [*a, *a]\n"
    assert parse_yaml(text, "f") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\nb: {c: 1,\n c: 2}\n", "the key 'c' twice, in lines 2 and 3"),
        ("- a: 1\n- b: 1\n  b: 1\n", "the key 'b' twice, in lines 2 and 3"),
        ("a: 1\n'a': 2\n", "the key 'a' twice, in lines 1 and 2"),
        ("1: x\n0x1: y\n", "the key 1 twice"),
        ("? [a, {b: 1, b: 2}]\n: c\n", "the key 'b' twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' twice in one mapping"),
        ('[{"a": 1, "\\u0061": 2}]', "the key 'a' twice in one mapping"),
        ("a: [.nan]", "a[0]: nan is no number"),
        ('{"x": {"y": [1, Infinity]}}', "x.y[1]: inf is no number"),
        ('{"x": 1e999}', "x: inf is no number"),
        ('{"x": "a\\udc00b"}', r"x holds \udc00, half of a character"),
        ('{"\\ud800": 1}', r"\ud800 holds \ud800, half of a character"),
        ('{"x": "\\ude00\\ud83d"}', r"x holds \ude00"),
        ("x: \udce9", "is not UTF-8: byte 0xed in line 1"),
        ("a: é".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 1"),
        ("a: 1".encode("utf-16"), "NUL bytes"),
        ("a: 1".encode("utf-16-le"), "NUL bytes"),
        ("a: 1".encode("utf-32"), "NUL bytes"),
        ("a: \x1b[31m", "neither YAML nor JSON"),
        ("a: b: c", "neither YAML nor JSON: line 1, column 5"),
        ("a: !!python/name:os.system x", "neither YAML nor JSON: line 1"),
        ("a: !!int 10:00", "cannot be read"),
        ('a: !!int ""', "cannot be read"),
        ('a: !!float ""', "cannot be read"),
        ("a: !!bool perhaps", "cannot be read"),
        ("a: !!timestamp soon", "cannot be read"),
        ("a: *nowhere", "neither YAML nor JSON: line 1, column 4"),
        ("--- a\n--- b\n", "neither YAML nor JSON: line 2"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(content: str | bytes, said: str) -> None:
    assert said in refusal(content)


@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
@pytest.mark.parametrize("begin", ["[", "{a: ", "- ", '{"a": ', "[{a: "])
def test_deep_nesting_is_told_alike_by_every_version_of_pyyaml(
    monkeypatch: pytest.MonkeyPatch, loader: str, begin: str
) -> None:
    monkeypatch.setattr(yaml, "CSafeLoader", getattr(yaml, loader))
    validation._loader.cache_clear()
    try:
        for levels in (MAX_DEPTH + 1, 500, 3000, 200_000 if loader == "CSafeLoader" else 5000):
            assert "is nested more than 64 deep" in refusal(begin * levels + "x")
        end = {"[": "]", "{a: ": "}", '{"a": ': "}", "- ": "", "[{a: ": "}]"}[begin]
        levels = MAX_DEPTH // (2 if begin == "[{a: " else 1)
        assert parse_yaml(begin * levels + "1" + end * levels, "f")
    finally:
        validation._loader.cache_clear()


def test_nested_json_is_bounded_too() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_yaml(deep, "f") == json.loads(deep)
    assert "nested more than 64 deep" in refusal(f"[{deep}]")
    assert "nested more than 64 deep" in refusal("[" * 900 + "]" * 900)


def test_hostile_texts_cost_little() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    assert len(parse_yaml(bomb, "f")) == 60
    circle = parse_yaml("&a [*a]", "f")
    assert circle[0] is circle
    wide = json.dumps({"k" * 1_000_000: list(range(10_000))})
    assert len(next(iter(parse_yaml(wide, "f").values()))) == 10_000


def test_a_jobs_keys_from_yaml_and_json(projects_dir: Path) -> None:
    job = {
        "job_name": "no",
        "project_name": "word_count",
        "input_dirs": ["\U0001f600"],
        "map_function_name": "count_map",
    }
    job |= {"downsample": 1e-05, "sample_seed": 2**62}
    for text in (
        json.dumps(job),
        yaml.safe_dump(job | {"job_name": "no"}).replace("'no'", "no").replace("1.0e-05", "1e-5"),
    ):
        found = validate(parse_yaml(text, "f"), projects_dir)
        assert (found["job_name"], found["downsample"], found["sample_seed"]) == ("no", 1e-05, 2**62)
        assert found["input_dirs"] == ["\U0001f600"]
    for text in ("not_before: 2026-11-30", "not_before: 2026-11-30 06:00", "not_before: 2026-11-30T06:00:00Z"):
        moment = validate(job | parse_yaml(text, "f"))["not_before"]
        assert moment.startswith("2026-11-30T") and datetime.fromisoformat(moment).tzinfo is not None
    with pytest.raises(UsageError, match="job_priority"):
        validate(job | parse_yaml(json.dumps({"job_priority": 10**400}), "f"))


def test_settings_files_are_read_alike(tmp_path: Path) -> None:
    for name, text in (
        ("c.yml", f"home: {tmp_path}\nnode_timeout_seconds: 1e+1\ncluster_name: no\n"),
        ("c.json", json.dumps({"home": str(tmp_path), "node_timeout_seconds": 10.0, "cluster_name": "no"})),
    ):
        (tmp_path / name).write_text(text)
        settings = load_settings(tmp_path / name)
        assert (settings.node_timeout_seconds, settings.cluster_name) == (10.0, "no")
    (tmp_path / "c.json").write_text('{"home": "x", "home": "y"}')
    with pytest.raises(UsageError, match=r"settings file .*c\.json has the key 'home' twice"):
        load_settings(tmp_path / "c.json")
