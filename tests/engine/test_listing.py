"""Which files a job reads on a node: folders, patterns, links, other names of one file, what is no file."""

from __future__ import annotations

import fcntl
import glob
import itertools
import math
import os
import random
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mrcore.engine import listing as listings
from mrcore.engine.globbing import expand
from mrcore.engine.listing import Listing, gather, list_inputs, rendezvous
from mrcore.errors import Malformed
from mrcore.messages.nodes import InputPage
from mrcore.system.paths import Layout


def listed(folder: Path, *entries: str, **job: Any) -> InputPage:
    return list_inputs({"input_dirs": list(entries), **job}, Layout(folder), ["n0", "n1", "n2"], "n0")


def names(listing: InputPage) -> list[str]:
    return [os.path.basename(file.path) for file in listing.files]


# --- Entries ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_level_and_skips_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "b.gz", ".hidden", "c.partial", "sub/deep", "locked", "name with\nnewline"):
        (folder / name).write_text("x\n")
    os.mkfifo(folder / "fifo")
    with (folder / "locked").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        listing = listed(tmp_path, str(folder))
    assert names(listing) == ["a", "b.gz", "name with\nnewline"]
    assert listing.skipped == {"dotfile": 1, "partial": 1, "locked by its writer": 1, "fifo": 1}
    assert listing.matched == {str(folder): 3} and not listing.faults
    assert "locked" in names(listed(tmp_path, str(folder)))


def test_entries_that_overlap_list_a_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_text("x")
    twice = listed(
        tmp_path, str(folder), f"{folder}/", f"{tmp_path}//in", f"{folder}/a", f"{folder}/./a", f"{folder}/*"
    )
    assert names(twice) == ["a"]
    assert set(twice.matched.values()) == {1}


def test_globs_files_and_relative_entries(tmp_path: Path) -> None:
    base = tmp_path / "cluster"
    for name in ("logs/a.txt", "logs/x/b.txt", "logs/x/y/c.txt", "logs/x/y/d.csv", "logs/[odd].txt"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("x")
    assert names(listed(tmp_path, "logs/**/*.txt")) == ["[odd].txt", "a.txt", "b.txt", "c.txt"]
    assert names(listed(tmp_path, "logs/*.txt")) == ["[odd].txt", "a.txt"]
    assert names(listed(tmp_path, "logs/[odd].txt")) == ["[odd].txt"]
    assert names(listed(tmp_path, "logs/x/b.txt", "logs/x/y")) == ["b.txt", "c.txt", "d.csv"]
    assert listed(tmp_path, "logs/none*", "nowhere").matched == {"logs/none*": 0, "nowhere": 0}


def test_what_cannot_be_read_or_named_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    listing = listed(tmp_path, str(tmp_path))
    assert [fault for fault in listing.faults if "dangling cannot be read" in fault]
    (tmp_path / "dangling").unlink()
    (tmp_path / os.fsdecode(b"caf\xe9")).write_text("x")
    faults = listed(tmp_path, str(tmp_path)).faults
    assert len(faults) == 1 and "is not UTF-8: rename the file" in faults[0] and "caf\\xe9" in faults[0]


def test_shared_files_are_dealt_to_one_node_each(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"f{number}").write_text("x")
    nodes = ["n0", "n1", "n2"]
    dealt = [
        names(list_inputs({"input_dirs": [str(tmp_path)], "shared_input": True}, Layout(tmp_path), nodes, node))
        for node in nodes
    ]
    assert sorted(itertools.chain(*dealt)) == sorted(f"f{number}" for number in range(60))
    assert all(dealt)
    moved = sum(rendezvous(f"f{n}", nodes) != rendezvous(f"f{n}", [*nodes, "n3"]) for n in range(1000))
    assert 180 < moved < 320


# --- Patterns --------------------------------------------------------------------------------------------------------


def found(pattern: str, base: Path) -> list[str]:
    """Every file that a pattern means, as the node lists it."""
    faults: list[str] = []
    paths = expand(pattern, str(base), lambda path, error: faults.append(f"{path}: {error.strerror}"))
    result = sorted(path for path in paths if path is not None and os.path.isfile(path))
    assert not faults and len(set(result)) == len(result), faults
    return result


@pytest.mark.parametrize(
    "pattern",
    [
        "*", "**", "**/*", "**/*.txt", "*.txt", "a/**/*.txt", "**/b/*", "**/b/**/c*", "*/*/*", "**/**/x.txt",
        "a/b/../*.txt", "**/a/**/b/**/*.txt",
        "**/x.txt", "[ab]/*", "[!a]/**", "?/?/x.txt", ".hid*/*", "**/.hid*", "a", "a/", "a//b/x.txt", "*/", "none/**",
    ],
)  # fmt: skip
def test_patterns_mean_what_the_standard_library_says_where_there_are_no_links(tmp_path: Path, pattern: str) -> None:
    draw = random.Random(3)
    for _ in range(120):
        folder = "/".join(draw.choice(["a", "b", "c", ".hidden", "caf\u00e9"]) for _ in range(draw.randrange(5)))
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / draw.choice(["x.txt", "y.csv", "cc", ".hidden-file", "n\nl.txt"])).touch()
    full = os.path.normpath(tmp_path / pattern)
    expected = glob.glob(full, recursive=True)
    if not glob.has_magic(pattern) and os.path.isdir(full):
        expected = [os.path.join(full, name) for name in os.listdir(full)]
    assert found(pattern, tmp_path) == sorted(path for path in set(expected) if os.path.isfile(path))


def test_two_stars_follow_no_link_and_agree_with_find(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("in/a.txt", "in/sub/b.txt", "in/sub/c.txt", "other/d.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "in/sub/self").symlink_to(".")
    (tmp_path / "in/sub/up").symlink_to("..")
    (tmp_path / "in/out").symlink_to("../other")
    (tmp_path / "in/loop").symlink_to("loop")
    for pattern in ("in/**/*.txt", f"{tmp_path}/in/**/*.txt", "in/**/**/*.txt", "i*/**/?.txt"):
        by_find = subprocess.run(["find", "in", "-name", "*.txt"], cwd=tmp_path, capture_output=True, text=True)
        assert found(pattern, tmp_path) == sorted(f"{tmp_path}/{name}" for name in by_find.stdout.split())
    assert found("in/out/*.txt", tmp_path) == found("in/o*/*", tmp_path) == [f"{tmp_path}/in/out/d.txt"]
    assert found("in/out", tmp_path) == found("in/out/**", tmp_path) == [f"{tmp_path}/in/out/d.txt"]
    assert f"{tmp_path}/in/sub/up/a.txt" in found("in/*/*/a.txt", tmp_path)  # a part of the entry that names links


def test_a_tree_deeper_than_python_recurses(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=descriptor)
        descriptor, before = os.open("d", os.O_RDONLY, dir_fd=descriptor), descriptor
        os.close(before)
    os.close(os.open("x.txt", os.O_WRONLY | os.O_CREAT, dir_fd=descriptor))
    os.close(descriptor)
    assert [path.count("/d") for path in found("**/*.txt", tmp_path)] == [1500]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # shutil recurses


@pytest.mark.parametrize("name", ["[odd]", "[a-c]", "what?", "s*ar", "[", "[!x]", "**"])
def test_a_name_that_is_there_counts_although_it_looks_like_a_pattern(tmp_path: Path, name: str) -> None:
    home = tmp_path / f"home {name}"
    base = home / "cluster"
    for file in (f"{name}/f.txt", f"{name}/sub/g.txt", f"other/{name}", "a/no.txt"):
        (base / file).parent.mkdir(parents=True, exist_ok=True)
        (base / file).write_text("x")
    assert names(listed(home, name)) == ["f.txt"] or "?" in name or "*" in name
    assert "f.txt" in names(listed(home, name)) and "f.txt" in names(listed(home, f"{base}/{name}"))
    assert names(listed(home, f"other/{name}")) == names(listed(home, f"{base}/other/{name}")) == [name]
    assert {"f.txt", "g.txt"} <= set(names(listed(home, f"{name}/**/*.txt")))
    assert names(listed(home, "a/*.txt")) == ["no.txt"]  # in a base_dir of such a name
    if "[" in name:
        assert names(listed(home, f"{base}/a/*.txt")) == ["no.txt"]


def test_a_literal_name_does_not_hide_what_the_pattern_matches(tmp_path: Path) -> None:
    for name in ("*.txt", "a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    assert names(listed(tmp_path, f"{tmp_path}/*.txt")) == ["*.txt", "a.txt", "b.txt"]


# --- One file, many names --------------------------------------------------------------------------------------------


def test_a_file_is_read_once_whatever_names_lead_to_it(tmp_path: Path) -> None:
    (tmp_path / "in/real").mkdir(parents=True)
    (tmp_path / "in/real/m.txt").write_text("x")
    os.link(tmp_path / "in/real/m.txt", tmp_path / "in/real/z.txt")
    (tmp_path / "in/a.txt").symlink_to("real/m.txt")
    (tmp_path / "in/linked").symlink_to("real")
    other = tmp_path / "link-to-in"
    other.symlink_to("in")
    entries = [
        f"{tmp_path}/in",
        f"/{tmp_path}/in/real",
        f"{tmp_path}/in/linked/*",
        f"{other}/real/./m.txt",
        f"{tmp_path}/**",
    ]
    for order in itertools.permutations(entries):
        listing = listed(tmp_path, *order)
        assert [file.path for file in listing.files] == [f"{tmp_path}/in/real/m.txt"]  # no link, the first name
        assert listing.skipped == {"same file under another name": 5} and not listing.faults
        assert all(listing.matched.values())


def test_equal_files_are_not_one_file(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("the same")
        os.utime(tmp_path / name, ns=(1, 1))
    assert names(listed(tmp_path, str(tmp_path))) == ["a", "b", "c"]


def test_shared_files_of_many_names_are_dealt_to_one_node(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"f{number}").write_text("x")
        os.link(tmp_path / f"f{number}", tmp_path / f"g{39 - number}")
    (tmp_path / "again").symlink_to(tmp_path)
    nodes = ["n0", "n1", "n2"]
    dealt = []
    for number, node in enumerate(nodes):  # each spells its entries its own way
        entries = [f"{tmp_path}/again/*", f"{'/' * number}{tmp_path}"]
        job = {"input_dirs": entries[:: 1 if number else -1], "shared_input": True}
        dealt.append(names(list_inputs(job, Layout(tmp_path), nodes, node)))
    assert sorted(itertools.chain(*dealt)) == sorted(f"f{number}" for number in range(40)) and all(dealt)


# --- No files --------------------------------------------------------------------------------------------------------


def test_what_is_no_plain_file_is_skipped_by_its_kind_and_not_touched(tmp_path: Path) -> None:
    """A FIFO that is opened and closed again would have its writer killed by SIGPIPE."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to("fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "file").write_text("x")
    writer = subprocess.Popen(["sh", "-c", f"exec >{tmp_path}/fifo; echo one; echo two"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for entry in (str(tmp_path), f"{tmp_path}/*", f"{tmp_path}/**/*"):
            listing = listed(tmp_path, entry)
            assert names(listing) == ["file"] and not listing.faults
            assert listing.skipped == {"fifo": 2, "device": 1, "socket": 1}
    assert listed(tmp_path, f"{tmp_path}/fifo").matched == {f"{tmp_path}/fifo": 0}
    assert writer.poll() is None  # it still waits for its reader, who now comes
    assert (tmp_path / "fifo").read_text() == "one\ntwo\n"
    assert writer.wait(30) == 0


def test_an_unreadable_folder_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ok", "closed", "lost+found"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f.txt").write_text("x")
    scandir = os.scandir

    def refusing(folder: str) -> Any:
        if os.path.basename(folder) in ("closed", "lost+found"):  # as to a user without rights; root has them all
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    for entry in ("**/*.txt", "*/f.txt", "closed/*", "closed"):
        listing = listed(tmp_path, f"{tmp_path}/{entry}")
        assert listing.faults == [f"input {tmp_path}/closed cannot be read: Permission denied"] or entry == "*/f.txt"
    assert names(listed(tmp_path, f"{tmp_path}/**/*.txt")) == ["f.txt"]


def test_thousands_of_faults_are_told_in_a_few_lines(tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"l{number}").symlink_to("nowhere")
    faults = listed(tmp_path, str(tmp_path)).faults
    assert len(faults) == 10 and faults[-1] == "and 2,991 more inputs cannot be read" and sum(map(len, faults)) < 5000


# --- Slices ----------------------------------------------------------------------------------------------------------


def test_a_walk_goes_on_in_slices_and_finds_the_same(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"d{number % 20}/e{number}").mkdir(parents=True)
        (tmp_path / f"d{number % 20}/e{number}/f{number}").write_text("x")
    job = {"input_dirs": [f"{tmp_path}/**", f"{tmp_path}/none/**"]}
    walk, slices = Listing(job, Layout(tmp_path), ["n0"], "n0"), 1
    while not walk.advance(0.0):
        slices += 1
    assert slices > 200  # one step each
    assert walk.result() == list_inputs(job, Layout(tmp_path), ["n0"], "n0") and len(walk.result().files) == 200


def test_a_walk_that_finds_nothing_comes_back_in_time(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"d{number}/e").mkdir(parents=True)
    walk = Listing({"input_dirs": [f"{tmp_path}/**/*.none"]}, Layout(tmp_path), ["n0"], "n0")
    assert not walk.advance(0.0)
    begun = time.monotonic()
    assert walk.advance(math.inf) and time.monotonic() - begun < 60


def test_a_listing_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listings, "MAX_FILES", 10)
    for number in range(30):
        (tmp_path / f"f{number}").write_text("x")
    assert "match more than 10 files on one node" in listed(tmp_path, str(tmp_path)).faults[0]
    endless = InputPage(files=[], matched={}, skipped={}, fingerprint="", faults=[], next="more")
    with pytest.raises(Malformed, match=r"node n0 .* pages without an end"):
        gather(lambda *_, **__: endless, {"input_dirs": []}, ["n0"], "n0")


def test_gather_goes_on_until_the_last_page(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"f{number}").write_text("x\n")
    whole = listed(tmp_path, str(tmp_path))
    empty = InputPage(files=[], matched={}, skipped={}, fingerprint="", faults=[], next="0")
    pages: dict[str | None, InputPage] = {None: empty}
    for start in range(0, 7, 3):
        following = str(start + 3) if start + 3 < 7 else None
        pages[str(start)] = msgspec.structs.replace(whole, files=whole.files[start : start + 3], next=following)
    job = {"input_dirs": [str(tmp_path)]}
    assert gather(lambda *, cursor, **_: pages[cursor], job, ["n0"], "n0") == whole
