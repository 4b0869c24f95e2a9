"""What Prometheus is told: names that it takes, numbers that are right, an answer that is quick whatever nodes do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import PROJECT, module
from clusters import TestCluster
from conditions import wait_until
from daemons import own_address
from dashboards import dashboard, settings_of
from fake_cluster import FakeCluster
from prometheus_client.parser import text_string_to_metric_families
from stores import job as queued_job

from mrcore.admin import findings
from mrcore.admin.doctor import Finding
from mrcore.errors import MrcoreError
from mrcore.queue.runner import Runner
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings, load_settings
from mrcore.state import backup
from mrcore.state.progress import Phase, Progress, RunDetail, TaskRow
from mrcore.state.store import Hold, Store
from mrcore.system import procfs
from mrcore.web import health, metrics

Values = dict[tuple[str, ...], float]


@pytest.fixture
def settings(home: Path, projects_dir: Path) -> Settings:
    project = projects_dir / "fake"
    project.mkdir()
    (project / "map_functions.py").write_text("def ok(line, aux): ...\ndef fail(line, aux): ...\n")
    made = load_settings()
    made.state_dir.mkdir()
    return made


@pytest.fixture
def watch() -> Iterator[health.NodeWatch]:
    made = health.NodeWatch()
    yield made
    made.close()


def told(settings: Settings, watch: health.NodeWatch) -> dict[str, Values]:
    """All samples: by the metric's name, then by the values of its labels."""
    found: dict[str, Values] = {}
    for family in text_string_to_metric_families(metrics.render(settings, watch).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


def fake(name: str, does: str = "ok", **keys: Any) -> dict[str, Any]:
    base = {"job_name": name, "project_name": "fake", "input_dirs": ["x"], "map_function_name": does, "run_once": True}
    return base | keys


def once(settings: Settings) -> dict[str, int]:
    return Runner(settings, FakeCluster(settings)).run(once=True)


@pytest.mark.slow
def test_promtool_finds_nothing_to_object_to(settings: Settings, watch: health.NodeWatch) -> None:
    """In a queue where every metric has a sample."""
    everything(settings)
    text = metrics.render(settings, watch)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def everything(settings: Settings) -> None:
    """Make a queue that holds, with a run under way, some behind it, findings and a backup."""
    store, now = Store(settings.state_dir), time.time()
    for name in ("done", "now", "bad"):
        store.submit(queued_job(name), now)
    for number, ending in enumerate(("succeeded", "succeeded", "failed")):
        run = store.start_run("done", now - 1000 + 100 * number)
        store.enter_phase("done", run, "MAP", now - 1000 + 100 * number)
        counts = {"input_bytes": 50, "output_bytes": 7} if ending == "succeeded" else {}
        store.end_run("done", run, ending, now - 990 + 100 * number, counts)
    died = TaskRow(phase="MAP", task=0, try_=1, server="S_0", node="n", started=now, seconds=1.0, outcome="died")
    store.set_detail("done", 1, RunDetail(deaths=[died, died]))
    run = store.start_run("now", now - 30)
    store.enter_phase("now", run, "MAP", now - 30)
    phases = [Phase(name="MAP", started=now - 30, done=5, total=10)]
    progress = Progress(job_name="now", run=run, job_type="mapreduce", started=now - 30, updated=now, phases=phases)
    progress.fraction, progress.eta_seconds, progress.deaths = 0.5, 30.0, 1
    store.set_progress(progress)
    store.set_hold(Hold("w2 does not answer", now - 60, 3, now + 60))
    finding = Finding("node w2", "node silent", "nothing answers", "no job can run", "look")
    findings.keep(settings, [finding, finding._replace(where="node w3"), finding._replace(code="disk")], now - 5)
    backup.note(settings, {"time": now - 3600, "file": "/b"})
    store.close()


def test_prometheus_token_opens_the_metrics_and_nothing_else(tmp_path: Path) -> None:
    """As the playbooks derive it of the dashboard's token."""
    derived = module("ansible/filter_plugins/mrcore.py").mrcore_metrics_token
    everything(settings_of(tmp_path))
    with dashboard(tmp_path, "--control") as shown:
        bearer = f"Bearer {derived(shown.token + chr(10))}"
        answer = shown.ask("/metrics", token=False, authorization=bearer)
        assert (answer.status, answer.headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        assert "mrcore_queue_held 1.0" in answer.text
        assert shown.ask("/metrics").status == 200
        for path, method in (("/", "GET"), ("/history", "GET"), ("/metrics/", "GET"), ("/actions/pause", "POST")):
            assert shown.ask(path, method, token=False, authorization=bearer).status == 403, path
        assert shown.ask("/metrics", token=False).status == 403
        assert shown.ask("/metrics", token=False, authorization="Bearer x").status == 403


@pytest.mark.slow
def test_a_real_prometheus_scrapes_and_its_alerts_fire(tmp_path: Path) -> None:
    """With the role's rules, without their waiting: of a queue that holds, a node that is down and a failed job."""
    derived = module("ansible/filter_plugins/mrcore.py").mrcore_metrics_token
    everything(settings_of(tmp_path))
    rules = (PROJECT / "roles/monitoring/files/mrcore.rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(re.sub(r"( for:) .*", r"\1 0s", rules))
    address = f"{own_address()}:9090"
    with dashboard(tmp_path, runner=False) as shown:
        target = {"targets": [urllib.parse.urlsplit(shown.url).netloc], "labels": {"cluster": "c"}}
        job = {"job_name": "mrcore", "static_configs": [target], "authorization": {"credentials": derived(shown.token)}}
        often = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        whole = {"global": often, "rule_files": [str(tmp_path / "rules.yml")], "scrape_configs": [job]}
        (tmp_path / "prometheus.yml").write_text(json.dumps(whole))
        command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with (tmp_path / "prometheus.log").open("w") as log:
            process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=log)
        try:
            wanted = {
                "MrcoreQueueHeld",
                "MrcoreRunnerDown",
                "MrcoreNodeDown",
                "MrcoreJobFailed",
                "MrcoreDoctorFindings",
            }
            wait_until(lambda: firing(address) >= wanted, 60, "they fire")
        finally:
            process.terminate()
            process.wait(30)


def firing(address: str) -> set[str]:
    """The alerts that a Prometheus has; none before it answers."""
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/alerts", timeout=10) as answer:
            return {alert["labels"]["alertname"] for alert in json.load(answer)["data"]["alerts"]}
    except OSError:
        return set()


def test_the_queue_the_run_under_way_and_what_was_last(settings: Settings, watch: health.NodeWatch) -> None:
    everything(settings)
    now, found = time.time(), told(settings, watch)
    assert found["mrcore_queue_jobs"] == {("queued",): 3, ("held",): 0, ("failed",): 0}
    assert found["mrcore_queue_held"] == {(): 1}
    assert found["mrcore_queue_held_since_timestamp_seconds"][()] == pytest.approx(now - 60, abs=20)
    assert found["mrcore_queue_paused"] == found["mrcore_queue_draining"] == found["mrcore_runner_up"] == {(): 0}
    assert found["mrcore_runs_total"] == {("succeeded",): 2, ("failed",): 1, ("cancelled",): 0, ("handed_back",): 0}
    assert found["mrcore_tasks_died_total"] == {(): 2}
    assert found["mrcore_run_info"] == {("now", "mapreduce", "MAP"): 1}
    assert found["mrcore_run_done_ratio"] == {("now",): 0.5} and found["mrcore_run_tasks_died"] == {("now",): 1}
    assert 0 < found["mrcore_run_remaining_seconds"][("now",)] <= 30 <= found["mrcore_run_elapsed_seconds"][("now",)]
    assert found["mrcore_job_last_success_timestamp_seconds"][("done",)] == pytest.approx(now - 890, abs=20)
    assert found["mrcore_job_last_run_failed"] == {("done",): 1}
    assert found["mrcore_job_last_run_duration_seconds"][("done",)] == pytest.approx(10)
    assert found["mrcore_job_last_run_phase_seconds"][("done", "MAP")] == pytest.approx(10)
    assert found["mrcore_doctor_findings"] == {("disk",): 1, ("node silent",): 2}
    assert found["mrcore_last_backup_timestamp_seconds"][()] == pytest.approx(now - 3600, abs=20)
    assert found["mrcore_master_disk_size_bytes"][()] > found["mrcore_master_disk_free_bytes"][()] > 0


def test_an_empty_queue_of_a_cluster_that_was_never_started(settings: Settings, watch: health.NodeWatch) -> None:
    found = told(settings, watch)
    assert found["mrcore_queue_held"] == {(): 0} and "mrcore_run_info" not in found
    assert found["mrcore_node_up"] == {("node-0",): 0} and found["mrcore_node_servers_up"] == {("node-0",): 0}
    assert "mrcore_certificate_expiry_timestamp_seconds" not in found
    assert "mrcore_last_backup_timestamp_seconds" not in found, "a local cluster may do without"
    deployed = settings.model_copy(update={"local": False})
    assert told(deployed, watch)["mrcore_last_backup_timestamp_seconds"] == {(): 0}


def test_runs_are_counted_on_when_the_history_forgets(settings: Settings, watch: health.NodeWatch) -> None:
    short = settings.model_copy(update={"history_keep_runs": 2})
    scheduler = Scheduler(short)
    for number in range(5):
        scheduler.submit_jobs([fake(f"a{number}"), fake(f"b{number}", "fail")])
        once(short)
        ended = told(short, watch)["mrcore_runs_total"]
        assert (ended["succeeded",], ended["failed",]) == (number + 1, number + 1)
    assert len(scheduler.history()) == 2
    scheduler.store.close()


def test_a_queue_of_before_counts_from_its_history(settings: Settings, watch: health.NodeWatch) -> None:
    scheduler = Scheduler(settings)
    scheduler.submit_jobs([fake("a"), fake("b")])
    once(settings)
    scheduler.store.put("totals", {})  # as in a file that an earlier release has written
    assert told(settings, watch)["mrcore_runs_total"]["succeeded",] == 2
    scheduler.submit_job(fake("c"))
    once(settings)
    assert told(settings, watch)["mrcore_runs_total"]["succeeded",] == 3
    scheduler.store.close()


def test_a_detail_that_is_written_twice_counts_once(settings: Settings) -> None:
    store = Store(settings.state_dir)
    store.submit(queued_job("a"), 1.0)
    run = store.start_run("a", 2.0)
    row = TaskRow(phase="MAP", task=0, try_=1, server="S_0", node="n", started=2.0, seconds=1.0, outcome="died")
    for _ in range(2):
        store.set_detail("a", run, RunDetail(deaths=[row]))
    assert store.totals()["deaths"] == 1
    store.close()


def test_a_job_that_failed_is_told_until_it_runs_well_or_is_deleted(
    settings: Settings, watch: health.NodeWatch
) -> None:
    scheduler = Scheduler(settings)
    scheduler.submit_jobs([fake("a", "fail"), fake("b", "fail")])
    once(settings)
    assert told(settings, watch)["mrcore_job_last_run_failed"] == {("a",): 1, ("b",): 1}
    scheduler.submit_job(fake("a"))
    scheduler.delete_job("b")
    once(settings)
    assert told(settings, watch)["mrcore_job_last_run_failed"] == {("a",): 0}
    scheduler.store.close()


def test_the_newest_jobs_are_told_and_no_others(
    settings: Settings, watch: health.NodeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_JOBS", 3)
    store = Store(settings.state_dir)
    for number in range(6):
        store.submit(queued_job(f"j{number}"), 1.0)
    for number in (4, 0, 3, 1, 5, 2):
        store.end_run(f"j{number}", store.start_run(f"j{number}", 2.0 + number), "succeeded", 9.0)
    store.close()
    assert set(told(settings, watch)["mrcore_job_last_run_failed"]) == {("j3",), ("j4",), ("j5",)}


@pytest.mark.slow
def test_a_scrape_is_cheap_with_a_long_history(settings: Settings, watch: health.NodeWatch) -> None:
    """10,000 runs of 500 jobs; the processor's time, since others work on this machine as well."""
    store, now = Store(settings.state_dir), time.time()
    with store.change():
        for number in range(500):
            store.submit(queued_job(f"job{number}", every=60), now)
        for number in range(9_999):
            name = f"job{number % 500}"
            run = store.start_run(name, now + number)
            store.enter_phase(name, run, "MAP", now + number)
            store.end_run(name, run, "succeeded", now + number + 0.5, {"input_bytes": 5, "output_bytes": 6})
        store.start_run("job1", now)
    store.close()
    metrics.render(settings, watch)
    times = []
    for _ in range(5):
        begun = time.process_time()
        metrics.render(settings, watch)
        times.append(time.process_time() - begun)
    assert min(times) < 0.1, times


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("cluster"), nodes=2, servers=1) as made:
        yield made


def test_nodes_of_a_real_cluster_and_one_that_freezes(
    cluster: TestCluster, watch: health.NodeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    found = told(cluster.settings, watch)
    both = {("node-0",), ("node-1",)}
    assert found["mrcore_node_up"] == found["mrcore_node_servers_up"] == dict.fromkeys(both, 1)
    assert found["mrcore_node_servers"] == dict.fromkeys(both, 1)
    free, size = found["mrcore_node_disk_free_bytes"], found["mrcore_node_disk_size_bytes"]
    assert set(free) == both and all(0 < free[node] < size[node] for node in both)
    assert set(found["mrcore_node_cpus"].values()) == {os.cpu_count()}
    assert set(found["mrcore_node_load"]) == both
    ends = found["mrcore_certificate_expiry_timestamp_seconds"]
    assert set(ends) == {("node node-0",), ("node node-1",), ("ca",), ("master",)}
    assert all(end > time.time() + 86400 for end in ends.values())

    pid = agent_of(cluster, "node-1")
    os.kill(pid, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        late = told(cluster.settings, watch)
        assert time.monotonic() - begun < health.ASK_SECONDS, "nobody waits for a node that does not answer"
        assert late["mrcore_node_up"]["node-0",] == 1
        wait_until(lambda: told(cluster.settings, watch)["mrcore_node_up"]["node-1",] == 0, 60, "it is told")
        gone = told(cluster.settings, watch)
        assert gone["mrcore_node_servers_up"] == dict.fromkeys(both, 1), "its server answers"
        assert set(gone["mrcore_node_load"]) == {("node-0",)}
        answers = health.NodeWatch(ask_seconds=1.0).look(cluster.settings, 30.0).answers
        silent = {who for who, answer in answers.items() if isinstance(answer, MrcoreError)}
        assert silent == {("node-1", "agent")} and len(answers) == 4, "who waits gets the answers of all"
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: told(cluster.settings, watch)["mrcore_node_up"]["node-1",] == 1, 60, "it is back")


def agent_of(cluster: TestCluster, node: str) -> int:
    pid: int = json.loads((cluster.settings.node(node).layout.pids_dir / "agent.json").read_text())["pid"]
    assert procfs.state(pid)
    return pid


def test_connections_are_kept_and_those_of_nodes_that_left_are_closed(
    cluster: TestCluster, watch: health.NodeWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    wait_until(lambda: len(watch.look(cluster.settings).nodes) == 2, message="both")
    before = dict(watch._clients)
    wait_until(lambda: watch.look(cluster.settings).time > 0)
    assert watch._clients == before and len(before) == 4
    fewer = cluster.settings.model_copy(update={"nodes": cluster.settings.nodes[:1]})
    wait_until(lambda: len(watch.look(fewer).nodes) == 1, message="one left")
    assert len(watch._clients) == 2
