"""`mrcore new` makes a project that passes its own tests and runs; `mrcore test` tells whether one is well."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from commands import mrcore
from daemons import own_address

from mrcore.demo import skeleton


def test_from_new_to_the_output(home: Path) -> None:
    status, out, err = mrcore("new", "mine")
    assert (status, err) == (0, "")
    first, *commands = out.splitlines()
    assert first == f"{Path.cwd()}/projects/mine is there; next:"
    typed = [command.split() for command in commands]
    assert [command[:2] for command in typed] == [
        ["mrcore", "test"],
        ["mrcore", "cluster"],
        ["mrcore", "run"],
        ["mrcore", "cat"],
    ]
    told = Path("projects/mine/README.md").read_text().splitlines()
    assert [line.strip() for line in told if line.startswith("    ")] == [command.strip() for command in commands]
    typed[1] += ["--address", own_address()]
    shown = {}
    try:
        for _, *arguments in typed:
            status, shown[arguments[0]], err = mrcore(*arguments)
            assert status == 0, err
    finally:
        assert mrcore("cluster", "stop")[0] == 0
    assert "3 passed" in shown["test"]
    oracle = Counter(skeleton.SAMPLE.split())
    assert sorted(map(json.loads, shown["cat"].splitlines())) == sorted([word, n] for word, n in oracle.items())


def test_a_failing_test_is_exit_status_1_and_no_test_is_told(home: Path) -> None:
    mrcore("new", "mine")
    file = Path("projects/mine/map_functions.py")
    file.write_text(file.read_text().replace("yield word, 1", "yield word, 2"))
    status, out, _ = mrcore("test", "mine")
    assert status == 1 and "1 failed, 2 passed" in out
    Path("projects/mine/test_functions.py").write_text("\n")
    status, _, err = mrcore("test", "mine")
    assert status == 1 and "hold no test" in err
    Path("projects/mine/test_functions.py").write_text("def broken(:\n")
    status, out, err = mrcore("test", "mine")
    assert status == 1 and "pytest could not run the tests" in err and "SyntaxError" in out


def test_without_tests_the_job_runs_over_the_sample(home: Path) -> None:
    mrcore("new", "mine")
    Path("projects/mine/test_functions.py").unlink()
    status, out, err = mrcore("test", "mine")
    words = sorted(set(skeleton.SAMPLE.split()))
    assert status == 0, err
    assert [json.loads(line)[0] for line in out.splitlines()[:5]] == words[:5]
    assert out.splitlines()[5:] == [f"{len(words)} items from {Path.cwd()}/projects/mine/sample"]
    Path("projects/mine/sample/words.txt").write_bytes(b"\xff\n")
    status, out, err = mrcore("test", "mine")
    assert status == 1 and "UTF-8" in err
    for file in Path("projects/mine/sample").iterdir():
        file.unlink()
    Path("projects/mine/sample").rmdir()
    job = Path("projects/mine/job.yml")
    lines = [line for line in job.read_text().splitlines() if not line.startswith("input_dirs")]
    job.write_text("\n".join([*lines, "input_dirs: [inputs/mine]\n"]))
    status, _, err = mrcore("test", "mine")
    assert status == 2 and "put some input into" in err
    job.unlink()
    status, _, err = mrcore("test", "mine")
    assert status == 2 and "there is nothing to test" in err
    status, _, err = mrcore("test", "nobody")
    assert status == 2 and "there is no project 'nobody'" in err


def test_nothing_is_overwritten_and_names_are_checked(home: Path) -> None:
    assert mrcore("new", "mine")[0] == 0
    Path("projects/mine/map_functions.py").write_text("# changed\n")
    status, _, err = mrcore("new", "mine")
    assert status == 2 and "is there already, and nothing was changed" in err
    assert Path("projects/mine/map_functions.py").read_text() == "# changed\n"
    for name in ("../mine", ".mine", "a b", "x" * 101, "-x"):
        status, _, err = mrcore("new", "--", name)
        assert status == 2 and "is no name of a project" in err, name
    os.symlink("nowhere", "projects/link")
    assert mrcore("new", "link")[0] == 2
    assert {path.name for path in Path("projects").iterdir()} == {"mine", "link"}


def test_a_project_for_a_deployed_cluster_brings_its_sample_to_the_nodes(tmp_path: Path) -> None:
    commands = skeleton.make(tmp_path, "mine", local=False)
    assert "input_dirs: [inputs/mine]" in (tmp_path / "mine/job.yml").read_text()
    assert f"mrcore upload {tmp_path}/mine/sample inputs/mine" in commands


@pytest.mark.parametrize("name", ["a", "a.b-c_d", "x" * 100])
def test_any_name_of_a_project_will_do(tmp_path: Path, name: str) -> None:
    skeleton.make(tmp_path, name, local=True)
    compile((tmp_path / name / "map_functions.py").read_text(), "map_functions.py", "exec")
