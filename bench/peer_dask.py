"""Dask: bags and delayed functions of pure Python on one local cluster of two worker processes, kept warm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dask
import dask.bag
import distributed
from dask import delayed

PARTITIONS = 4
SAMPLE_LINES = 2_000

Row = tuple[Any, ...]


def to_json(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":"))


def customer(line: str) -> Row:
    number, name = line.rstrip("\n").split("\t")
    return int(number), name


def order(line: str) -> Row:
    number, identifier, amount = line.rstrip("\n").split("\t")
    return int(number), identifier, amount


def joined(pair: tuple[Row, Row]) -> str:
    (number, name), (_, *columns) = pair
    return to_json((number, (name, *columns)))


def first(row: Row) -> Any:
    return row[0]


def cut(path: Path, cuts: list[str]) -> list[list[Row]]:
    """One file's records, by ranges of keys."""
    from bisect import bisect_right

    parts: list[list[Row]] = [[] for _ in range(len(cuts) + 1)]
    with path.open(encoding="utf-8", newline="\n") as stream:
        for line in stream:
            key, _, rest = line.rstrip("\n").partition("\t")
            parts[bisect_right(cuts, key)].append((key, rest))
    return parts


def write_sorted(pieces: list[list[Row]], path: Path) -> None:
    records = [record for piece in pieces for record in piece]
    records.sort(key=first)
    write_lines(map(to_json, records), path)


def write_lines(lines: Iterable[str], path: Path) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(line + "\n" for line in lines)


def sort(inputs: list[Path], out: Path) -> None:
    """Bags cannot sort, so: range partitioning by hand with delayed functions, cuts from a sample."""
    sample = []
    for path in inputs:
        with path.open() as stream:
            sample += [line.partition("\t")[0] for _, line in zip(range(SAMPLE_LINES), stream, strict=False)]
    sample.sort()
    cuts = [sample[len(sample) * each // PARTITIONS] for each in range(1, PARTITIONS)] if sample else []
    pieces = [delayed(cut, nout=len(cuts) + 1)(path, cuts) for path in inputs]
    writes = [
        delayed(write_sorted)([piece[each] for piece in pieces], out / f"part-{each}") for each in range(len(cuts) + 1)
    ]
    dask.compute(*writes)


class Competitor:
    """One LocalCluster of two worker processes with one thread each."""

    how = (
        "LocalCluster, 2 processes of 1 thread, 6 GB each; word count: Bag.frequencies in both rows (it always "
        "combines, groupby takes many times longer); sort: delayed functions (Bag has none); join: Bag.join, the "
        "small side whole; cluster warm"
    )
    separator = None

    def __init__(self, name: str, folder: Path) -> None:
        dask.config.set({"temporary-directory": str(folder / "dask-tmp"), "distributed.comm.timeouts.connect": "60s"})
        self._cluster = distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit="6GB", dashboard_address=None, host="127.0.0.1"
        )
        self._client = distributed.Client(self._cluster)
        self.versions = {"dask": dask.__version__, "distributed": distributed.__version__}
        dask.bag.from_sequence(range(1000), npartitions=4).frequencies().compute()

    def run(self, work: str, inputs: list[Path], out: Path) -> None:
        out.mkdir(parents=True)
        files = [str(path) for path in inputs]
        if work == "sort":
            sort(inputs, out)
        elif work == "join":
            tables = {kind: [name for name in files if Path(name).name.startswith(kind)] for kind in ("cust", "orders")}
            customers = dask.bag.read_text(tables["cust"]).map(customer).repartition(1)
            orders = dask.bag.read_text(tables["orders"]).map(order)
            whole = delayed(list)(customers.to_delayed()[0])
            orders.join(whole, first, first).map(joined).to_textfiles(str(out / "part-*"))
        else:
            words = dask.bag.read_text(files).map(str.split).flatten()
            words.frequencies().map(to_json).to_textfiles(str(out / "part-*"))

    def output(self, work: str, out: Path) -> list[Path]:
        return sorted(out.glob("part-*"))

    def close(self) -> None:
        self._client.close()
        self._cluster.close()
