"""The settings of a queue whose project is the stand-in for the cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BEHAVIOURS = ("ok", "fail", "flaky", "bug", "down", "wait", "stubborn", "die", "die_after_commit", "half")


@pytest.fixture
def config(home: Path, projects_dir: Path) -> Path:
    project = projects_dir / "fake"
    project.mkdir()
    (project / "map_functions.py").write_text("".join(f"def {name}(line, aux): ...\n" for name in BEHAVIOURS))
    settings = {"hold_backoff_first_seconds": 0.05, "cycle_interval_seconds": 30, "projects_dir": str(projects_dir)}
    path = home.parent / "config.json"
    path.write_text(json.dumps(settings))
    return path
