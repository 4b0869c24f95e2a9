"""A deploy after the inventory was edited changes what was edited, and nothing else."""

from __future__ import annotations

from harness import Machine, Operator, Person

KEYS = ("node.key", "node.crt")


def sums(machine: Machine) -> list[str]:
    return [machine.text(f"sha256sum </etc/mrcore/pki/{name}") for name in KEYS]


def test_fewer_servers_and_certificates_that_end_soon(
    operator: Operator, w1: Machine, w2: Machine, anna: Person
) -> None:
    """Certificates count as ending soon because the inventory says so; the keys stay, and no daemon is restarted."""
    usual, inventory = operator.inventory(), operator.inventory()
    inventory["all"]["vars"] |= {"mrcore_certificate_days": 1000, "mrcore_certificate_renew_days": 400}
    inventory["all"]["children"]["nodes"]["hosts"]["w1"]["mrcore_servers"] = 1
    operator.write_inventory(inventory)
    before, former = {machine.name: sums(machine) for machine in (w1, w2)}, w2.pids()
    first, second = w1.servers()
    # User mrcore, whom every submitter can be, puts a link where root will come by.
    logs = "/var/lib/mrcore/compute/logs"
    w2.run(f"runuser -u mrcore -- sh -c 'mv {logs} {logs}-away && ln -s /opt/mrcore/bin {logs}'")
    operator.make("deploy")
    assert w2.text("stat -c %U:%a /opt/mrcore/bin /opt/mrcore/bin/units") == "root:755\nroot:755"
    w2.run(f"rm {logs} && mv {logs}-away {logs}")
    assert w2.run("runuser -u mrcore -- touch /var/lib/mrcore/.ssh/authorized_keys2", status=None).status
    assert w1.servers() == [first]
    assert w1.unit(f"mrcore-server@{second}")["ActiveState"] == "inactive"
    assert w2.pids() == former, "w2 has new certificates only"
    for machine in (w1, w2):
        (key, certificate), (key_before, certificate_before) = sums(machine), before[machine.name]
        assert key == key_before and certificate != certificate_before
    anna.mrcore("cluster", "check")
    operator.write_inventory(usual)
    played = operator.make("deploy")
    assert w1.servers() == [first, second]
    assert w2.pids() == former and not played.changed["w2"], "the new ones are good for long"
    job = {"job_name": "with_all_servers", "job_type": "mapreduce", "project_name": "word_count", "run_once": True}
    job |= {"input_dirs": ["texts"], "map_function_name": "count_words", "reduce_function_name": "add_up"}
    anna.submit(job)
    anna.finished("with_all_servers")
    assert sorted(anna.items("with_all_servers")) == sorted(anna.items("licence_words"))
