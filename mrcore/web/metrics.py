"""What Prometheus is told of a cluster, by its master: the queue, the run under way, the last runs, nodes, dates.

Names follow Prometheus' conventions: base units, `_total` for what only grows. Labels are few and bounded: states,
phases, codes, nodes, the newest MAX_JOBS jobs; no text of ours or of users is one. What is not known has no sample.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mrcore import VERSIONS
from mrcore.admin import findings
from mrcore.errors import UsageError
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.state.backup import last_backup
from mrcore.state.store import RunRow
from mrcore.web.health import NodeWatch
from mrcore.wire import pki

MAX_JOBS = 200  # jobs whose last runs are told: those that began a run last
ENDED = ("succeeded", "failed", "cancelled")
_watch = NodeWatch()

Sample = tuple[Sequence[str], float | None]


def render(settings: Settings, watch: NodeWatch = _watch) -> bytes:
    """Return all metrics in Prometheus' text format 0.0.4. Raises ClusterFault when there is no queue.

    Nodes are not waited for (`web.health`).
    """
    return generate_latest(_Master(settings, watch))


class _Master(Collector):
    """The state at one moment."""

    def __init__(self, settings: Settings, watch: NodeWatch) -> None:
        self._settings, self._watch = settings, watch

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        versions = [str(VERSIONS["version"]), str(VERSIONS["release"]), platform.python_version()]
        text = "1; version and release of mrcore, version of Python."
        yield _gauge("mrcore_build_info", text, [(versions, 1)], "version", "release", "python")
        scheduler = Scheduler(self._settings)
        with contextlib.closing(scheduler.store):
            yield from _queue(scheduler)
            yield from _running(scheduler)
            yield from _last_runs(scheduler)
        yield from self._nodes()
        yield from self._dates()

    def _nodes(self) -> Iterator[Metric]:
        seen = self._watch.look(self._settings)

        def gauge(name: str, text: str, values: Iterable[float | None]) -> Metric:
            samples = [([node.name], value) for node, value in zip(seen.nodes, values, strict=True)]
            return _gauge(f"mrcore_node_{name}", text, samples, "node")

        health = [node.health for node in seen.nodes]
        yield gauge("up", "Whether the node's agent answers.", (float(each is not None) for each in health))
        yield gauge(
            "load", "Load of the node, averaged over a minute.", (each.load if each else None for each in health)
        )
        yield gauge("cpus", "Processors of the node.", (each.cpus if each else None for each in health))
        free, total = "Free bytes of the disk with the node's data.", "Bytes of the disk with the node's data."
        yield gauge("disk_free_bytes", free, (each.disk_free_bytes if each else None for each in health))
        yield gauge("disk_size_bytes", total, (each.disk_total_bytes or None if each else None for each in health))
        yield gauge("servers", "Cluster servers that the node is to have.", (node.servers for node in seen.nodes))
        yield gauge("servers_up", "Cluster servers that answer.", (node.servers_up for node in seen.nodes))
        ends = [([f"node {node.name}"], node.certificate_ends) for node in seen.nodes]
        for name in ("ca", "master"):
            with contextlib.suppress(UsageError, OSError):  # a local cluster that was never started
                ends.append(([name], pki.ends(self._settings.pki_dir / f"{name}.crt")))
        text = "When a certificate ends: of a node, the master, the authority."
        yield _gauge("mrcore_certificate_expiry_timestamp_seconds", text, ends, "holder")
        text = "When the nodes were asked for what the metrics say of them."
        yield _gauge("mrcore_nodes_asked_timestamp_seconds", text, [((), seen.time or None)])

    def _dates(self) -> Iterator[Metric]:
        disk, settings = shutil.disk_usage(self._settings.state_dir), self._settings
        yield _gauge("mrcore_master_disk_free_bytes", "Free bytes of the disk with the queue.", [((), disk.free)])
        yield _gauge("mrcore_master_disk_size_bytes", "Bytes of the disk with the queue.", [((), disk.total)])
        try:
            backup = last_backup(settings.state_dir)
        except UsageError:  # a damaged note: nobody knows of one
            backup = None
        made = backup["time"] if backup else None if settings.local else 0.0
        text = "When the last backup was made; 0: never. A local cluster may do without."
        yield _gauge("mrcore_last_backup_timestamp_seconds", text, [((), made)])
        try:
            kept = findings.last(settings)
        except UsageError:  # a damaged file: the doctor's next turn writes it again
            kept = None
        codes = [finding.code for finding in kept.findings] if kept else []
        counted = [([code], codes.count(code)) for code in sorted(set(codes))]
        yield _gauge("mrcore_doctor_findings", "What `mrcore doctor` found last, by its code.", counted, "code")
        text = "When `mrcore doctor --keep` looked last."
        yield _gauge("mrcore_doctor_last_run_timestamp_seconds", text, [((), kept.time if kept else None)])


def _queue(scheduler: Scheduler) -> Iterator[Metric]:
    state, store = scheduler.state(), scheduler.store
    text = "Jobs in the queue by state, and those that left by a failure and were not brought back (failed)."
    yield _gauge("mrcore_queue_jobs", text, [([key], count) for key, count in store.job_counts().items()], "state")
    hold = state["hold"]
    yield _gauge("mrcore_queue_held", "Whether the queue waits because of the cluster.", [((), bool(hold))])
    since = hold["since"] if hold else None
    yield _gauge("mrcore_queue_held_since_timestamp_seconds", "Since when it does.", [((), since)])
    yield _gauge("mrcore_queue_paused", "Whether somebody has paused the queue.", [((), state["paused"])])
    yield _gauge("mrcore_queue_draining", "Whether the queue waits for a drain.", [((), bool(state["drain"]))])
    yield _gauge("mrcore_runner_up", "Whether a Runner works through the queue.", [((), state["runner"])])
    totals = store.totals()
    runs = CounterMetricFamily("mrcore_runs", "Runs that have ended, by how.", labels=["state"])
    for name in (*ENDED, "handed back"):
        runs.add_metric([name.replace(" ", "_")], totals[name])
    yield runs
    text = "Tries of tasks that died; at most 50 of a run are counted."
    yield CounterMetricFamily("mrcore_tasks_died", text, totals["deaths"])


def _running(scheduler: Scheduler) -> Iterator[Metric]:
    """Yield the metrics of the run under way, without samples when there is none."""
    run, progress, now = scheduler.store.running(), scheduler.progress(), time.time()
    name = [run.job_name] if run else []
    phases = [phase.name for phase in progress.phases] if progress else list(run.phases) if run else []
    info = [([run.job_name, run.job_type, phases[-1] if phases else ""], 1.0)] if run else []
    yield _gauge("mrcore_run_info", "1; the run under way.", info, "job_name", "job_type", "phase")
    usual = scheduler.estimate_next_runtime(run.job_name) if run else None
    values: list[tuple[str, str, float | None]] = [
        ("start_timestamp_seconds", "When it began.", run.started if run else None),
        ("elapsed_seconds", "How long it has been going on.", now - run.started if run else None),
        ("usual_seconds", "How long the job's last successful runs took (median of 20).",
         usual["median_seconds"] if usual else None),
        ("done_ratio", "How much of it is done, from 0 to 1.", progress.fraction if progress else None),
        ("remaining_seconds", "How long it will still take, by estimate.",
         progress.left_seconds(now) if progress else None),
        ("tasks_died", "Tries of its tasks that died.", progress.deaths if progress else None),
    ]  # fmt: skip
    for suffix, text, value in values:
        yield _gauge(f"mrcore_run_{suffix}", text, [(name, value)] if run else [], "job_name")


def _last_runs(scheduler: Scheduler) -> Iterator[Metric]:
    store = scheduler.store
    ended, succeeded = store.last_of_jobs(MAX_JOBS, *ENDED), store.last_of_jobs(MAX_JOBS, "succeeded")

    def gauge(suffix: str, text: str, runs: list[RunRow], values: Iterable[float | None]) -> Metric:
        samples = [([run.job_name], value) for run, value in zip(runs, values, strict=True)]
        return _gauge(f"mrcore_job_last_{suffix}", text, samples, "job_name")

    text = "When the job succeeded last."
    yield gauge("success_timestamp_seconds", text, succeeded, (run.ended for run in succeeded))
    text = "When its last run ended that was not handed back."
    yield gauge("run_end_timestamp_seconds", text, ended, (run.ended for run in ended))
    yield gauge("run_failed", "Whether that run failed.", ended, (run.state == "failed" for run in ended))
    text = "How long that run took."
    yield gauge("run_duration_seconds", text, ended, ((run.ended or 0) - run.started for run in ended))
    for key, word in (("input_bytes", "it read"), ("output_bytes", "of its output")):
        yield gauge(f"run_{key}", f"Bytes {word}.", ended, (_count(run, key) for run in ended))
    phases = [
        ([run.job_name, phase], times["ended"] - times["started"])
        for run in ended
        for phase, times in run.phases.items()
        if times["ended"] is not None
    ]
    yield _gauge("mrcore_job_last_run_phase_seconds", "How long its phases took.", phases, "job_name", "phase")


def _count(run: RunRow, key: str) -> float | None:
    value = run.counts.get(key, run.counts.get("bytes") if key == "input_bytes" else None)
    return float(value) if isinstance(value, int) else None


def _gauge(name: str, text: str, samples: Iterable[Sample], *labels: str) -> GaugeMetricFamily:
    """Return a gauge with the samples that have a value."""
    gauge = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        if value is not None:
            gauge.add_metric(values, float(value))
    return gauge
