"""The same jobs as somebody would write them by hand for one machine with two cores: the yardstick.

Two processes over halves of the files, a dict (for the sort: lists) per process, cut into two partitions; then two
processes that each merge one partition, sort it and write it as JSON lines. `python by_hand.py WORK OUT FILE…`
"""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ujson

WORKERS = 2
SAMPLE_LINES = 2_000


def line(item: Any) -> str:
    return ujson.dumps(item, ensure_ascii=False, escape_forward_slashes=False) + "\n"


def lines(files: Iterable[Path]) -> Iterable[str]:
    for path in files:
        with path.open(encoding="utf-8", newline="\n") as stream:
            yield from stream


# ---- word count


def count_words(files: list[Path], cut: Any) -> list[Any]:
    counts: dict[str, int] = {}
    for text in lines(files):
        for word in text.split():
            counts[word] = counts.get(word, 0) + 1
    parts: list[dict[str, int]] = [{} for _ in range(WORKERS)]
    for word, count in counts.items():
        parts[hash(word) % WORKERS][word] = count  # the workers are forks of one process: one hash for all
    return parts


def merge_counts(parts: list[dict[str, int]]) -> Iterable[Any]:
    counts = parts[0]
    for more in parts[1:]:
        for word, count in more.items():
            counts[word] = counts.get(word, 0) + count
    return sorted(counts.items())


# ---- total order sort


def sort_cut(files: list[Path]) -> str:
    sample = sorted(text for path in files for _, text in zip(range(SAMPLE_LINES), lines([path]), strict=False))
    return sample[len(sample) // 2].split("\t")[0] if sample else ""


def cut_records(files: list[Path], cut: str) -> list[Any]:
    parts: list[list[tuple[str, str]]] = [[], []]
    for text in lines(files):
        key, _, rest = text.rstrip("\n").partition("\t")
        parts[key >= cut].append((key, rest))
    return parts


def merge_records(parts: list[list[tuple[str, str]]]) -> Iterable[Any]:
    records = [record for part in parts for record in part]
    records.sort()
    return records


# ---- join


def cut_tables(files: list[Path], cut: Any) -> list[Any]:
    parts: list[tuple[dict[int, str], list[tuple[int, str, str]]]] = [({}, []) for _ in range(WORKERS)]
    for path in files:
        customers = path.name.startswith("customers")
        for text in lines([path]):
            if customers:
                first, name = text.rstrip("\n").split("\t")
                number = int(first)
                parts[number % WORKERS][0][number] = name
            else:
                first, order, amount = text.rstrip("\n").split("\t")
                number = int(first)
                parts[number % WORKERS][1].append((number, order, amount))
    return parts


def merge_tables(parts: list[Any]) -> Iterable[Any]:
    names = {number: name for customers, _ in parts for number, name in customers.items()}
    orders = sorted(row for _, part in parts for row in part)
    for number, order, amount in orders:
        if number in names:
            yield number, (names[number], order, amount)


STEPS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "wordcount": (count_words, merge_counts, lambda files: None),
    "wordcount-combiner": (count_words, merge_counts, lambda files: None),
    "sort": (cut_records, merge_records, sort_cut),
    "join": (cut_tables, merge_tables, lambda files: None),
    "empty": (count_words, merge_counts, lambda files: None),
}


def first_step(work: str, worker: int, files: list[Path], cut: Any, folder: Path) -> None:
    for number, part in enumerate(STEPS[work][0](files, cut)):
        with open(folder / f"{worker}-{number}", "wb") as stream:
            marshal.dump(part, stream)


def second_step(work: str, number: int, folder: Path, out: Path) -> None:
    parts = []
    for worker in range(WORKERS):
        with open(folder / f"{worker}-{number}", "rb") as stream:
            parts.append(marshal.load(stream))
    with open(out / f"part-{number}", "w", encoding="utf-8", buffering=1 << 20) as stream:
        stream.writelines(map(line, STEPS[work][1](parts)))


def in_parallel(step: Callable[..., None], orders: list[tuple[Any, ...]]) -> None:
    context = get_context("fork")
    workers = [context.Process(target=step, args=order) for order in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a worker failed")


def main(work: str, out: Path, files: list[Path]) -> None:
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        folder, cut = Path(name), STEPS[work][2](files)
        in_parallel(first_step, [(work, each, files[each::WORKERS], cut, folder) for each in range(WORKERS)])
        in_parallel(second_step, [(work, each, folder, out) for each in range(WORKERS)])


class Competitor:
    """The script, started anew for each work as one would: it has no session to keep warm."""

    how = "two processes, dict per process, marshal files between, ujson per line; its start is in the time"
    separator = None

    def __init__(self, name: str, folder: Path) -> None:
        self.versions = {"ujson": ujson.__version__}

    def run(self, work: str, inputs: list[Path], out: Path) -> None:
        subprocess.run([sys.executable, os.path.abspath(__file__), work, str(out), *map(str, inputs)], check=True)

    def output(self, work: str, out: Path) -> list[Path]:
        return sorted(out.glob("part-*"))

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
