"""Projects as they were written for the original, whose items went through json.dumps: on a real cluster."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import pytest
from clusters import TestCluster
from oracle import bag, one_form

from mrcore.queue import job as jobs

MAP = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum

Point = namedtuple("Point", "x y")
Size = IntEnum("Size", "SMALL LARGE")

class Text(str): pass
class Number(int): pass

class MapFunctions():
    def __init__(self, map_function_name):
        self.map_function = getattr(self, map_function_name)

    def get_map_function(self):
        return self.map_function

    def emit(self, line, auxiliary_data):
        number = int(line)
        counts = Counter({"a": number, Size.LARGE: Number(2), 0.5: float("nan")})
        lists = defaultdict(list, {Text("k"): [Point(number, float("inf"))]})
        return [
            (Size(1 + number % 2), counts),
            (Text("text"), OrderedDict([("z", number), ("a", lists)])),
            (Point(number % 3, Text("p")), float("nan")),
            (float("inf") if number % 2 else float("-inf"), Point(Size.SMALL, number)),
            Point("pair", -float("inf")),
        ]
"""
REDUCE = """
from collections import OrderedDict

class ReduceFunctions():
    def __init__(self, reduce_function_name):
        self.reduce_function = getattr(self, reduce_function_name)

    def get_reduce_function(self):
        return self.reduce_function

    def keep(self, group, auxiliary_data):
        for key, value in group:
            yield key, OrderedDict(value) if isinstance(value, dict) else value

    def fill(self, group, auxiliary_data):
        disk, _ = auxiliary_data
        disk.extend(group)
        return disk
"""
Point = namedtuple("Point", "x y")
Size = IntEnum("Size", "SMALL LARGE")


def expected(number: int) -> Iterator[Any]:
    """The items of a line as the standard library's json writes and reads them."""
    nan, infinity = float("nan"), float("inf")
    values = [
        (Size(1 + number % 2), Counter({"a": number, Size.LARGE: 2, 0.5: nan})),
        ("text", OrderedDict([("z", number), ("a", defaultdict(list, k=[Point(number, infinity)]))])),
        (Point(number % 3, "p"), nan),
        (infinity if number % 2 else -infinity, Point(Size.SMALL, number)),
        ("pair", -infinity),
    ]
    for key, value in values:
        plain = json.loads(json.dumps([key, value]))
        yield one_form(plain[0]), plain[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    """Two nodes, and a project in the original's style."""
    with TestCluster(tmp_path_factory.mktemp("original"), 2, 1) as made:
        project = made.settings.projects_dir / "original"
        project.mkdir()
        (project / "map_functions.py").write_text(MAP)
        (project / "reduce_functions.py").write_text(REDUCE)
        yield made


def run(cluster: TestCluster, name: str, number: int, **keys: Any) -> list[Any]:
    """Run the job once and give its items, keys as tuples."""
    wanted = {"job_name": name, "project_name": "original", "map_function_name": "emit"} | keys
    job = jobs.template("mapreduce") | {"input_dirs": [f"inputs/{name}"], "reduce_function_name": "keep"} | wanted
    cluster.run(jobs.validate(job, cluster.settings.projects_dir), run=number)
    return [(one_form(key), value) for key, value in cluster.items(name)]


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"partitioner": "range", "number_of_partitions": 3, "sort_values": True},
        {"disk_based_input": True, "sort_values": True, "max_number_dumped_items_shuffler": 7},
        {"disk_based_output": True, "reduce_function_name": "fill", "compress": True},
        {"reduce_function_name": None},
        {"hold_state": True, "merge_output": True, "combine_function_name": "keep"},
        {"hold_state": True, "merge_output": True, "partitioner": "range"},
    ],
    ids=lambda keys: "-".join(keys) or "plain",
)
def test_items_of_the_original_are_taken_as_its_json_took_them(
    cluster: TestCluster, keys: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    name = f"job-{len(keys)}-{'-'.join(map(str, keys.values()))}"[:90]
    texts = {f"{part}.txt": "".join(f"{n}\n" for n in range(part, 60, 4)) for part in range(4)}
    cluster.write_inputs(texts, entry=f"inputs/{name}")
    wanted = bag(item for number in range(60) for item in expected(number))
    first = run(cluster, name, 1, **keys)
    assert bag(first) == wanted
    if keys.get("partitioner") == "range":
        ordered = [key for key, _ in first]
        assert [key for key in ordered if isinstance(key, float)] == sorted(
            key for key in ordered if isinstance(key, float)
        )
    if keys.get("merge_output"):
        cluster.write_inputs({"more.txt": "60\n61\n"}, entry=f"inputs/{name}")
        merged = run(cluster, name, 2, **keys)
        assert bag(merged) == bag(item for number in range(62) for item in expected(number))
