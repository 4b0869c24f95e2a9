"""How files are cut into batches, and dealt to nodes; and what a walk does with what cannot be sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mrcore.errors import JobFault
from mrcore.system.staging import walk
from mrcore.transfer.batches import BATCH_BYTES, BATCH_FILES, SMALL_BYTES, cut, for_nodes


def test_small_files_fill_a_batch_and_large_ones_go_alone() -> None:
    small, large = SMALL_BYTES // 2, SMALL_BYTES
    assert [*cut([small] * 40, int)] == [[small] * 16, [small] * 16, [small] * 8]
    assert [*cut([small, large, small, small, large], int)] == [[small], [large], [small, small], [large]]
    assert [len(piece) for piece in cut([0] * (BATCH_FILES + 1), int)] == [BATCH_FILES, 1]
    assert sum(small for _ in range(16)) == BATCH_BYTES


def test_nodes_take_turns_and_large_files_come_first() -> None:
    large = SMALL_BYTES
    batches = for_nodes({"n1": [1, large, 2, large], "n2": [3], "n3": []}, int)
    assert batches == [("n1", [large]), ("n2", [3]), ("n1", [large]), ("n1", [1, 2])]


def test_a_walk_goes_on_past_what_cannot_be_sent_if_it_may(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/one", "two", "b\udcff"):
        (tmp_path / name).write_text("x")
    (tmp_path / "a/link").symlink_to("one")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(JobFault, match="a/link is a symbolic link"):
        [*walk(tmp_path)]
    refused: list[str] = []
    files = [*walk(tmp_path, refused=refused)]
    assert [(file.name, file.inode) for file in files] == [
        (name, (tmp_path / name).stat().st_ino) for name in ("a/one", "two")
    ]
    assert len(refused) == 3 and "no plain file" in refused[2] and "not UTF-8" in refused[1]
    assert [*walk(tmp_path, "gone", refused)] == [] and len(refused) == 3
