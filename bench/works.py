"""What is measured: the works, their inputs (made here, always the same), and digests to compare results by."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from zlib import crc32

TEXT_BYTES = 128 * 10**6
TEXT_FILES = 16
SORT_RECORDS = 2_000_000  # of 100 bytes: a key of 10 characters, a tab, 88 more, a newline
CUSTOMERS, ORDERS = 200_000, 2_000_000
CUSTOMER_NUMBERS = 250_000  # orders name customers below this: one in five is of nobody
SUFFIXES = (".py", ".pyi", ".h", ".hpp", ".c", ".pm", ".rst", ".txt")
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


@dataclass(frozen=True)
class Work:
    """One row of the comparison. `ordered`: the output as a whole is in order, and is compared in order."""

    name: str
    title: str
    data: str
    ordered: bool = False


WORKS = {
    work.name: work
    for work in (
        Work("wordcount", "word count", "text"),
        Work("wordcount-combiner", "word count with combiner", "text"),
        Work("sort", "total order sort", "sort", ordered=True),
        Work("join", "join", "join"),
        Work("empty", "empty job", "empty"),
    )
}


def make_inputs(folder: Path, kind: str, scale: float) -> list[Path]:
    """Give the files of one kind of input, made now unless they lie in `folder` from before."""
    target = folder / f"{kind}-{scale:g}"
    if not (target / "complete").exists():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        made = MAKERS[kind](target, scale)
        (target / "complete").write_text(json.dumps(made))
    return sorted(path for path in target.iterdir() if path.name != "complete")


def describe_inputs(files: list[Path]) -> dict[str, int]:
    """How many files, bytes and lines."""
    lines = 0
    for path in files:
        with path.open("rb") as stream:
            lines += sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "lines": lines}


# ---- inputs


def _source_folders() -> list[Path]:
    found = [Path(sysconfig.get_path("stdlib")), Path("/usr/include"), *sorted(Path("/usr/lib").glob("python3*"))]
    found += [Path(each) for each in site.getsitepackages()]
    found += [Path(sys.base_prefix), Path("/usr/share"), Path("/usr/lib")]
    return [folder for folder in found if folder.is_dir()]


def _source_texts() -> Iterator[bytes]:
    """Source text of this machine in a fixed order, each content once, UTF-8 only; from the start again at the end."""
    found: list[Path] = []
    seen: set[bytes] = set()
    for folder in _source_folders():
        for base, folders, files in os.walk(folder):
            folders.sort()
            for name in sorted(files):
                path = Path(base, name)
                if not name.endswith(SUFFIXES) or path.is_symlink():
                    continue
                try:
                    content = path.read_bytes()
                    content.decode()
                except (OSError, ValueError):
                    continue
                if (mark := hashlib.sha256(content).digest()) not in seen:
                    seen.add(mark)
                    found.append(path)
                    yield content if content.endswith(b"\n") else content + b"\n"
    while True:
        for path in found:
            content = path.read_bytes()
            yield content if content.endswith(b"\n") else content + b"\n"


def _make_text(folder: Path, scale: float) -> dict[str, int]:
    """A few large files, since thousands of small ones would measure each system's cost per file."""
    texts, wanted = _source_texts(), int(TEXT_BYTES * scale)
    total = 0
    for number in range(TEXT_FILES):
        with (folder / f"text-{number:02d}").open("wb") as stream:
            while total < wanted * (number + 1) // TEXT_FILES:
                total += stream.write(next(texts))
    return {"bytes": total}


def _make_sort(folder: Path, scale: float) -> dict[str, int]:
    draw, records = random.Random(20), int(SORT_RECORDS * scale)
    letters = (ALPHABET * 4).encode()  # a byte's letter
    for number in range(8):
        count = records * (number + 1) // 8 - records * number // 8
        text = draw.randbytes(count * 98).translate(letters)
        with (folder / f"records-{number}").open("wb") as stream:
            for start in range(0, len(text), 98):
                stream.write(text[start : start + 10] + b"\t" + text[start + 10 : start + 98] + b"\n")
    return {"records": records}


def _make_join(folder: Path, scale: float) -> dict[str, int]:
    draw, customers, orders = random.Random(30), int(CUSTOMERS * scale), int(ORDERS * scale)
    numbers = list(range(customers))
    draw.shuffle(numbers)
    rows = (f"{number}\tname {draw.getrandbits(40):010x}\n" for number in numbers)
    for number in range(2):
        (folder / f"customers-{number}").write_text("".join(islice(rows, (customers + 1) // 2)))
    top = int(CUSTOMER_NUMBERS * scale)
    rows = (f"{int(draw.random() * top)}\t{each}\t{draw.random() * 1000:.2f}\n" for each in range(orders))
    for number in range(8):
        (folder / f"orders-{number}").write_text("".join(islice(rows, (orders + 7) // 8)))
    return {"customers": customers, "orders": orders}


def _make_empty(folder: Path, scale: float) -> dict[str, int]:
    (folder / "empty").write_text("\n")
    return {}


MAKERS: dict[str, Callable[[Path, float], dict[str, int]]] = {
    "text": _make_text,
    "sort": _make_sort,
    "join": _make_join,
    "empty": _make_empty,
}

# ---- results


def digest(files: list[Path], ordered: bool, separator: str | None = None) -> str:
    """A checksum of items, whatever JSON writer made them; of their sequence if `ordered`, else of the bag of them.

    Each line is `[key, value]`, or with a `separator` key and value as JSON with it between them.
    """
    count = total = sequence = 0
    for path in files:
        with path.open(encoding="utf-8", newline="\n") as stream:
            for line in stream:
                item = json.loads(line) if separator is None else [json.loads(each) for each in line.split(separator)]
                text = json.dumps(item).encode()
                count += 1
                if ordered:
                    sequence = crc32(text, sequence)
                else:
                    mixed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
                    total = (total + mixed) & 0xFFFFFFFFFFFFFFFF
    return f"{count} items, {sequence if ordered else total:x}"
