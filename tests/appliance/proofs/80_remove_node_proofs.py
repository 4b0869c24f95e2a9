"""A node that is removed: not while it holds data, and then it is no member any more."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import AGENT_PORT, Machine, Operator, Person, wait_until

from mrcore.errors import Refused, Unreachable
from mrcore.messages.methods import HEALTH
from mrcore.wire.client import Client
from mrcore.wire.tls import Pki

FILES = 30  # so many that each of three nodes holds some of them
FOLDER = "/var/lib/mrcore/compute/cluster/many"


def test_a_node_that_holds_data_is_not_removed(operator: Operator, w3: Machine, anna: Person) -> None:
    anna.run(f"mkdir -p /var/tmp/many; for n in $(seq {FILES}); do echo word $n >/var/tmp/many/$n; done")
    job = {"job_name": "many", "job_type": "file_transfer", "transfer_type": "upload_bulk", "run_once": True}
    anna.submit(job | {"project_name": "word_count", "input_dir": "/var/tmp/many", "output_dir": "many"})
    anna.finished("many")
    assert w3.text(f"ls {FOLDER}"), "w3 holds some"
    before = w3.pids()
    said = " ".join(operator.make("remove-node", NODE="w3", status=2).output.split())
    assert "w3 holds" in said and "DATA=move" in said and "DATA=abandon" in said, said
    assert w3.pids() == before


def test_its_data_is_moved_and_it_can_no_longer_connect(
    operator: Operator, w1: Machine, w2: Machine, w3: Machine, anna: Person, tmp_path: Path
) -> None:
    for name in ("ca.crt", "node.crt", "node.key"):  # it keeps what it has; removing must not depend on its good will
        (tmp_path / name).write_text(w3.read(f"/etc/mrcore/pki/{name}"))
    before, items = {machine.name: machine.pids() for machine in (w1, w2)}, sorted(anna.items("on_w3"))
    played = operator.make("remove-node", NODE="w3", DATA="move")
    operator.note_time("remove a node, its data moved", played.seconds)
    assert {machine.name: machine.pids() for machine in (w1, w2)} == before
    assert sorted(anna.items("on_w3")) == items, "output that lay there has another place, and is the same"
    files = [name for machine in (w1, w2) for name in machine.text(f"ls {FOLDER}").split()]
    assert sorted(files, key=int) == [str(number) for number in range(1, FILES + 1)], "each is somewhere, once"
    assert "w3" not in anna.mrcore("cluster", "status").stdout
    assert not w3.reaches(w1.address, AGENT_PORT), "the firewall"
    w1.nft("delete", "table", "inet", "mrcore")
    try:
        assert w3.reaches(w1.address, AGENT_PORT)
        client = Client(w1.address, AGENT_PORT, Pki(tmp_path, "node"))
        with pytest.raises((Refused, Unreachable)):
            client.call(HEALTH)
        client.close()
    finally:
        w1.run("systemctl restart mrcore-firewall")


def test_a_deploy_with_the_former_inventory_says_so(operator: Operator) -> None:
    inventory = operator.inventory()
    nodes = inventory["all"]["children"]["nodes"]["hosts"]
    with_w3 = nodes | operator.hosts("w3")
    inventory["all"]["children"]["nodes"]["hosts"] = with_w3
    operator.write_inventory(inventory)
    said = " ".join(operator.make("deploy", status=2).output.split())
    assert "w3" in said and "removed" in said, said
    del with_w3["w3"]
    operator.write_inventory(inventory)


def test_the_others_still_work(anna: Person, w1: Machine) -> None:
    job = {"job_name": "after", "job_type": "mapreduce", "project_name": "word_count", "run_once": True}
    job |= {"input_dirs": ["texts"], "map_function_name": "count_words", "reduce_function_name": "add_up"}
    anna.submit(job)
    anna.finished("after")
    assert sorted(anna.items("after")) == sorted(anna.items("licence_words"))
    wait_until(lambda: all(int(pid) > 0 for pid in w1.pids().values()), 10, "all runs")
