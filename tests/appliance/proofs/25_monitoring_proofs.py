"""Prometheus on the master, as the role monitoring sets it up: it scrapes, and alerts fire and end when they should."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from harness import Machine, Operator, Person, wait_until

FILES = "/etc/prometheus/mrcore"
ONLY_MASTER = "--limit m1"  # what changes is there; a deploy of all machines is proved elsewhere
# A container has not the capabilities that these protections of Debian's unit need.
UNCONFINED = "[Service]\nLimitNOFILE=16384\nDeviceAllow=\nDevicePolicy=auto\nProtectSystem=no\n" + "".join(
    f"{name}=no\n"
    for name in (
        "PrivateUsers", "PrivateDevices", "PrivateTmp", "ProtectHome", "ProtectControlGroups",
        "ProtectKernelModules", "ProtectKernelTunables", "ProtectKernelLogs", "ProtectHostname", "ProtectClock",
        "RestrictNamespaces",
    )
)  # fmt: skip
TELL = "#!/bin/sh\ncat >>/var/tmp/told-$1; echo >>/var/tmp/told-$1\n"


def asked(m1: Machine, path: str) -> Any:
    """What Prometheus answers; bare machines have no curl."""
    url = f"http://127.0.0.1:9090/api/v1/{path}"
    code = f"import urllib.request as r; print(r.urlopen({url!r}, timeout=10).read().decode())"
    done = m1.run(f"python3 -c {shlex.quote(code)}", status=None)
    return json.loads(done.stdout)["data"] if done.status == 0 else None


def firing(m1: Machine) -> set[str]:
    found = (asked(m1, "alerts") or {"alerts": []})["alerts"]
    return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}


def told(m1: Machine, hook: str) -> list[dict[str, Any]]:
    text = m1.run(f"cat /var/tmp/told-{hook}", status=None).stdout
    return [json.loads(line) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def watched(operator: Operator, m1: Machine) -> Iterator[Operator]:
    """The cluster with dashboard, Prometheus and hooks; the next deploy takes them away again, but for the package."""
    usual, inventory = operator.inventory(), operator.inventory()
    variables = inventory["all"]["vars"]
    variables |= {"mrcore_dashboard": True, "mrcore_monitoring": True, "mrcore_monitoring_install": True}
    variables |= {"monitoring_interval": "1s", "monitoring_alert_after": "2s"}  # of the role: seconds, not minutes
    hooks = {f"on_{name}": ["/usr/local/bin/tell", name] for name in ("hold", "findings")}
    variables["mrcore_settings"] = variables["mrcore_settings"] | hooks
    m1.write("/usr/local/bin/tell", TELL, "0755")
    m1.write("/etc/systemd/system/prometheus.service.d/lab.conf", UNCONFINED)
    operator.write_inventory(inventory)
    try:
        played = operator.make("deploy", ARGS=ONLY_MASTER)
        operator.note_time("deploy with Prometheus", played.seconds)
        yield operator
    finally:
        m1.run("systemctl disable --now prometheus", status=None)
        operator.write_inventory(usual)


def test_prometheus_scrapes_the_master(watched: Operator, m1: Machine, w1: Machine, w2: Machine) -> None:
    def target() -> Any:
        found = asked(m1, "targets")
        return found and [each for each in found["activeTargets"] if each["health"] == "up"]

    (up,) = wait_until(target, 90, "the target is up")
    assert up["labels"] == {"cluster": "mrcore", "instance": "127.0.0.1:8643", "job": "mrcore"}
    nodes = asked(m1, "query?query=mrcore_node_up")["result"]
    assert {row["metric"]["node"]: row["value"][1] for row in nodes} == {"w1": "1", "w2": "1"}
    assert len(asked(m1, "rules")["groups"][0]["rules"]) == 15
    assert not w1.reaches(m1.address, 9090), "it listens on loopback"


def test_only_prometheus_may_read_its_token_which_opens_nothing_else(watched: Operator, m1: Machine) -> None:
    assert m1.text(f"stat -c %U:%a {FILES}/token") == "prometheus:400"
    code = (
        "import sys, urllib.request as r, urllib.error as e\n"
        "headers = {'Authorization': 'Bearer ' + sys.stdin.read()}\n"
        "q = r.Request('http://127.0.0.1:8643' + sys.argv[1], headers=headers)\n"
        "try: print(r.urlopen(q).status)\n"
        "except e.HTTPError as error: print(error.code)\n"
    )
    for path, status in (("/metrics", "200"), ("/", "403"), ("/history", "403")):
        assert m1.text(f"python3 -c {shlex.quote(code)} {path} <{FILES}/token") == status, path


def test_another_deploy_changes_nothing(watched: Operator) -> None:
    played = watched.make("deploy", ARGS=ONLY_MASTER)
    assert not any(played.changed.values()), played.output


def test_alerts_of_a_node_that_is_down_and_of_a_held_queue(
    watched: Operator, m1: Machine, w2: Machine, anna: Person
) -> None:
    """They fire, the hooks are called once, and all of it ends when the node is back."""
    wait_until(lambda: not firing(m1) & {"MrcoreNodeDown", "MrcoreQueueHeld"}, 60, "nothing fires")
    m1.run("systemctl start mrcore-doctor")
    before = told(m1, "findings")
    w2.run("systemctl stop mrcore-agent")
    try:
        wait_until(lambda: "MrcoreNodeDown" in firing(m1), 90, "the node's alert fires")
        job = {"job_name": "watched", "job_type": "mapreduce", "project_name": "word_count", "run_once": True}
        job |= {"input_dirs": ["texts"], "map_function_name": "count_words", "reduce_function_name": "add_up"}
        anna.submit(job)
        wait_until(lambda: "MrcoreQueueHeld" in firing(m1), 120, "the queue's alert fires")
        m1.run("systemctl start mrcore-doctor")
        found = told(m1, "findings")
        assert len(found) == len(before) + 1
        assert {"agent silent", "hold"} <= {each["code"] for each in found[-1]["new"]}, found[-1]
        wait_until(lambda: "MrcoreDoctorFindings" in firing(m1), 60, "the doctor's alert fires")
        m1.run("systemctl start mrcore-doctor")
        assert len(told(m1, "findings")) == len(found), "it was told"
    finally:
        w2.run("systemctl start mrcore-agent")
    anna.finished("watched")
    wait_until(lambda: not firing(m1) & {"MrcoreNodeDown", "MrcoreQueueHeld"}, 90, "they end")
    wait_until(lambda: len(told(m1, "hold")) == 2, 30, "the hook was called twice")
    assert [each["state"] for each in told(m1, "hold")] == ["held", "released"]


def test_a_dashboard_that_is_down_is_an_alert_too(watched: Operator, m1: Machine) -> None:
    m1.run("systemctl stop mrcore-dashboard")
    try:
        wait_until(lambda: "MrcoreMetricsDown" in firing(m1), 60, "its alert fires")
    finally:
        m1.run("systemctl start mrcore-dashboard")
    wait_until(lambda: "MrcoreMetricsDown" not in firing(m1), 60, "it ends")


def test_a_prometheus_that_somebody_else_has_set_up_is_left_alone(watched: Operator, m1: Machine) -> None:
    settings = "/etc/prometheus/prometheus.yml"
    ours = m1.read(settings)
    m1.write(settings, "global: {}\n")
    try:
        said = " ".join(watched.make("deploy", status=2, ARGS=ONLY_MASTER).output.split())
        assert "m1 has a Prometheus whose" in said and "mrcore_monitoring_install" in said, said
        assert m1.read(settings) == "global: {}\n"
    finally:
        m1.write(settings, ours)
