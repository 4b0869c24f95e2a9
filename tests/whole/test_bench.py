"""The benchmark at a tiny scale: whatever the times, the results must be equal, and nothing may be left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parents[2] / "bench" / "run.py"


@pytest.mark.slow
def test_all_works_give_what_the_script_by_hand_gives(tmp_path: Path) -> None:
    options = ["--scale", "0.002", "--repeats", "1", "--without", "spark,mrjob,dask", "--limit", "100"]
    folders = ["--folder", str(tmp_path / "bench"), "--results", str(tmp_path / "results")]
    done = subprocess.run([sys.executable, str(RUN), *options, *folders], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (tmp_path / "results").iterdir()
    report = json.loads(file.read_text())
    assert report["equal"] and report["machine"]["cores"] >= 1
    assert list(report["works"]) == ["wordcount", "wordcount-combiner", "sort", "join", "empty"]
    for name, work in report["works"].items():
        assert list(work["competitors"]) == ["by hand", "mrcore 1x2", "mrcore 2x1"]
        for row in work["competitors"].values():
            assert row["error"] is None and len(row["seconds"]) == (10 if name == "empty" else 1)
            assert len({*row["digests"]}) == 1 and row["cpu_seconds"]
    assert not [path for path in (tmp_path / "bench").iterdir() if path.name.startswith("run-")]
    assert not left_over(tmp_path)


def left_over(folder: Path) -> list[str]:
    """Processes that have the folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [command] if str(folder) in command else []
    return found


def test_digests_tell_bags_from_sequences_and_do_not_mind_the_writer(tmp_path: Path) -> None:
    sys.path.insert(0, str(RUN.parent))
    try:
        from works import digest
    finally:
        sys.path.remove(str(RUN.parent))
    texts = {"a": '["x",1]\n["y",2]\n', "b": '["y", 2]\n["x", 1]\n', "c": '"x"\t1\n"y"\t2\n', "d": '["x",1]\n["y",3]\n'}
    paths = {name: tmp_path / name for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    bags = {name: digest([paths[name]], False, "\t" if name == "c" else None) for name in texts}
    rows = {name: digest([paths[name]], True, "\t" if name == "c" else None) for name in texts}
    assert bags["a"] == bags["b"] == bags["c"] != bags["d"]
    assert rows["a"] == rows["c"] != rows["b"]


@pytest.mark.slow
def test_what_progress_costs_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN.with_name("progress.py")), "--seconds", "3", "--rounds", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("of a core on the master", "first run", "second run", "max age", "at 1/3", "ratio"):
        assert what in done.stdout, done.stdout
    assert not [*tmp_path.iterdir()]
