"""A node that died is removed without its data, is refused should it come back, and can be taken back."""

from __future__ import annotations

import tarfile

from harness import AGENT_PORT, Machine, Operator, Person

ON_W3 = {"job_type": "mapreduce", "project_name": "word_count", "run_once": True, "input_dirs": ["/var/tmp/only-w3"]}
ON_W3 |= {"map_function_name": "count_words"}  # without reducing, output stays where its input is
WORDS = [["late", 1], ["late", 1], ["node", 1]]


def test_a_dead_node_is_not_removed_by_the_way(operator: Operator, w3: Machine, anna: Person) -> None:
    anna.submit(ON_W3 | {"job_name": "output_on_w3"})
    anna.finished("output_on_w3")
    assert sorted(anna.items("output_on_w3")) == WORDS
    w3.stop()
    said = " ".join(operator.make("remove-node", NODE="w3", status=2).output.split())
    assert "w3 cannot say what it holds" in said and "DATA=abandon" in said, said
    assert "w3" in anna.mrcore("cluster", "status", status=None).output, "it is still a node"


def test_logs_are_collected_without_it(operator: Operator) -> None:
    before = set(operator.project.glob("mrcore-logs-*"))
    operator.make("collect-logs", status=None)
    (archive,) = set(operator.project.glob("mrcore-logs-*")) - before
    try:
        with tarfile.open(archive) as tar:
            names = tar.getnames()
    finally:
        archive.unlink()
    assert any("/w1/" in name for name in names) and any("/m1/" in name for name in names), names


def test_it_is_removed_without_its_data_and_the_others_work(
    operator: Operator, w1: Machine, w2: Machine, anna: Person
) -> None:
    before = {machine.name: machine.pids() for machine in (w1, w2)}
    played = operator.make("remove-node", NODE="w3", DATA="abandon")
    assert "do not let it come back" in " ".join(played.output.split())
    assert {machine.name: machine.pids() for machine in (w1, w2)} == before
    assert "w3" not in anna.mrcore("cluster", "status").stdout
    lost = anna.mrcore("cat", "output_on_w3", status=None)
    assert lost.status and "w3" in lost.stderr, "what only it held is missed by name"
    job = {"job_name": "without_w3", "job_type": "mapreduce", "project_name": "word_count", "run_once": True}
    job |= {"input_dirs": ["texts"], "map_function_name": "count_words", "reduce_function_name": "add_up"}
    anna.submit(job)
    anna.finished("without_w3")
    assert sorted(anna.items("without_w3")) == sorted(anna.items("licence_words"))


def test_when_it_comes_back_it_is_refused_until_it_is_taken_back(
    operator: Operator, w1: Machine, w3: Machine, anna: Person
) -> None:
    w3.start()
    assert not w3.reaches(w1.address, AGENT_PORT)
    assert w1.reaches(w1.address, AGENT_PORT)
    operator.make("add-node", NODE="w3")
    assert all(int(pid) > 0 for pid in w3.pids().values()) and w3.reaches(w1.address, AGENT_PORT)
    anna.submit(ON_W3 | {"job_name": "again_on_w3"})
    anna.finished("again_on_w3")
    assert sorted(anna.items("again_on_w3")) == WORDS
