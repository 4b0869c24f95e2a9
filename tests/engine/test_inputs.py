"""Listing, splits, reading and sampling of input files."""

from __future__ import annotations

import bz2
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
from task_parts import piece

from mrcore.engine.inputs import SAMPLE_BLOCK_BYTES, Reader, Sample, cut_lines, plan_bundles
from mrcore.errors import JobFault
from mrcore.messages.nodes import InputFile
from mrcore.messages.tasks import Split

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: zstandard.ZstdCompressor().compress(content),
}


def reader(block_bytes: int = 1 << 16, max_line_bytes: int = 1 << 26, sample: Sample | None = None) -> Reader:
    return Reader(max_line_bytes=max_line_bytes, block_bytes=block_bytes, sample=sample)


def lines(pieces: Sequence[Split], **more: Any) -> list[tuple[int, bytes]]:
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


# --- Splits ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 300 << 20), st.booleans()), max_size=30), st.integers(1, 8), st.integers(0, 9))
def test_bundles_cover_every_byte_once(files: list[tuple[int, bool]], servers: int, first: int) -> None:
    inputs = [InputFile(f"/f{n}" + (".gz" if packed else ""), size, 1, n) for n, (size, packed) in enumerate(files)]
    bundles = plan_bundles(inputs, servers, first)
    assert [bundle.id for bundle in bundles] == list(range(first, first + len(bundles)))
    assert all(bundle.pieces for bundle in bundles)
    for file in inputs:
        pieces = [each for bundle in bundles for each in bundle.pieces if each.path == file.path]
        assert all((each.size, each.mtime_ns, each.inode) == (file.size, file.mtime_ns, file.inode) for each in pieces)
        if file.path.endswith(".gz"):
            assert [(each.start, each.end) for each in pieces] == [(0, None)]
        else:
            borders = [border for each in pieces for border in (each.start, each.end)]
            assert borders[::2] == [0, *borders[1:-1:2]][: len(pieces)] and (borders[-1:] or [0]) == [file.size]
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
    sample = Sample(0.1, 7, by_lines, "")
    size, step = big.stat().st_size, SAMPLE_BLOCK_BYTES
    whole = lines([piece(big)], sample=sample)
    for width in (step, 3 * step, 50 * step):
        cut = [piece(big, start, min(size, start + width)) for start in range(0, size, width)]
        assert lines(cut, sample=sample, block_bytes=10_000) == whole
    every = dict(expected(big.read_bytes()))
    assert len(dict(whole)) == len(whole) and all(every[offset] == line for offset, line in whole)
    assert lines([piece(big)], sample=Sample(0.1, 8, by_lines, "")) != whole


def test_the_share_of_a_sample_is_as_asked(big: Path) -> None:
    for p in (0.01, 0.2):
        kept = len(lines([piece(big)], sample=Sample(p, 3, by_lines=True, base_dir="")))
        assert abs(kept - 200_000 * p) < 5 * (200_000 * p) ** 0.5
    # By blocks, over 40 seeds: some 250 blocks each, so the mean of 40 shares lies within 5 of its deviations.
    shares = [
        len(lines([piece(big)], sample=Sample(0.1, seed, by_lines=False, base_dir=""))) / 200_000 for seed in range(40)
    ]
    assert abs(sum(shares) / 40 - 0.1) < 5 * (0.1 * 0.9 / 250 / 40) ** 0.5


def test_a_sample_by_blocks_reads_about_its_share(big: Path) -> None:
    read = lines_read = 0
    for seed in range(10):
        one = reader(sample=Sample(0.05, seed, by_lines=False, base_dir=""))
        lines_read += sum(len(block) for _, block in one.blocks(piece(big)))
        read += one.bytes_read
    assert lines_read <= read < 1.25 * lines_read


def test_each_file_is_thinned_by_itself_whatever_the_end_of_its_path(tmp_path: Path) -> None:
    """The whole path counts: by its last parts alone, all of these would keep the same lines."""
    kept = []
    for seed in range(8):
        kept.append(0)
        for number in range(300):
            path = tmp_path / f"h{number}/var/log/app.log"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{line}\n" for line in range(10)))
            # Below base_dir, so that the draw does not depend on where this test runs: five sigma come up now and then.
            kept[-1] += len(lines([piece(path)], sample=Sample(0.1, seed, True, str(tmp_path))))
    assert all(abs(each - 300) < 5 * (3000 * 0.1 * 0.9) ** 0.5 for each in kept) and len(set(kept)) > 1


def test_a_sample_does_not_depend_on_the_node_s_folder_and_only_on_that(big: Path, tmp_path: Path) -> None:
    def sampled(base: str, path: str) -> list[tuple[int, bytes]]:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(big.read_bytes()[: 5 * SAMPLE_BLOCK_BYTES])
        return lines([piece(file)], sample=Sample(0.3, 1, True, str(tmp_path / base)))

    here = sampled("n0/cluster", "n0/cluster/logs/big")
    assert sampled("n1/cluster", "n1/cluster/logs/big") == here
    assert sampled("n1/cluster/", "n1/cluster/logs/big") == here
    others = [
        sampled("n1/cluster", "n1/cluster/x/logs/big"),  # the same end
        sampled("n1/cluster", "n1/cluster/logs/small"),
        sampled("n1/cluster", "n1/clusters/logs/big"),  # beside base_dir, not below
        sampled("elsewhere", "n0/cluster/logs/big"),  # an absolute path
        sampled("elsewhere", "n1/cluster/logs/big"),
    ]
    assert here not in others and len({tuple(each) for each in others}) == len(others)


def test_a_compressed_file_is_thinned_by_lines(tmp_path: Path) -> None:
    path = tmp_path / "f.gz"
    path.write_bytes(gzip.compress(b"line\r\n" * 20_000))
    for by_lines in (True, False):
        assert 1700 < len(lines([piece(path, 0, None)], sample=Sample(0.1, 1, by_lines, ""))) < 2300
