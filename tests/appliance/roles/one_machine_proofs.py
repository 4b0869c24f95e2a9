"""One machine that is master and node in one, after every role has been there."""

from __future__ import annotations

import json

import pytest
import testinfra
from harness import Machine, wait_until
from lab import PROJECT, PYTHONS, Lab
from testinfra.host import Host

UNITS = [
    "mrcore-agent",
    "mrcore-server@S_0",
    "mrcore-server@S_1",
    "mrcore-runner",
    "mrcore-firewall",
    "mrcore-backup.timer",
    "mrcore-doctor.timer",
]


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(Lab.of("roles"), "this")


@pytest.fixture(scope="module")
def host(machine: Machine) -> Host:
    return testinfra.get_host(f"podman://{machine.container}")


def test_it_is_the_system_that_the_scenario_is_for(machine: Machine) -> None:
    assert machine.system() == (machine.lab.system, PYTHONS[machine.lab.system])
    assert PYTHONS[machine.lab.system] in machine.text("/opt/mrcore/current/bin/python --version")


@pytest.mark.parametrize("name", UNITS)
def test_units_run_and_come_back_at_the_next_boot(host: Host, name: str) -> None:
    assert host.service(name).is_running and host.service(name).is_enabled


def test_the_user_has_no_password(host: Host) -> None:
    user = host.user("mrcore")
    assert user.home == "/var/lib/mrcore" and user.password in ("!", "*", "!*"), user.password
    assert user.uid < 1000, "a system account"


@pytest.mark.parametrize(
    ("path", "mode", "owner"),
    [
        ("/etc/mrcore/pki/node.key", 0o600, "mrcore"),
        ("/etc/mrcore/pki/master.key", 0o600, "mrcore"),
        ("/etc/mrcore/pki", 0o750, "root"),
        ("/etc/mrcore", 0o755, "root"),
        ("/etc/mrcore/backup.key", 0o400, "root"),
        ("/etc/mrcore/backup.pub", 0o644, "root"),
        ("/etc/mrcore/cluster.yml", 0o644, "root"),
        ("/etc/sudoers.d/mrcore", 0o440, "root"),
        ("/etc/sudoers.d/mrcore-users", 0o440, "root"),
        ("/opt/mrcore/bin/units", 0o755, "root"),
        ("/usr/local/share/bash-completion/completions/mrcore", 0o644, "root"),
        ("/var/lib/mrcore/.ssh/id_ed25519", 0o600, "mrcore"),
        ("/etc/prometheus/mrcore/token", 0o400, "root"),
        ("/etc/prometheus/mrcore/mrcore.rules.yml", 0o644, "root"),
        ("/srv/mrcore/projects", 0o2770, "mrcore"),
        ("/srv/mrcore", 0o755, "root"),
        ("/var/lib/mrcore", 0o755, "root"),
        ("/var/lib/mrcore/.ssh", 0o750, "root"),
        ("/var/lib/mrcore/.ssh/authorized_keys", 0o640, "root"),
    ],
)
def test_who_may_what_with_files(host: Host, path: str, mode: int, owner: str) -> None:
    file = host.file(path)
    assert (file.mode, file.user) == (mode, owner), (oct(file.mode), file.user)


def test_bash_completes_the_commands_words(host: Host) -> None:
    read = "source /usr/local/share/bash-completion/completions/mrcore && complete -p mrcore"
    assert "_mrcore_completion" in host.check_output(f"bash -c '{read}'")


def test_the_authority_key_is_not_on_the_machine(host: Host) -> None:
    assert host.run("find / -xdev -name 'ca.key' -not -path '/proc/*'").stdout == ""


def test_the_backup_is_signed_by_root_and_kept_by_the_user(host: Host) -> None:
    (file,) = host.check_output("ls /var/lib/mrcore/backups/*").split()[:1]
    assert host.check_output(f"stat -c '%U %a' {file}") == "mrcore 600"
    assert host.check_output(f"head -n 1 {file}").startswith("mrcore backup, signed ")
    assert host.run("runuser -u mrcore -- cat /etc/mrcore/backup.key").rc != 0


def test_settings_files_are_valid(host: Host) -> None:
    assert host.run("visudo -c").rc == 0
    assert host.run("nft -c -f /etc/mrcore/nftables.conf").rc == 0
    settings = json.loads(host.check_output("mrcore settings --json"))
    assert [node["name"] for node in settings["nodes"]] == ["this"] and settings["user"] == "mrcore"


def test_the_program_runs_from_a_release_that_only_root_may_change(host: Host) -> None:
    release = host.check_output("readlink -f /opt/mrcore/current")
    assert release.startswith("/opt/mrcore/releases/")
    assert host.run(f"find {release} -not -user root").stdout == ""
    assert host.run(f"find {release} -perm -o+w -not -type l").stdout == ""


def test_daemons_answer(host: Host) -> None:
    assert host.run("mrcore cluster check").rc == 0


def test_a_submitter_is_let_through_and_nobody_else(machine: Machine) -> None:
    machine.run("useradd --create-home --groups mrcore-users sue; useradd --create-home mallory")
    assert json.loads(machine.run("mrcore queue --json", user="sue").stdout)["jobs"] == []
    assert "may not use this cluster" in machine.run("mrcore queue", user="mallory", status=2).stderr


def test_a_job_is_done(machine: Machine) -> None:
    for name in ("job.yml", "map_functions.py", "reduce_functions.py"):
        text = (PROJECT / "projects/word_count" / name).read_text()
        machine.write(f"/srv/mrcore/projects/word_count/{name}", text)
    machine.run("mkdir -p /var/tmp/words && cp /usr/share/common-licenses/GPL-3 /var/tmp/words/text")
    machine.run("mrcore submit /srv/mrcore/projects/word_count/job.yml --set 'input_dirs=[/var/tmp/words]'")

    def done() -> bool:
        rows = json.loads(machine.run("mrcore history word_count --json", status=None).stdout or "[]")
        return bool(rows) and rows[0]["state"] == "succeeded"

    wait_until(done, 120, "the job is done")
    words = dict(json.loads(line) for line in machine.run("mrcore cat word_count").stdout.splitlines())
    counted = machine.text("cat /var/tmp/words/text | tr -s '[:space:]' '\\n' | grep -cx the")
    assert words["the"] == int(counted)
