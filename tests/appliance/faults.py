"""What is done to a cluster before a page is opened: for each page the fault that it is about.

Each takes a cluster that is well, with w1 and w2 as nodes and `word_count` done, and leaves it in the page's state.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

import runbook
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from harness import ADDRESSES, Person, wait_until
from keyboard import Cluster, create
from lab import PROJECT, podman

DISK_LEFT_BYTES = 100 << 20


def nothing(cluster: Cluster) -> None:
    """The page begins with a cluster that is well."""


def stopped(cluster: Cluster) -> None:
    """Agents and servers were stopped."""
    cluster.type("anna@m1", "mrcore cluster stop")


def server_stopped(cluster: Cluster) -> None:
    """Somebody stopped one server's unit."""
    unit = cluster.machine("w2").units()[1]
    cluster.type("root@w2", f"systemctl stop {unit}")


def other_program(cluster: Cluster) -> None:
    """The checkout has another version of the program."""
    file = cluster.checkout / "mrcore/__init__.py"
    file.write_text(file.read_text() + "# another one\n")


def soon_expired(cluster: Cluster) -> None:
    """Certificates are good for 20 more days."""
    cluster.type(
        "controller",
        'make rotate-certs INVENTORY=prod ARGS="-e mrcore_certificate_days=20 -e mrcore_certificate_renew_days=10"',
    )


def no_archive(cluster: Cluster) -> None:
    """No logs were collected yet."""
    for path in cluster.checkout.glob("mrcore-logs-*"):
        path.unlink()


def queue_damaged(cluster: Cluster) -> None:
    """There is a backup; since then the master has lost its queue."""
    cluster.type("root@m1", "systemctl start mrcore-backup.service")
    cluster.type("root@m1", "systemctl stop mrcore-runner; rm /var/lib/mrcore/state/queue.sqlite*")
    cluster.type("root@m1", "systemctl start mrcore-runner")


def agent_frozen(cluster: Cluster) -> None:
    """The agent of w2 does not go on: it takes connections and never answers."""
    cluster.type("root@w2", "systemctl kill --signal STOP mrcore-agent.service")


def disk_filled(cluster: Cluster) -> None:
    """Old input fills the disk of w1, and a job has found out."""
    folder = "/var/lib/mrcore/compute"
    free = int(cluster.type("root@w1", f"df --output=avail --block-size=1 {folder} | tail -n 1"))
    cluster.type(
        "root@w1",
        f"runuser -u mrcore -- mkdir -p {folder}/cluster/old\n"
        f"runuser -u mrcore -- fallocate --length {free - DISK_LEFT_BYTES} {folder}/cluster/old/leftover",
    )
    cluster.type("anna@m1", "mrcore submit count.yml")


def project(cluster: Cluster, name: str, body: str, **keys: Any) -> None:
    """A project with one map function, and its job file in anna's home."""
    code = f"import time\n\n\ndef work(line, auxiliary_data):\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
    job = {"job_type": "mapreduce", "job_name": name, "project_name": name, "input_dirs": ["texts"], "run_once": True}
    anna = Person(cluster.machine("m1"), "anna")
    anna.make()
    anna.write(f"/srv/mrcore/projects/{name}/map_functions.py", code)
    anna.write(f"{name}.yml", json.dumps(job | {"map_function_name": "work"} | keys))
    cluster.type("anna@m1", f"mrcore submit {name}.yml")


def job_hangs(cluster: Cluster) -> None:
    """A map function that never ends."""
    project(cluster, "stuck", "print('waiting', flush=True)\ntime.sleep(100_000)\nreturn []")
    shown = "mrcore queue | grep 'stuck .*running MAP'"
    wait_until(lambda: cluster.places["anna@m1"].run(shown)[0] == 0, 60, "the job hangs")


def job_slow(cluster: Cluster) -> None:
    """A function that sleeps for each line has had its run."""
    project(cluster, "slow", "time.sleep(0.003)\nyield line[:1], 1")
    shown = "mrcore history slow | grep succeeded"
    wait_until(lambda: cluster.places["anna@m1"].run(shown)[0] == 0, 180, "the slow job ends")


def master_wiped(cluster: Cluster) -> None:
    """There was a backup last night; now a bare machine stands in the master's place."""
    cluster.type("root@m1", "systemctl start mrcore-backup.service")
    podman("rm", "--force", "--time", "0", cluster.machine("m1").container)
    known = cluster.lab.folder / "known_hosts"
    before = known.read_text()
    create(cluster.lab)
    known.write_text(before)  # the operator's ssh knows the former machine's host key
    address = f"{cluster.lab.net}.{ADDRESSES['m1']}"
    answers = f"ssh-keyscan -t ed25519 {address} 2>/dev/null | grep --quiet ed25519"
    wait_until(lambda: cluster.places["controller"].run(answers)[0] == 0, 120, "the new machine's sshd answers")


def authority_gone(cluster: Cluster) -> None:
    """The folder with the authority's key was removed; there is a copy elsewhere."""
    folder = cluster.checkout / "inventory/prod/pki"
    copy = cluster.checkout.parent / "backup-of-prod/pki"
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)


def expired(cluster: Cluster) -> None:
    """The certificate of w2 was made two months ago for one month."""
    authority = cluster.checkout / "inventory/prod/pki"
    signer = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate(cluster.machine("w2").read("/etc/mrcore/pki/node.crt").encode())
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(60)).not_valid_after(now - datetime.timedelta(30))
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    text = builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)  # type: ignore[arg-type]
    target = "/etc/mrcore/pki/node.crt"  # in place, as a machine that nobody renewed
    cluster.machine("w2").run(f"cat >{target}.new; chown --reference={target} {target}.new", stdin=text.decode())
    cluster.type("root@w2", f"chmod 0644 {target}.new; mv {target}.new {target}")
    wait_until(lambda: not cluster.well(), 60, "the expired certificate is refused")


def joined(cluster: Cluster, folder: str = "more") -> None:
    """w3 is a node that holds data."""
    assert "w3" in cluster.type("anna@m1", "mrcore cluster status"), "the page add-node comes first"
    # New names: files that a node has already stay there when they are uploaded again.
    texts = f"mkdir -p /var/tmp/{folder} && for n in $(seq 40); do echo text $n >/var/tmp/{folder}/$n.txt; done"
    cluster.type("anna@m1", f"{texts} && mrcore upload /var/tmp/{folder} {folder}")
    assert cluster.places["anna@m1"].run("mrcore drain w3 --list")[0] == 1, "input lies on w3 too"


def machine_cut_off(cluster: Cluster) -> None:
    """Somebody was on w3, a node, and has the master's certificate and key there and on w2; w3 was cut off.

    From w2 all ports of w1 are reached.
    """
    page = runbook.read_runbook(PROJECT / "docs/runbooks/add-node.md")
    cluster.execute(*(block for block in page.blocks if block.section == "What to type"))
    joined(cluster, "even-more")
    for name in ("ca.crt", "master.crt", "master.key"):
        text = cluster.machine("m1").read(f"/etc/mrcore/pki/{name}")
        for thief in ("w2", "w3"):
            cluster.machine(thief).write(f"/root/stolen/{name}", text, "0600")
    cluster.type("root@m1", "cp /etc/mrcore/pki/master.crt suspected.crt")
    assert "version" in cluster.type("root@w2", use_of_stolen_key(cluster))
    cluster.machine("w3").run("ip link set eth0 down")
    wait_until(lambda: not cluster.well("w3"), 60, "w3 is cut off")


def use_of_stolen_key(cluster: Cluster) -> str:
    """What the thief types on w2: asks w1's agent for its health as the master would."""
    return textwrap.dedent(f"""
        /opt/mrcore/current/bin/python - <<'END'
        from pathlib import Path
        from mrcore.messages.methods import HEALTH
        from mrcore.wire.client import Client
        from mrcore.wire.tls import Pki
        agent = Client("{cluster.machine("w1").address}", 45678, Pki(Path("/root/stolen"), "master"), "w1")
        print(agent.call(HEALTH))
        END
    """)


def stolen_key_is_worthless(cluster: Cluster) -> None:
    """Also for a thief who has the new authority's certificate, which is no secret, and when w3 comes back as it is."""
    cluster.machine("w2").run("cp /etc/mrcore/pki/ca.crt /root/stolen/ca.crt")
    status, output = cluster.places["root@w2"].run(use_of_stolen_key(cluster))
    assert status and "version" not in output, output
    assert re.search("alert|refuse|unknown ca", output, re.IGNORECASE), output
    w3 = cluster.machine("w3")
    w3.run("ip link set eth0 up")
    wait_until(lambda: w3.reaches(cluster.machine("w1").address, 22), 60, "w3 is on the network again")
    status, output = cluster.places["root@w3"].run(use_of_stolen_key(cluster))
    assert status and "version" not in output, output
    assert "w3" not in cluster.type("anna@m1", "mrcore cluster status")
    cluster.type("root@w3", "/opt/mrcore/bin/units stop")


AFTERWARDS: dict[str, Callable[[Cluster], None]] = {"suspected-intrusion": stolen_key_is_worthless}
"""What must hold once a page has done its work, beyond its own check."""

FAULTS: dict[str, Callable[[Cluster], None]] = {
    "status": server_stopped,
    "doctor": server_stopped,
    "alerts": server_stopped,
    "stop": nothing,
    "start": stopped,
    "kill": nothing,
    "collect-logs": no_archive,
    "job-stuck": job_hangs,
    "slow-job": job_slow,
    "disk-full": disk_filled,
    "node-does-not-answer": agent_frozen,
    "add-node": nothing,
    "remove-node": joined,
    "certificate-expired": expired,
    "rotate-certs": soon_expired,
    "ca-or-controller-lost": authority_gone,
    "suspected-intrusion": machine_cut_off,
    "upgrade": other_program,
    "backup-and-restore": queue_damaged,
    "master-lost": master_wiped,
    "reset": nothing,
}
"""By page, in the order in which they are tried; `deploy` is what sets the cluster up."""
