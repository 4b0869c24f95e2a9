"""Profiles of runs: what speedscope reads, and a flame graph that any browser shows, whatever the frames are called."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrcore.state import profiles
from mrcore.state.profiles import HUES, MAX_DEPTH, MAX_FRAMES, owner

SVG = "{http://www.w3.org/2000/svg}"
STACKS = {"main (a.py:1);work (a.py:2)": 30, "main (a.py:1);rest (a.py:9)": 10, "main (a.py:1)": 60}


def written(folder: Path, stacks: dict[str, dict[str, int]]) -> tuple[ElementTree.Element, dict[str, object]]:
    assert profiles.write(folder, "wc", 3, stacks)
    svg, scope = profiles.paths(folder, "wc", 3)
    return ElementTree.fromstring(svg.read_text()), json.loads(scope.read_text())


def boxes(svg: ElementTree.Element) -> dict[str, tuple[float, float, float]]:
    """Left, top and width of each box, by the frame in its title."""
    found = {}
    for group in svg.iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        assert rect is not None
        name = (group.findtext(f"{SVG}title") or "").rpartition(": ")[0]
        found[name] = float(rect.get("x", 0)), float(rect.get("y", 0)), float(rect.get("width", 0))
    return found


def test_both_files_have_the_samples(tmp_path: Path) -> None:
    svg, scope = written(tmp_path, {"MAP": STACKS, "REDUCE": {"other (b.py:1)": 5}})
    map_, reduce = scope["profiles"]  # type: ignore[misc]
    assert (map_["type"], map_["name"], map_["unit"], map_["endValue"]) == ("sampled", "MAP", "none", 100)
    names = [frame["name"] for frame in scope["shared"]["frames"]]  # type: ignore[index]
    read = {";".join(names[at] for at in frames): w for frames, w in zip(map_["samples"], map_["weights"], strict=True)}
    assert read == STACKS and sum(reduce["weights"]) == 5
    assert scope["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    drawn = boxes(svg)
    (left, top, width), work, rest = (drawn[f"{name}"] for name in ("main (a.py:1)", "work (a.py:2)", "rest (a.py:9)"))
    assert work[2] == pytest.approx(0.3 * width, abs=0.2) and rest[2] == pytest.approx(0.1 * width, abs=0.2)
    assert work[1] == rest[1] > top and left <= min(work[0], rest[0])
    assert sorted([work[0], rest[0]])[1] >= sorted([(work[0], work[2]), (rest[0], rest[2])])[0][1]


def test_without_samples_there_is_no_file(tmp_path: Path) -> None:
    assert not profiles.write(tmp_path, "wc", 3, {"MAP": {}}) and not profiles.paths(tmp_path, "wc", 3)


@given(st.dictionaries(st.text(max_size=30), st.integers(0, 1 << 62), max_size=8))
def test_whatever_frames_are_called_both_files_are_well_formed(
    tmp_path_factory: pytest.TempPathFactory, stacks: dict[str, int]
) -> None:
    folder = tmp_path_factory.mktemp("state")
    if any(stacks.values()):
        written(folder, {"MAP": stacks})
    else:
        assert not profiles.write(folder, "wc", 3, {"MAP": stacks})


def test_names_are_text_and_no_markup(tmp_path: Path) -> None:
    svg, _ = written(tmp_path, {"MAP": {"<script>alert(1)</script> & co": 1}})
    assert not [each for each in svg.iter() if "script" in each.tag]
    assert "<script>alert(1)</script> & co" in boxes(svg)


def test_a_large_profile_is_a_small_file(tmp_path: Path) -> None:
    deep = {";".join(f"f{at} (very_long_name_of_a_module.py:{at})" for at in range(200)): 10**6}
    wide = {f"main;part{at} (very_long_name_of_a_module.py:{at});{at % 7}": 1 + at % 13 for at in range(20_000)}
    svg, _ = written(tmp_path, {"MAP": wide | deep, "REDUCE": wide})
    size = profiles.paths(tmp_path, "wc", 3)[0].stat().st_size
    assert size < 600_000 and len(list(svg.iter(f"{SVG}g"))) <= 2 * MAX_FRAMES


def test_pruning(tmp_path: Path) -> None:
    for run in (1, 2, 12):
        profiles.write(tmp_path, "wc", run, {"MAP": STACKS})
    (tmp_path / "profiles/wc/2.svg.partial").touch()
    profiles.prune(tmp_path, "wc", {2})
    assert sorted(path.name for path in (tmp_path / "profiles/wc").iterdir()) == ["2.speedscope.json", "2.svg"]
    profiles.prune(tmp_path, "wc", set())
    profiles.prune(tmp_path, "never ran", set())
    assert not (tmp_path / "profiles/wc").exists()


@pytest.mark.parametrize(
    ("frame", "who"),
    [
        ("count_words (map_functions.py:7)", "user"),
        ("Parser.feed (somepackage/parser.py:70)", "user"),
        ("dumps (json/__init__.py:183)", "python"),
        ("_find (<frozen importlib._bootstrap>:1)", "python"),
        ("Map.map (mrcore/engine/mapper.py:60)", "mrcore"),
        ("(other stacks)", "user"),
    ],
)
def test_colours_say_who_wrote_the_code(frame: str, who: str) -> None:
    assert owner(frame) == who and who in HUES


def test_stacks_of_nothing_but_separators_take_no_room(tmp_path: Path) -> None:
    """A node may send them; the frames of a stack are as few as a task samples."""
    _, scope = written(tmp_path, {"MAP": {";" * 9_999: 3, ";" * 9_998: 4}})
    assert [len(frames) for frames in scope["profiles"][0]["samples"]] == [MAX_DEPTH]  # type: ignore[index]
