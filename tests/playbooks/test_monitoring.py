"""The role monitoring: its queries name metrics that there are; each alert fires when it should, and has a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import PROJECT, module

from mrcore.settings.config import load_settings
from mrcore.web.health import NodeWatch
from mrcore.web.metrics import render

ROLE = PROJECT / "roles/monitoring"
RULES, TESTS = ROLE / "files/mrcore.rules.yml", PROJECT / "tests/support/alerts.yml"
NAMES = re.compile(r"\bmrcore_[a-z_]+\b")


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROLE / "files/mrcore-dashboard.json").read_text())
    return found


def queries() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def told(home: Path) -> set[str]:
    """The names of all metrics, with and without samples."""
    settings = load_settings()
    settings.state_dir.mkdir()
    text = render(settings, NodeWatch()).decode()
    return set(re.findall(r"^# TYPE (\S+) (?:gauge|counter)$", text, re.MULTILINE))


def test_alerts_and_dashboard_name_only_metrics_that_there_are(told: set[str]) -> None:
    variables = dashboard()["templating"]["list"]
    used = "\n".join([*queries(), *(rule["expr"] for rule in alerts()), json.dumps(variables)])
    assert set(NAMES.findall(used)) - told == set()


def test_every_metric_is_explained(told: set[str]) -> None:
    listed = (PROJECT / "docs/operations.md").read_text().split("## Watching")[1].split("\n## ")[0]
    assert {name for name in NAMES.findall(listed) if not name.endswith("_")} >= told


def test_each_alert_says_what_it_is_and_names_a_page_that_there_is() -> None:
    page = (PROJECT / "docs/runbooks/alerts.md").read_text()
    for rule in alerts():
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook"} and all(notes.values()), rule["alert"]
        assert (PROJECT / notes["runbook"]).is_file(), notes["runbook"]
        assert f"`{rule['alert']}`" in page, f"docs/runbooks/alerts.md says nothing of {rule['alert']}"
        assert rule["labels"]["severity"] in ("critical", "warning")
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names) >= 10
    assert set(re.findall(r"`(Mrcore[A-Za-z]+)`", page)) == set(names)


def test_each_alert_is_tried() -> None:
    tried = TESTS.read_text()
    assert [rule["alert"] for rule in alerts() if rule["alert"] not in tried] == []


@pytest.mark.slow
def test_each_alert_fires_when_it_should_and_only_then() -> None:
    promtool("check", "rules", RULES)
    promtool("test", "rules", TESTS)


@pytest.mark.slow
def test_the_queries_of_the_dashboard_are_such(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": text.replace("$cluster", "c")} for number, text in enumerate(queries())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)


def test_the_dashboard_has_the_form_that_grafana_takes() -> None:
    found = dashboard()
    assert found["schemaVersion"] >= 36 and found["title"] and found["uid"] == "mrcore"
    numbers = [panel["id"] for panel in found["panels"]]
    assert len(set(numbers)) == len(numbers) > 15
    taken = set[tuple[int, int]]()
    for panel in found["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken and max(x for x, _ in cells) < 24, f"{panel['title']} lies on another panel"
        taken |= cells
        assert all('{cluster="$cluster"}' in target["expr"] for target in panel["targets"]), panel["title"]


@pytest.mark.slow
@pytest.mark.parametrize("alertmanagers", [[], ["10.0.0.9:9093"]])
def test_the_settings_of_prometheus_are_such(tmp_path: Path, alertmanagers: list[str]) -> None:
    """As Ansible writes them: valid for promtool, with the rules, the token and the cluster's name in their places."""
    (tmp_path / "token").write_text("x")
    (tmp_path / "mrcore.rules.yml").write_text(RULES.read_text())
    given = {"monitoring_dir": str(tmp_path), "monitoring_target": "[::1]:8643", "monitoring_interval": "7s"}
    given |= {"monitoring_cluster_name": "c: d", "monitoring_alertmanagers": alertmanagers}  # type: ignore[dict-item]
    tasks = [
        {"ansible.builtin.template": {"src": str(ROLE / f"templates/{name}.j2"), "dest": str(tmp_path / name)}}
        for name in ("prometheus.yml", "scrape.yml")
    ]
    given |= {"ansible_python_interpreter": sys.executable}
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": given, "tasks": tasks}
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", str(tmp_path / "play.yml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 rules found" in promtool("check", "config", tmp_path / "prometheus.yml")
    whole, scrape = (yaml.safe_load((tmp_path / name).read_text()) for name in ("prometheus.yml", "scrape.yml"))
    assert whole["scrape_configs"] == scrape["scrape_configs"]
    (job,) = scrape["scrape_configs"]
    assert job["job_name"] == "mrcore" and job["authorization"] == {"credentials_file": f"{tmp_path}/token"}
    assert job["static_configs"] == [{"targets": ["[::1]:8643"], "labels": {"cluster": "c: d"}}]
    assert ("alerting" in whole) == bool(alertmanagers)
    assert "Of the role monitoring of mrcore" in (tmp_path / "prometheus.yml").read_text(), "install.yml looks for it"


# ---- the inventory

plugin = module("ansible/filter_plugins/mrcore.py")


def watchers(monitoring: list[str] | None = None, **variables: Any) -> tuple[list[str], list[str]]:
    """Who gets the role, and what is wrong with the inventory."""
    names = {"m1": "10.0.0.11", "w1": "10.0.0.21", **({"p1": "10.0.0.31"} if "p1" in (monitoring or []) else {})}
    hosts = {name: {"inventory_dir": "/inv", "ansible_host": address} | variables for name, address in names.items()}
    groups = {"all": list(names), "ungrouped": [], "master": ["m1"], "nodes": ["w1"]}
    groups |= {} if monitoring is None else {"monitoring": monitoring}
    found = plugin.mrcore_cluster(hosts, groups)
    return found["watchers"], found["faults"]


def test_who_is_watched_from_where() -> None:
    assert watchers() == ([], [])
    assert watchers(mrcore_monitoring=True, mrcore_dashboard=True) == (["m1"], [])
    assert watchers(["m1"], mrcore_dashboard=True) == (["m1"], [])
    away = {"mrcore_monitoring_target": "10.0.0.11:8643", "mrcore_dashboard": True}
    assert watchers(["p1"], **away) == (["p1"], [])
    _, (fault,) = watchers(["p1"], mrcore_dashboard=True)
    assert "mrcore_monitoring_target is 127.0.0.1:8643, the master's own, which p1 of the" in fault
    _, faults = watchers(mrcore_monitoring="yes", mrcore_dashboard=True)
    assert "mrcore_monitoring of m1 is 'yes': it must be true or false." in faults


def test_without_the_dashboard_there_is_nothing_to_scrape() -> None:
    _, (fault,) = watchers(mrcore_monitoring=True)
    assert "mrcore_dashboard" in fault


def test_a_reset_takes_away_what_lets_into_dashboard_and_metrics() -> None:
    removed = (PROJECT / "ansible/tasks/teardown.yml").read_text()
    assert "- /var/lib/mrcore/state/dashboard.token" in removed and "path: /etc/prometheus/mrcore\n" in removed
    plays = yaml.safe_load((PROJECT / "ansible/reset.yml").read_text())
    (away,) = [play for play in plays if play.get("hosts") == "all:!master:!nodes"]
    (task,) = away["tasks"]
    assert task["ansible.builtin.file"] == {"path": "/etc/prometheus/mrcore", "state": "absent"}
    assert task["when"] == "inventory_hostname in __mrcore.watchers"
