"""mrjob: its local runner with two processes. It has no session to keep warm: each work pays its runner's start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mrjob
from mrjob.compat import jobconf_from_env
from mrjob.job import MRJob
from mrjob.step import MRStep

CORES = 2


class Job(MRJob):  # type: ignore[misc]
    """All works in one file, since mrjob executes the job's file again for each of its tasks."""

    def configure_args(self) -> None:
        super().configure_args()
        self.add_passthru_arg("--work")

    def steps(self) -> list[MRStep]:
        if self.options.work == "sort":
            return [MRStep(mapper=self.key_and_rest, reducer=self.as_they_are)]
        if self.options.work == "join":
            return [MRStep(mapper_init=self.which_table, mapper=self.by_customer, reducer=self.orders_with_names)]
        combiner = {} if self.options.work == "wordcount" else {"combiner": self.add_up}
        return [MRStep(mapper=self.words, reducer=self.add_up, **combiner)]

    def words(self, _: Any, line: str) -> Iterator[tuple[str, int]]:
        for word in line.split():
            yield word, 1

    def add_up(self, word: str, counts: Iterator[int]) -> Iterator[tuple[str, int]]:
        yield word, sum(counts)

    def key_and_rest(self, _: Any, line: str) -> Iterator[tuple[str, str]]:
        key, _, rest = line.partition("\t")
        yield key, rest

    def as_they_are(self, key: str, values: Iterator[str]) -> Iterator[tuple[str, str]]:
        """The runner sorts by key with sort(1); the parts in their order are the total order of these keys."""
        for value in values:
            yield key, value

    def which_table(self) -> None:
        self.kind = jobconf_from_env("mapreduce.map.input.file").rpartition("/")[2].partition("-")[0]

    def by_customer(self, _: Any, line: str) -> Iterator[tuple[int, list[str]]]:
        number, *columns = line.split("\t")
        yield int(number), [self.kind, *columns]

    def orders_with_names(self, number: int, rows: Iterator[list[str]]) -> Iterator[tuple[int, list[str]]]:
        tables: dict[str, list[list[str]]] = {"customers": [], "orders": []}
        for kind, *columns in rows:
            tables[kind].append(columns)
        for name in tables["customers"]:
            for order in tables["orders"]:
                yield number, name + order


class Competitor:
    """`-r local` with two cores, one runner for each work."""

    how = "-r local, 2 cores, default protocols; each runner's start is in the time"
    separator = "\t"

    def __init__(self, name: str, folder: Path) -> None:
        self.versions = {"mrjob": mrjob.__version__}
        self._scratch = folder / "mrjob-tmp"
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._conf = self._scratch / "mrjob.conf"
        settings = {"num_cores": CORES, "local_tmp_dir": str(self._scratch), "bootstrap_mrjob": False}
        self._conf.write_text(json.dumps({"runners": {"local": settings}}))

    def run(self, work: str, inputs: list[Path], out: Path) -> None:
        options = ["-r", "local", "-c", str(self._conf), "--output-dir", str(out), "--no-cat-output", "-q"]
        with Job([*options, "--work", work, *map(str, inputs)]).make_runner() as runner:
            runner.run()

    def output(self, work: str, out: Path) -> list[Path]:
        return sorted(out.glob("part-*"))

    def close(self) -> None:
        pass


if __name__ == "__main__":
    Job.run()
