"""A node that joins late: the others go on as they were, and it gets work."""

from __future__ import annotations

from harness import Machine, Operator, Person, wait_until
from operate import FOREIGN_RULES


def test_add_node_leaves_the_others_processes(
    operator: Operator, m1: Machine, w1: Machine, w2: Machine, w3: Machine, anna: Person
) -> None:
    before = {machine.name: machine.pids() for machine in (m1, w1, w2)}
    inventory = operator.inventory()
    inventory["all"]["children"]["nodes"]["hosts"] |= operator.hosts("w3")
    operator.write_inventory(inventory)
    played = operator.make("add-node", NODE="w3")
    operator.note_time("add a node", played.seconds)
    assert {machine.name: machine.pids() for machine in (m1, w1, w2)} == before
    assert all(int(pid) > 0 for pid in w3.pids().values())
    assert not set(w3.servers()) & {*w1.servers(), *w2.servers()}, "names of servers are its own"
    w1.run(f"python3 -c \"import socket; socket.create_connection(('{w3.address}', 45678), 3)\"")
    job = {"job_name": "on_w3", "job_type": "mapreduce", "project_name": "word_count", "run_once": True}
    job |= {"input_dirs": ["/var/tmp/only-w3"], "map_function_name": "count_words", "reduce_function_name": "add_up"}
    w3.write("/var/tmp/only-w3/text", "late late node\n")
    anna.submit(job)
    anna.finished("on_w3")
    assert sorted(anna.items("on_w3")) == [["late", 2], ["node", 1]]


def test_a_node_that_reboots_comes_back_by_itself(w2: Machine, anna: Person) -> None:
    """And the master takes it in: a job that needs it succeeds, though it was submitted while the node was down."""
    w2.write("/var/tmp/only-w2/text", "back again\n")
    job = {"job_name": "on_w2", "job_type": "mapreduce", "project_name": "word_count", "run_once": True}
    job |= {"input_dirs": ["/var/tmp/only-w2"], "map_function_name": "count_words", "reduce_function_name": "add_up"}
    w2.stop()
    anna.submit(job)
    wait_until(lambda: "w2" in anna.mrcore("queue", status=None).output, 90, "the queue says that it waits for w2")
    w2.start()
    w2.nft("-f", "-", stdin=FOREIGN_RULES)  # the neighbours come back as well; a container's network begins empty
    wait_until(lambda: all(int(pid) > 0 for pid in w2.pids().values()), 60, "its agent and servers run again")
    anna.finished("on_w2")
    assert sorted(anna.items("on_w2")) == [["again", 1], ["back", 1]]
    assert "mrcore" in w2.nft("list", "tables"), "its firewall is back as well"
