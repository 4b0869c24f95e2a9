"""What a node answers against what it may: every kind of lie ends as a fault that names the node, none is believed."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from daemons import made_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcore.cluster.attempt import Attempt, Start
from mrcore.cluster.partitions import Partition, Partitioning
from mrcore.engine.output import part_name
from mrcore.engine.records import as_key
from mrcore.errors import ClusterFault, JobFault, Malformed, MrcoreError, UsageError
from mrcore.messages import pages as pages_of
from mrcore.messages.kinds import convert
from mrcore.messages.methods import METHODS, POLL, decode_error
from mrcore.messages.nodes import InputPage
from mrcore.messages.pages import InputPages
from mrcore.messages.tasks import Bundle, Done, RunIdentity, TaskEvent, TaskIdentity, TaskResult, check_result, read_key
from mrcore.node.cluster_server import ClusterServer
from mrcore.node.node_agent import NodeAgent

Json = dict[str, Any]
MAP = {"job": "j", "run": 3, "phase": "MAP", "task": 7, "try": 2}
REDUCE = MAP | {"phase": "REDUCE", "try": 1}
WHO = {"name": "n1", "release": "1.0.0-ab", "version": "1.0.0", "wire_version": 1, "python": "3.11.2"}
INPUTS: Json = {
    "files": [["/x/a", 10, 1, 2]], "matched": {"in": 1}, "skipped": {"dotfile": 1}, "fingerprint": "ab", "faults": [],
    "next": None,
}  # fmt: skip
PAGE = {"listing": "ab12", "files": [["a/b", 1, -5, 0o644]], "next": None}
PART = {"name": part_name(3, 7, 0, False), "partition": 7, "crc32": 1} | dict.fromkeys(
    ("records", "bytes", "text_bytes", "batch_bytes", "max_decoded"), 5
)
RUN = {"id": "map-7-2-0", "bytes": 9, "groups": 1, "values": 2, "max_decoded": 3, "partitions": {"0": 9}, "samples": []}
COMMON: Json = {"peak_bytes": 1, "counters": {"lines": 2}, "seconds": {"map": 0.5}}
HONEST: dict[str, Any] = {  # an answer of each method that is one
    "health": WHO
    | {"disk_free_bytes": 5, "disk_total_bytes": 9, "cpus": 2, "load": 0.5, "time": 1.5, "served_bytes": {"run": 7}},
    "start_run": {"disk_free_bytes": 5},
    "list_inputs": INPUTS,
    "check_tails": [[10, 5, None]],
    "publish": {"published": 1, "removed": 0},
    "sweep": {"working": 1},
    "list_files": PAGE,
    "file_checksum": 7,
    "begin_upload": {"upload": "ab", "disk_free_bytes": 1},
    "announce": None,
    "commit_upload": 3,
    "drop_upload": None,
    "delete_files": {"files": 1, "bytes": 2, "outputs": [["j", 1, 1, 2]]},
    "holdings": PAGE | {"files": [["a/b", 1, -5, 0o600, 9]], "count": 1, "bytes": 1, "faults": []},
    "taken": [True],
    "stage_moves": [[1, 2]],
    "publish_moves": [True],
    "remove_moves": [False],
    "hello": WHO | {"incarnation": "ab", "pid": 3, "anonymous_bytes": 3},
    "order": {"accepted": True},
    "give": {"given": 1},
    "poll": {"incarnation": "ab", "events": [[1, {"event": "want", "identity": None}]]},
    "cancel": {"cancelled": False},
} | dict.fromkeys(("project_state", "environment_state", "install_environment", "auxiliary"), True) | dict.fromkeys(
    ("end_run", "end_server", "exists"), False
)  # fmt: skip
GIVEN = {"files": [["/x/a", 10, 1, 2, 0]], "names": ["a"]}


def checked(method: str, arguments: Json, answer: Any, node: str) -> Any:
    """What a caller gets to see of an answer, as JSON has it."""
    return json.loads(
        msgspec.json.encode(METHODS[method].decode(msgspec.Raw(json.dumps(answer).encode()), arguments, node))
    )


def test_every_method_of_every_daemon_has_its_answer(tmp_path: Path) -> None:
    spec = made_spec(tmp_path)
    methods = NodeAgent(spec).methods().keys() | ClusterServer(spec, None).methods().keys()  # type: ignore[arg-type]
    assert methods == METHODS.keys() == HONEST.keys()


@pytest.mark.parametrize("method", HONEST)
def test_an_honest_answer_passes_unchanged(method: str) -> None:
    assert checked(method, GIVEN, copy.deepcopy(HONEST[method]), "n1") == HONEST[method]


WRONG: list[Any] = [
    None, [], {}, "x", 5, -1, True, 1.5, math.inf, 1 << 70, [None], [[]], {"files": 1}, {"events": {}}, [{"event": 1}],
    [1] * 9, {"next": "x"}, "\ud800", {"incarnation": 3, "events": []},
]  # fmt: skip


@pytest.mark.parametrize("method", HONEST)
def test_anything_else_is_a_fault_that_names_node_and_method(method: str) -> None:
    """Whole answers of another kind, and the honest one with each of its values replaced by each wrong one."""
    kinds = [each for each in WRONG if repr(each) != repr(HONEST[method])]
    refused = 0
    for wrong in kinds + list(replaced(HONEST[method])):
        try:
            checked(method, GIVEN, copy.deepcopy(wrong), "n1")
        except Malformed as error:
            assert isinstance(error, ClusterFault) and f"node n1 gave no answer to {method}: " in error.message
            assert error.details == {"node": "n1"} and len(error.message) < 1000
            refused += 1
    assert refused >= len(kinds) - 4, "but for flags and numbers, which may be others"


FIRST = """
import sys, threading
import msgspec
from mrcore.messages.methods import METHODS
sys.setswitchinterval(1e-6)
event = b'{"event": "want", "identity": {"job": "j", "run": 1, "phase": "MAP", "task": 0, "try": 1}}'
answer, barrier = msgspec.Raw(b'{"incarnation": "ab", "events": [[1, ' + event + b']]}'), threading.Barrier(8)
def work():
    barrier.wait()
    METHODS["poll"].decode(answer, {}, "n1")
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_many_threads_may_decode_the_first_answer_of_a_kind() -> None:
    """As at the start of each run: one thread for each server polls. Five of eight such processes crashed once."""
    for _ in range(10):
        done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", FIRST], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def replaced(honest: Any) -> list[Any]:
    if not isinstance(honest, dict):
        return []
    lacking = [{key: value for key, value in honest.items() if key != left_out} for left_out in honest]
    return lacking + [honest | {key: wrong} for key in honest for wrong in WRONG]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(method=st.sampled_from(sorted(METHODS)), answer=JSON)
def test_whatever_comes_it_is_taken_or_refused(method: str, answer: Any) -> None:
    with contextlib.suppress(Malformed):
        checked(method, GIVEN, answer, "n1")
    decode_error(answer, "n1")


@pytest.mark.parametrize(
    "file",
    [
        ["x", 1, 1, 1], ["/x", -1, 1, 1], ["/x", 1 << 50, 1, 1], ["/x", True, 1, 1], ["/x", 1.0, 1, 1],
        ["/x\0", 1, 1, 1],
        ["/x", 1, 1], ["/x", 1, 1, 1, 1, 1, 1], ["/x", 1, 1 << 64, 1], ["/x", 1, 1, -1], ["/" + "x" * 5000, 1, 1, 1],
        ["/\ud800", 1, 1, 1], "/x", None, {"path": "/x"}, [["/x"], 1, 1, 1],
    ],
)  # fmt: skip
def test_no_listed_file_is_other_than_a_file(file: Any) -> None:
    with pytest.raises(Malformed, match="node n1 gave no answer to list_inputs: "):
        checked("list_inputs", {}, INPUTS | {"files": [file]}, "n1")


def page(*files: Any, **more: Any) -> InputPage:
    return page_of(listing(*files, **more))


def page_of(plain: Json) -> InputPage:
    return METHODS["list_inputs"].decode(msgspec.Raw(json.dumps(plain).encode()), {}, "n1")  # type: ignore[no-any-return]


def listing(*files: Any, cursor: str | None = None, **more: Any) -> Json:
    return INPUTS | {"files": [["/x/" + name, size, 1, 2] for name, size in files], "next": cursor} | more


def test_pages_are_put_together() -> None:
    pages = InputPages("n1", ["in"])
    cursors = [pages.add(page(cursor="c0", matched={})), pages.add(page(("a", 1), cursor="c1"))]
    cursors += [pages.add(page(("b", 2), cursor="c2")), pages.add(page(("c", 3)))]
    assert cursors == ["c0", "c1", "c2", None]
    assert [file.path for file in pages.listing.files] == ["/x/a", "/x/b", "/x/c"]


@pytest.mark.parametrize(
    ("pages", "what"),
    [
        ([listing(("a", 1), ("a", 1))], "a file twice"),
        ([listing(("a", 1), cursor="c"), listing(("a", 1))], "a file twice"),
        ([listing(("a", 1), cursor="c"), listing(("b", 1), cursor="c")], "pages without an end"),
        ([listing(cursor=f"c{number}") for number in range(5)], "pages without an end"),
        ([listing(*((str(n), 1 << 40) for n in range(17)))], "more than .* 16 TiB"),
        ([listing(("a", 1), matched={})], "nothing about 'in'"),
    ],
)
def test_what_no_honest_node_lists_is_a_fault(pages: list[Json], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_of, "MAX_EMPTY_PAGES", 3)
    with pytest.raises(Malformed, match=f"node n1 gave no answer to list_inputs: it lists {what}"):
        found = InputPages("n1", ["in"])
        for page in pages:
            found.add(page_of(page))


def test_the_number_of_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_of, "MAX_INPUT_FILES", 3)
    pages = InputPages("n1", ["in"])
    with pytest.raises(Malformed, match="more than 3 files"):
        for number in range(10):
            pages.add(page((str(number), 1), cursor=f"c{number}"))


def done(identity: Json, **result: Any) -> Json:
    honest = COMMON | (
        {"runs": [RUN]} if identity is MAP else {"parts": [PART], "keys_kept": True, "fetched": {"n1": 1}}
    )
    return {"event": "done", "identity": identity, "result": honest | result}


BAD_NAMES = [
    "/etc/cron.d/x", "../../x", "part-000003-00007-00000.data/../x", "part-000003-00007-00000.data\n", "", 5, None,
    part_name(3, 8, 0, False), part_name(4, 7, 0, False), "part-٠٠٠٠٠٣-00007-00000.data", "part-000003-00007-0.data.gz",
]  # fmt: skip


NESTED = "[" * 200 + "]" * 200
BAD_SAMPLES: list[Any] = [
    [["{}", 1]], [["k", 1]], [["[1", 1]], [[NESTED, 1]], [[1, 1]], [["1"]], [["1", -1]], [None], {}, None,
]  # fmt: skip


@pytest.mark.parametrize(
    "event",
    [
        *(done(REDUCE, parts=[PART | {"name": name}]) for name in BAD_NAMES),
        *(done(MAP, runs=[RUN | {"id": name}]) for name in ("../x", "map-8-2-0", "map-7-22-0", "map-7-2-0/x", None)),
        *(done(MAP, runs=[RUN | {key: -1}]) for key in ("bytes", "max_decoded", "groups", "values")),
        *(done(MAP, runs=[RUN | {"partitions": each}]) for each in ({"4": 1}, {"-1": 1}, {"x": 1}, {"0": -1}, [])),
        done(MAP, runs=[RUN | {"partitions": {"²": 1}}]),
        *(done(MAP, runs=[RUN | {"samples": each}]) for each in BAD_SAMPLES),
        done(REDUCE, parts=[PART | {"partition": 8}]),
        done(REDUCE, parts=[PART, PART]),
        done(REDUCE, parts=[{key: value for key, value in PART.items() if key != "crc32"}]),
        done(REDUCE, parts=None),
        done(REDUCE, keys_kept="yes"),
        done(REDUCE, fetched={"n1": -1}),
        done(REDUCE, peak_bytes=None),
        done(MAP, counters={"lines": "many"}),
        done(MAP, counters={"lines": 1 << 64}),
        done(MAP, seconds={"map": math.nan}),
        done(MAP, runs=[RUN] * 2),
        {"event": "done", "identity": MAP},
        {"event": "done", "identity": MAP, "result": []},
        {"event": "bundle_done", "identity": MAP},
        {"event": "bundle_done", "identity": MAP, "id": "0"},
        {"event": "phase", "identity": MAP, "phase": 5},
        {"event": "failed", "identity": MAP},
        {"event": "failed", "identity": MAP, "error": "x"},
        {"event": "failed", "identity": MAP, "error": {"class": 5, "message": "x"}},
        {"event": "died", "identity": MAP, "message": None},
    ],
)  # fmt: skip
def test_no_event_of_a_task_is_other_than_an_event(event: Json) -> None:
    """What has not the form of an event is no answer to a poll; what no such task can have made ends the attempt."""
    attempt = Attempt(
        RunIdentity(job="j", run=3), {"S_0": "n1"}, {"n1": [Bundle(0, [])]}, Partitioning(4, by_range=False),
        map_only=False, max_attempts=3, node_timeout_seconds=5, now=0,
    )  # fmt: skip
    attempt.server_up("S_0")
    (start,) = attempt.instructions()
    attempt.servers["S_0"].task.number, attempt.servers["S_0"].task.tries = 7, event["identity"]["try"]  # type: ignore[union-attr]
    if event["identity"]["phase"] == "REDUCE":
        attempt.servers["S_0"].task.partition = Partition(7)  # type: ignore[union-attr]
    with pytest.raises(Malformed, match=r"node n1 gave no (answer to poll|event of a task): "):
        attempt.task_event("S_0", polled(event))
        assert attempt.fault is not None and "node n1" in attempt.fault.message
        raise attempt.fault
    results = attempt.results
    assert isinstance(start, Start) and not results.parts and not results.spills and not attempt.instructions()


def polled(event: Json) -> TaskEvent:
    """The event as a poll's answer brings it."""
    answer = json.dumps({"incarnation": "ab", "events": [[1, event]]}).encode()
    return POLL.decode(msgspec.Raw(answer), {}, "n1").events[0][1]


def test_a_flood_of_one_name_is_refused_at_once() -> None:
    """As many as one answer may hold: to count each of them would take hours."""
    result = convert(TaskResult, COMMON | {"runs": [RUN] * 200_000})
    with pytest.raises(Malformed, match="node n1 gave no event of a task: done: a name twice"):
        check_result(result, convert(TaskIdentity, MAP), 4, "n1")


@pytest.mark.parametrize("identity", [MAP, REDUCE])
def test_an_honest_result_passes_and_fields_that_nobody_knows_do_not(identity: Json) -> None:
    event = polled(done(identity))
    assert isinstance(event, Done) and event.identity is not None
    check_result(event.result, event.identity, 4, "n1")
    plain = done(identity)
    key = "runs" if identity is MAP else "parts"
    plain["result"][key][0] = plain["result"][key][0] | {"evil": "x"}
    assert polled(plain | {"more": 1}) == event


@pytest.mark.parametrize("key", [None, True, 0, -1.5, math.inf, -math.inf, 1 << 80, "", "\u00e9", ["a", [1, None]], []])
def test_a_key_travels_as_text_whatever_it_is(key: Any) -> None:
    event = polled(done(MAP, runs=[RUN | {"samples": [[json.dumps(key), 3]]}]))
    assert isinstance(event, Done) and event.identity is not None
    check_result(event.result, event.identity, 4, "n1")
    ((text, weight),) = event.result.runs[0].samples
    assert weight == 3 and read_key(text) == as_key(key)


def test_a_node_may_blame_the_job_only_where_the_job_can_be_at_fault() -> None:
    blame = JobFault("bad input", file="x").to_dict()
    assert isinstance(decode_error(blame, "n1", METHODS["check_tails"]), JobFault)
    assert isinstance(decode_error(blame, "n1"), JobFault), "a task's error"
    for method in ("health", "publish", "poll", "start_run", "order", "end_run"):
        made = decode_error(blame, "n1", METHODS[method])
        assert isinstance(made, ClusterFault) and made.details == {"file": "x"}
    for other in (UsageError("x").to_dict(), MrcoreError("x").to_dict(), {"class": "SystemExit", "message": "x"}):
        assert isinstance(decode_error(other, "n1", METHODS["check_tails"]), ClusterFault)


@pytest.mark.parametrize(
    "plain",
    [None, [], "x", {}, {"class": "JobFault"}, {"class": [], "message": "x"}, {"class": "JobFault", "message": {}}],
)
def test_what_is_no_error_is_the_clusters(plain: Any) -> None:
    assert isinstance(decode_error(plain, "n1"), Malformed)


def test_an_error_of_a_node_is_clean_and_bounded() -> None:
    details = {"message": "x", "self": "y", "file": "z"}
    made = decode_error({"class": "JobFault", "message": "\x1b[2J\ud800" + "x" * 10_000_000, "details": details}, "n1")
    assert len(made.message) < 25_000 and made.details == {"file": "z"}
    made.message.encode()
    assert "\x1b" not in made.message
