"""Listing, splits, reading and sampling of input files."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import itertools
import lzma
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from oracle import lines_of

from mrcore.errors import JobFault
from mrcore.inputs import SAMPLE_BLOCK_BYTES, Reader, Sample, cut_lines, list_inputs, plan_bundles, rendezvous
from mrcore.paths import Layout

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstandard.ZstdCompressor().compress(content),
}


def piece(path: Path, start: int = 0, end: int | None = -1) -> list[Any]:
    state = path.stat()
    return [str(path), start, state.st_size if end == -1 else end, state.st_size, state.st_mtime_ns, state.st_ino]


def reader(block_bytes: int = 1 << 16, max_line_bytes: int = 1 << 26, sample: Sample | None = None) -> Reader:
    return Reader(max_line_bytes=max_line_bytes, block_bytes=block_bytes, sample=sample)


def lines(pieces: Sequence[Sequence[Any]], **more: Any) -> list[tuple[int, bytes]]:
    """Every line that the pieces give, with its offset; checks that blocks are whole lines."""
    got: list[tuple[int, bytes]] = []
    for each in pieces:
        for offset, block in reader(**more).blocks(each):
            for line in lines_of(block):
                got.append((offset, line))
                offset += len(line)
    return got


def expected(content: bytes) -> list[tuple[int, bytes]]:
    got, offset = [], 0
    for line in lines_of(content):
        got.append((offset, line))
        offset += len(line)
    return got


def listed(folder: Path, *entries: str, **job: Any) -> dict[str, Any]:
    return list_inputs({"input_dirs": list(entries), **job}, Layout(folder), ["n0", "n1", "n2"], "n0")


def names(listing: dict[str, Any]) -> list[str]:
    return [os.path.basename(path) for path, *_ in listing["files"]]


# --- Lines -----------------------------------------------------------------------------------------------------------


contents = st.lists(
    st.sampled_from(
        [b"\n", b"\r\n", b"\r", b"\x0b", b"\x0c", "\u2028".encode(), "é€😀".encode(), b"a", b"bc" * 40, b"\0"]
    ),
    max_size=60,
).map(b"".join)


@given(contents, st.lists(st.integers(0, 3000), max_size=8), st.integers(1, 50))
def test_every_line_is_read_once_wherever_the_cuts_are(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int], block_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cuts"
    path.write_bytes(content)
    borders = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    pieces = [piece(path, start, end) for start, end in itertools.pairwise(borders)]
    assert lines(pieces, block_bytes=block_bytes) == expected(content)


@given(contents)
def test_only_a_newline_cuts(content: bytes) -> None:
    assert cut_lines(content) == lines_of(content)


def test_lines_longer_than_splits_and_blocks(tmp_path: Path) -> None:
    path = tmp_path / "long"
    content = b"a" * 300_000 + b"\n" + b"b" * 10 + b"\n" + b"c" * 200_000
    path.write_bytes(content)
    pieces = [piece(path, start, min(start + 65536, len(content))) for start in range(0, len(content), 65536)]
    assert lines(pieces, block_bytes=4096) == expected(content)


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_are_read_transparently(tmp_path: Path, ending: str) -> None:
    content = "".join(f"{n} é€😀\n" for n in range(5000)).encode() + b"no newline"
    path = tmp_path / f"file.{ending}"
    path.write_bytes(COMPRESS[ending](content))
    assert lines([piece(path, 0, None)], block_bytes=1000) == expected(content)
    path.write_bytes(COMPRESS[ending](content + b"\n") * 2)  # members one behind the other
    assert lines([piece(path, 0, None)]) == expected(content + b"\n" + content + b"\n")


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kept", [0.5, 0.99, -1, -5])
def test_a_truncated_compressed_file_fails_by_name(tmp_path: Path, ending: str, kept: float) -> None:
    whole = COMPRESS[ending](random.Random(1).randbytes(100_000).hex().encode())
    path = tmp_path / f"file.{ending}"
    path.write_bytes(whole[: int(kept * len(whole)) if kept > 0 else int(kept)])
    with pytest.raises(JobFault, match=f"file.{ending} is damaged or cut off after [0-9,]+ uncompressed bytes.*again"):
        lines([piece(path, 0, None)])


@pytest.mark.parametrize("ending", COMPRESS)
def test_what_is_not_compressed_but_named_so_fails(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"file.{ending}"
    path.write_bytes(b"plain text\n" * 10)
    with pytest.raises(JobFault, match="damaged"):
        lines([piece(path, 0, None)])


# --- A line that is too long -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["plain", "gz"])
@pytest.mark.parametrize("block_bytes", [7, 64, 1 << 16])
@pytest.mark.parametrize("ending", [b"\n", b""])
def test_a_line_over_the_limit_is_named(tmp_path: Path, place: str, block_bytes: int, ending: bytes) -> None:
    content = b"short\n" * 5 + b"x" * 100 + ending
    path = tmp_path / ("f.gz" if place == "gz" else "f")
    path.write_bytes(gzip.compress(content) if place == "gz" else content)
    with pytest.raises(JobFault, match=r"the line at byte 30 is longer than max_line_bytes \(50\)") as caught:
        lines([piece(path, 0, None if place == "gz" else -1)], block_bytes=block_bytes, max_line_bytes=50)
    assert caught.value.details["offset"] == 30
    assert lines([piece(path, 0, None if place == "gz" else -1)], max_line_bytes=101) == expected(content)


def test_a_split_inside_a_long_line_leaves_it_to_the_split_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 50_000 + b"\nend\n")
    assert lines([piece(path, 20_000, 50_005)], max_line_bytes=100) == [(50_001, b"end\n")]
    with pytest.raises(JobFault, match="the line at byte 0 is"):
        lines([piece(path, 0, 20_000)], max_line_bytes=100)


# --- Files that change -----------------------------------------------------------------------------------------------


def test_a_growing_file_is_read_up_to_its_listed_size(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthr")
    before = piece(path)
    with path.open("ab") as log:
        log.write(b"ee\nfour\n")
    assert lines([before]) == expected(b"one\ntwo\nthr")


def test_a_file_that_shrinks_or_is_replaced_fails(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"line\n" * 1000)
    before = piece(path)
    os.truncate(path, 100)
    with pytest.raises(JobFault, match=r"shrank from 5000 to 100 bytes.*run the job again"):
        lines([before])
    path.write_bytes(b"line\n" * 100_000)
    before = piece(path)
    blocks = reader(block_bytes=1000).blocks(before)
    next(blocks)
    os.truncate(path, 100)
    with pytest.raises(JobFault, match=r"shrank|ended at byte"):
        list(blocks)
    path.write_bytes(b"line\n" * 1000)
    before = piece(path)
    other = tmp_path / "other"
    other.write_bytes(b"line\n" * 1000)
    os.replace(other, path)
    with pytest.raises(JobFault, match="was replaced"):
        lines([before])
    path.unlink()
    with pytest.raises(JobFault, match="cannot be read: No such file"):
        lines([before])


# --- Listing ---------------------------------------------------------------------------------------------------------


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
    assert listing["skipped"] == {"dotfile": 1, "partial": 1, "locked by its writer": 1}
    assert listing["matched"] == {str(folder): 3} and not listing["faults"]
    assert "locked" in names(listed(tmp_path, str(folder)))


def test_entries_that_overlap_list_a_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a").write_text("x")
    twice = listed(
        tmp_path, str(folder), f"{folder}/", f"{tmp_path}//in", f"{folder}/a", f"{folder}/./a", f"{folder}/*"
    )
    assert names(twice) == ["a"]
    assert set(twice["matched"].values()) == {1}


def test_globs_files_and_relative_entries(tmp_path: Path) -> None:
    base = tmp_path / "cluster"
    for name in ("logs/a.txt", "logs/x/b.txt", "logs/x/y/c.txt", "logs/x/y/d.csv", "logs/[odd].txt"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("x")
    assert names(listed(tmp_path, "logs/**/*.txt")) == ["[odd].txt", "a.txt", "b.txt", "c.txt"]
    assert names(listed(tmp_path, "logs/*.txt")) == ["[odd].txt", "a.txt"]
    assert names(listed(tmp_path, "logs/[odd].txt")) == ["[odd].txt"]
    assert names(listed(tmp_path, "logs/x/b.txt", "logs/x/y")) == ["b.txt", "c.txt", "d.csv"]
    assert listed(tmp_path, "logs/none*", "nowhere")["matched"] == {"logs/none*": 0, "nowhere": 0}


def test_what_cannot_be_read_or_named_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    listing = listed(tmp_path, str(tmp_path))
    assert [fault for fault in listing["faults"] if "dangling cannot be read" in fault]
    (tmp_path / "dangling").unlink()
    (tmp_path / os.fsdecode(b"caf\xe9")).write_text("x")
    faults = listed(tmp_path, str(tmp_path))["faults"]
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


# --- Splits ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 300 << 20), st.booleans()), max_size=30), st.integers(1, 8), st.integers(0, 9))
def test_bundles_cover_every_byte_once(files: list[tuple[int, bool]], servers: int, first: int) -> None:
    inputs = [(f"f{n}" + (".gz" if packed else ""), size, 1, n) for n, (size, packed) in enumerate(files)]
    bundles = plan_bundles(inputs, servers, first)
    assert [bundle["id"] for bundle in bundles] == list(range(first, first + len(bundles)))
    assert all(bundle["pieces"] for bundle in bundles)
    for path, size, mtime, inode in inputs:
        pieces = [each for bundle in bundles for each in bundle["pieces"] if each[0] == path]
        assert all(each[3:] == [size, mtime, inode] for each in pieces)
        if path.endswith(".gz"):
            assert [each[1:3] for each in pieces] == [[0, None]]
        else:
            borders = [border for each in pieces for border in each[1:3]]
            assert borders[::2] == [0, *borders[1:-1:2]][: len(pieces)] and (borders[-1:] or [0]) == [size]
            assert all(border % SAMPLE_BLOCK_BYTES == 0 for border in borders[:-1])


# --- Samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "cluster" / "logs" / "big"
    path.parent.mkdir(parents=True)
    draw = random.Random(5)
    path.write_text("".join(f"{number} {'x' * draw.randrange(150)}\n" for number in range(200_000)))
    return path


@pytest.mark.parametrize("by_lines", [True, False])
def test_a_sample_is_reproducible_whatever_the_cuts(big: Path, by_lines: bool) -> None:
    sample = Sample(0.1, 7, by_lines)
    size, step = big.stat().st_size, SAMPLE_BLOCK_BYTES
    whole = lines([piece(big)], sample=sample)
    for width in (step, 3 * step, 50 * step):
        cut = [piece(big, start, min(size, start + width)) for start in range(0, size, width)]
        assert lines(cut, sample=sample, block_bytes=10_000) == whole
    every = dict(expected(big.read_bytes()))
    assert len(dict(whole)) == len(whole) and all(every[offset] == line for offset, line in whole)
    assert lines([piece(big)], sample=Sample(0.1, 8, by_lines)) != whole


def test_the_share_of_a_sample_is_as_asked(big: Path) -> None:
    for p in (0.01, 0.2):
        kept = len(lines([piece(big)], sample=Sample(p, 3, by_lines=True)))
        assert abs(kept - 200_000 * p) < 5 * (200_000 * p) ** 0.5
    # By blocks, over 40 seeds: some 250 blocks each, so the mean of 40 shares lies within 5 of its deviations.
    shares = [len(lines([piece(big)], sample=Sample(0.1, seed, by_lines=False))) / 200_000 for seed in range(40)]
    assert abs(sum(shares) / 40 - 0.1) < 5 * (0.1 * 0.9 / 250 / 40) ** 0.5


def test_a_sample_by_blocks_reads_about_its_share(big: Path) -> None:
    read = lines_read = 0
    for seed in range(10):
        one = reader(sample=Sample(0.05, seed, by_lines=False))
        lines_read += sum(len(block) for _, block in one.blocks(piece(big)))
        read += one.bytes_read
    assert lines_read <= read < 1.25 * lines_read


def test_files_of_one_name_in_many_folders_are_thinned_independently(tmp_path: Path) -> None:
    kept = 0
    for number in range(1000):
        folder = tmp_path / f"day-{number}"
        folder.mkdir()
        (folder / "data.log").write_text("one line\n")
        kept += len(lines([piece(folder / "data.log")], sample=Sample(0.5, 1, by_lines=True)))
    assert 400 < kept < 600


def test_a_sample_does_not_depend_on_the_node_s_folder(big: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "cluster" / "logs" / "big"
    other.parent.mkdir(parents=True)
    other.write_bytes(big.read_bytes()[: 20 * SAMPLE_BLOCK_BYTES])
    sample = Sample(0.3, 1, by_lines=True)
    assert lines([piece(other)], sample=sample)[:1000] == lines([piece(big)], sample=sample)[:1000]


def test_a_compressed_file_is_thinned_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "f.gz"
    path.write_bytes(gzip.compress(b"line\r\n" * 20_000))
    for by_lines in (True, False):
        assert 1700 < len(lines([piece(path, 0, None)], sample=Sample(0.1, 1, by_lines))) < 2300
