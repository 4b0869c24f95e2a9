"""Archives: the same bytes for the same files, and none that leaves its folder or grows past its bounds."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mrcore.system.archives import BadArchive, pack, unpack

Add = Callable[[tarfile.TarFile], object]


def archive_of(*adds: Add, form: int = tarfile.PAX_FORMAT) -> io.BytesIO:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as archive:
        for add in adds:
            add(archive)
    target.seek(0)
    return target


def member(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, size: int | None = None) -> Add:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = len(content) if size is None else size, kind, "/etc/passwd"
    return lambda archive: archive.addfile(made, io.BytesIO(content.ljust(made.size, b"\0")))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_come_back_as_they_were_whatever_their_names(tmp_path: Path) -> None:
    contents = {
        "a": b"", "sub/é": b"x" * 511, "sub/..odd": b"y" * 512, "n" * 200 + "/f": b"z" * 513, "b\nc": b"w" * 300_000,
        ".hidden/...": b"\0",
    }  # fmt: skip
    files = []
    for number, (name, content) in enumerate(contents.items()):
        (tmp_path / str(number)).write_bytes(content)
        files.append((name, tmp_path / str(number)))
    packed = [io.BytesIO(), io.BytesIO()]
    pack(files, packed[0])
    for _, path in files:
        path.chmod(0o600)
    pack(iter(files), packed[1])
    assert packed[0].getvalue() == packed[1].getvalue()
    packed[0].seek(0)
    unpack(packed[0], tmp_path / "out", most_bytes=len(packed[0].getvalue()), most_files=len(files))
    assert tree(tmp_path / "out") == contents


HOSTILE = {
    **{name: member(name) for name in ("/tmp/absolute", "../outside", "a/../../outside", "a//b", "./a", ".", "a/..")},
    "a symlink": member("link", b"", tarfile.SYMTYPE),
    "a hard link": member("link", b"", tarfile.LNKTYPE),
    "a fifo": member("fifo", b"", tarfile.FIFOTYPE),
    "a device": member("device", b"", tarfile.CHRTYPE),
    "a folder": member("folder", b"", tarfile.DIRTYPE),
    "a sparse file": member("sparse", b"\0" * 512, tarfile.GNUTYPE_SPARSE),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_what_is_no_plain_file_inside_is_refused(tmp_path: Path, how: str) -> None:
    with pytest.raises(BadArchive, match=r"^holds .*, which is no plain file inside it$"):
        unpack(archive_of(member("good"), HOSTILE[how]), tmp_path / "out", most_bytes=1 << 20)
    assert set(tree(tmp_path)) <= {"out/good"}


@pytest.mark.parametrize(
    ("archive", "says"),
    [
        (archive_of(member("a"), member("a", b"y")), "cannot be unpacked: .*exists"),
        (archive_of(member("a"), member("a/b")), "cannot be unpacked: "),
        (archive_of(*(member(str(n)) for n in range(11))), "holds more than 10 files"),
        (archive_of(member("a", b"x" * 200_000)), "too large when unpacked"),
        (archive_of(member("x", b"", tarfile.XHDTYPE, 2 << 20), member("a")), "has a part that is too large"),
        (archive_of(member("x", b"", tarfile.GNUTYPE_LONGNAME, 2 << 20), member("a")), "has a part that is too large"),
        (io.BytesIO(b"no archive at all" * 100), "cannot be unpacked: "),
        (io.BytesIO(archive_of(member("a", b"x" * 5000)).getvalue()[:3000]), "cannot be unpacked: "),
        (io.BytesIO(b""), "cannot be unpacked: "),
    ],
    ids=["twice", "a file as folder", "many", "large", "header", "long name", "nonsense", "cut off", "empty"],
)
def test_what_is_damaged_or_too_much_is_refused(tmp_path: Path, archive: io.BytesIO, says: str) -> None:
    archive.seek(0)
    with pytest.raises(BadArchive, match=says):
        unpack(archive, tmp_path / "out", most_bytes=100_000, most_files=10)
    assert b"y" not in tree(tmp_path / "out").values(), "nothing is written over another file"


def test_a_bomb_of_zeros_is_stopped_before_it_grows(tmp_path: Path) -> None:
    packed = gzip.compress(archive_of(member("zeros", b"", size=64 << 20)).getvalue())
    with gzip.open(io.BytesIO(packed)) as stream, pytest.raises(BadArchive, match="too large"):
        unpack(stream, tmp_path / "out", most_bytes=4 << 20)  # type: ignore[arg-type]
    assert len(tree(tmp_path / "out").get("zeros", b"")) <= 4 << 20


def test_the_caller_names_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(BadArchive, match=r"^holds 'other', which is no part of a backup$"):
        unpack(
            archive_of(member("one/1.json"), member("other")), tmp_path / "out", most_bytes=1 << 20,
            names=re.compile(r"one/\d\.json"), kind="part of a backup",
        )  # fmt: skip
    assert set(tree(tmp_path / "out")) == {"one/1.json"}
