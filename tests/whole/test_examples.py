"""The four example projects on real clusters of several shapes, against computations of one process and coreutils."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import random
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from daemons import own_address

from mrcore.cluster.manage_cluster import ManageCluster
from mrcore.launchers import local
from mrcore.queue import job as jobs
from mrcore.queue.scheduler import Runner, Scheduler
from mrcore.settings.config import Settings

PROJECTS = Path(__file__).resolve().parents[2] / "projects"
LICENCES = Path("/usr/share/common-licenses")
SHAPES = [(1, 1), (1, 2), (3, 2)]  # nodes × servers of each
HELD_ITEMS = 200  # so few that there are hundreds of spills

Item = tuple[Any, Any]


@dataclass
class Cluster:
    """A running cluster and the manager that keeps its connections; runs are numbered, since each needs an id."""

    settings: Settings
    manager: ManageCluster
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run(self, project: str, inputs: Iterable[Path], **changes: Any) -> tuple[dict[str, Any], list[Item]]:
        """Run the project's own job.yml on these inputs; gives its counts, and the output in `cat`'s order."""
        job = example_job(project) | {"input_dirs": [str(path) for path in inputs]} | changes
        manifest = self.manager.run(jobs.validate(job, PROJECTS), run=next(self.numbers))
        return manifest["counts"], self.cat(job["job_name"])

    def cat(self, name: str) -> list[Item]:
        output = io.BytesIO()
        self.manager.cat(name, output)
        return [(key, value) for key, value in map(json.loads, output.getvalue().decode().splitlines())]


def example_job(project: str) -> dict[str, Any]:
    from mrcore.settings.validation import parse_yaml

    file = PROJECTS / project / "job.yml"
    job: dict[str, Any] = parse_yaml(file.read_bytes(), str(file))
    return job


def started(home: Path, nodes: int, servers: int, memory_bytes: int | None = None) -> Iterator[Cluster]:
    """A running cluster at addresses of its own; afterwards none of its processes is left."""
    address, *_ = [own_address() for _ in range(nodes)]
    local.configure(home, nodes=nodes, servers=servers, address=address, memory_bytes=memory_bytes)
    settings = local.configure(home).model_copy(update={"projects_dir": PROJECTS})
    try:
        local.start_cluster(settings)
        yield Cluster(settings, ManageCluster(settings))
    finally:
        local.stop_cluster(settings)
        assert not processes_of(home)
        for node in settings.nodes:
            assert not list(node.layout.working_dir.iterdir())


def processes_of(home: Path) -> list[str]:
    """What was started for the cluster of this home and still runs, found by its environment."""
    mark, found = f"MRCORE_SERVER={local.cluster_id(home)}/".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark in (folder / "environ").read_bytes():  # a zombie's is empty
                found.append(folder.name)
    return found


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from started(tmp_path_factory.mktemp("home"), *request.param)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real text: the licences and some modules of the standard library, half a megabyte, as plain files in a folder.

    `str.split` also takes the control characters 1C to 1F and Unicode's spaces for white space, coreutils do not:
    modules that hold such are left out, and with them what is not UTF-8.
    """
    folder = tmp_path_factory.mktemp("text")
    sources = [path for path in sorted(LICENCES.iterdir()) if not path.is_symlink()]
    sources += sorted(Path(sysconfig.get_path("stdlib")).glob("[a-b]*.py"))
    for source in sources:
        content = source.read_bytes()
        if content.isascii() and not re.search(rb"[\x1c-\x1f]", content):
            (folder / source.name).write_bytes(content)
    files = sorted(folder.iterdir())
    assert len(files) > 20 and sum(path.stat().st_size for path in files) > 300_000
    return files


def tuning(combiner: str | None, spills: bool) -> dict[str, Any]:
    return {
        "combine_function_name": combiner,
        "max_number_dumped_items_shuffler": HELD_ITEMS if spills else None,
    }


def lines(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        with path.open(encoding="utf-8", newline="\n") as stream:
            yield from stream


def grouped(items: Iterable[Item]) -> Iterator[tuple[Any, list[Any]]]:
    """The textbook's MapReduce: sort all items by key, group, in one process."""
    for key, group in itertools.groupby(sorted(items, key=lambda item: item[0]), key=lambda item: item[0]):
        yield key, [value for _, value in group]


def check_spills(counts: dict[str, Any], wanted: bool) -> None:
    assert counts["spills"] > 200 if wanted else counts["spills"] <= 6


many_ways = pytest.mark.parametrize(
    "spills", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in memory", "hundreds of spills"]
)
combined = pytest.mark.parametrize("combined", [False, True], ids=["plain", "combiner"])


@many_ways
@combined
def test_word_count_is_what_one_process_counts(
    cluster: Cluster, text: list[Path], combined: bool, spills: bool
) -> None:
    words = [word for line in lines(text) for word in line.split()]
    counts, items = cluster.run("word_count", text, **tuning("add_up" if combined else None, spills))
    assert sorted(items) == [(word, sum(ones)) for word, ones in grouped((word, 1) for word in words)]
    assert counts["items"] == len(words) and counts["input_files"] == len(text)
    check_spills(counts, spills)


def test_word_count_is_what_coreutils_count(cluster: Cluster, text: list[Path]) -> None:
    script = """cat "$@" | tr -s '[:space:]' '\\n' | grep . | sort | uniq -c"""
    command = ["bash", "-c", script, "bash", *map(str, text)]
    told = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=True)
    expected = [(word, int(count)) for count, word in map(str.split, told.stdout.splitlines())]
    _, items = cluster.run("word_count", text)
    assert sorted(items) == expected


@many_ways
@combined
def test_inverted_index_is_what_one_process_finds(
    cluster: Cluster, text: list[Path], combined: bool, spills: bool
) -> None:
    files = text[:12]
    found = ((name, str(path)) for path in files for line in lines([path]) for name in re.findall(r"[^\W\d]\w*", line))
    counts, items = cluster.run("inverted_index", files, **tuning("each_file_once" if combined else None, spills))
    assert sorted(items) == [(name, sorted(set(paths))) for name, paths in grouped(found)]
    assert spills == (counts["spills"] > 100)


@many_ways
def test_total_sort_is_what_sort_gives_in_the_order_of_cat(cluster: Cluster, tmp_path: Path, spills: bool) -> None:
    draw = random.Random(5)
    rows = [f"{draw.randrange(20_000):05d}\t{'äöü€𝄞'[draw.randrange(5)]}{draw.random()}" for _ in range(45_000)]
    files = [tmp_path / f"rows-{number}" for number in range(4)]
    for number, path in enumerate(files):
        path.write_text("".join(f"{row}\n" for row in rows[number::4]), encoding="utf-8")
    counts, items = cluster.run("total_sort", files, **tuning(None, spills), max_number_dumped_items_reducer=7_000)
    assert items == sorted(tuple(row.split("\t")) for row in rows)
    check_spills(counts, spills)


def test_total_sort_of_real_lines_is_what_coreutils_sort_gives(cluster: Cluster, text: list[Path]) -> None:
    files = [path for path in text if b"\t" not in path.read_bytes()]
    command = ["sort", *map(str, files)]
    told = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=True)
    _, items = cluster.run("total_sort", files)
    assert [key for key, _ in items] == told.stdout.split("\n")[:-1]


@many_ways
def test_join_is_what_nested_loops_give(cluster: Cluster, tmp_path: Path, spills: bool) -> None:
    draw = random.Random(7)
    customers = [(number, f"name {draw.random()}") for number in range(0, 9_000, 3)]
    orders = [(draw.randrange(9_000), f"o{each}", f"{draw.random():.2f}") for each in range(45_000)]
    for name, table in (("customers-1.tsv", customers[::2]), ("customers-2.tsv", customers[1::2]), ("orders", orders)):
        (tmp_path / name).write_text("".join("\t".join(map(str, row)) + "\n" for row in table))
    counts, items = cluster.run("join", [tmp_path], **tuning(None, spills))
    names = dict(customers)
    assert sorted(items) == sorted((number, [names[number], *row]) for number, *row in orders if number in names)
    check_spills(counts, spills)


def test_join_with_groups_on_disk_is_the_same(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "customers").write_text("1\tAda\n2\tBlaise\n")
    (tmp_path / "orders").write_text("".join(f"{1 + each % 3}\t{each}\t1.00\n" for each in range(20_000)))
    _, items = cluster.run("join", [tmp_path], disk_based_input=True, max_number_dumped_items_shuffler=1_000)
    expected = [
        (1 + each % 3, [("Ada", "Blaise")[each % 3], str(each), "1.00"]) for each in range(20_000) if each % 3 < 2
    ]
    assert sorted(items) == sorted(expected)


@pytest.mark.parametrize("project", ["word_count", "inverted_index", "total_sort", "join"])
def test_the_job_files_run_through_the_queue_as_the_readmes_say(cluster: Cluster, project: str) -> None:
    job = example_job(project)
    if project == "join":
        job["input_dirs"] = [str(PROJECTS / "join" / "data")]
    job["job_name"] = f"{project}-queued"
    Scheduler(cluster.settings).submit_job(job)
    assert Runner(cluster.settings, manage_cluster=cluster.manager).run(once=True) == {"succeeded": 1}
    items = cluster.cat(job["job_name"])
    check: dict[str, Callable[[], bool]] = {
        "word_count": lambda: dict(items)["warranty"] > 10,
        "inverted_index": lambda: str(LICENCES / "GPL-3") in dict(items)["warranty"],
        "total_sort": lambda: items == sorted(items) and len(items) > 1_000,
        "join": lambda: sorted(items)[2:] == [(2, ["Blaise", "1005", "1.75"]), (3, ["Charles", "1002", "3.20"])],
    }
    assert check[project]()
    readme = (PROJECTS / project / "README.md").read_text()
    assert f"mrcore submit projects/{project}/job.yml" in readme and f"mrcore cat {project}" in readme


@pytest.mark.slow
def test_word_count_with_a_memory_budget_so_small_that_it_spills_again_and_again(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    draw = random.Random(11)
    words = [f"{draw.randrange(1 << 40):x}" for _ in range(1_500_000)]
    (tmp_path / "words").write_text(
        "".join(" ".join(words[start : start + 10]) + "\n" for start in range(0, len(words), 10))
    )
    home = tmp_path_factory.mktemp("home")
    for small in started(home, 1, 2, memory_bytes=128 << 20):
        counts, items = small.run("word_count", [tmp_path / "words"], combine_function_name=None)
        assert sorted(items) == [(word, len(ones)) for word, ones in grouped((word, 1) for word in words)]
        assert counts["spills"] > 30  # by memory alone; the tests above count items, and spill hundreds of times
