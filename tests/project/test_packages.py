"""Packages of projects: from requirements.txt and wheels to what tasks import, on a real cluster and in a trial."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from clusters import TestCluster
from daemons import made_spec
from wheels import make_wheel

from mrcore.errors import ClusterFault, JobFault, UsageError
from mrcore.node.node_agent import NodeAgent
from mrcore.node.snapshots import KEPT_VENVS
from mrcore.project import packages
from mrcore.queue import job as jobs
from mrcore.wire.tls import Identity

MASTER = Identity("master", "master", "1")
MAP = """
import shouting

def shout(line, auxiliary_data):
    yield shouting.loud(line.strip()), shouting.VERSION
"""
PLAIN = """
def shout(line, auxiliary_data):
    try:
        import shouting
    except ImportError:
        yield "no package", 0
"""


def shouting(folder: Path, version: str = "1.0", **more: str) -> Path:
    text = f"VERSION = {version!r}\ndef loud(text):\n    return text.upper() + '!'\n"
    return make_wheel(folder, "shouting", version, {"shouting.py": text}, **more)


def make_project(folder: Path, requirements: str | None = "shouting\n", functions: str = MAP) -> Path:
    folder.mkdir(parents=True)
    (folder / "map_functions.py").write_text(functions)
    if requirements is not None:
        (folder / "requirements.txt").write_text(requirements)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("cluster"), nodes=2, servers=1) as made:
        made.write_inputs({"a": "one\n", "b": "two\n"})
        yield made


def run(cluster: TestCluster, project: Path, name: str | None = None) -> list[object]:
    name = name or project.name
    keys = {"job_name": name, "project_name": project.name, "map_function_name": "shout", "reduce_function_name": None}
    cluster.run(cluster.job(**keys))
    return sorted(cluster.items(name))


def installed(cluster: TestCluster) -> list[list[str]]:
    folders = [node.layout.venvs_dir for node in cluster.settings.nodes]
    return [sorted(path.name for path in folder.iterdir() if path.name != ".partial") for folder in folders]


def test_a_job_imports_its_packages_on_all_nodes_and_the_next_does_not(cluster: TestCluster) -> None:
    project = make_project(cluster.settings.projects_dir / "loud")
    make_wheel(project / "wheels", "helper", "3", {"helper.py": ""})
    shouting(project / "wheels", requires="helper>=2")
    assert run(cluster, project) == [["ONE!", "1.0"], ["TWO!", "1.0"]]
    name = packages.environment_hash(project)
    assert installed(cluster) == [[name], [name]]
    for node in cluster.settings.nodes:
        assert (node.layout.venvs_dir / str(name) / "helper.py").is_file()
        assert list((node.layout.venvs_dir / ".partial").iterdir()) == []
    inodes = [(node.layout.venvs_dir / str(name)).stat().st_ino for node in cluster.settings.nodes]
    assert run(cluster, make_project(cluster.settings.projects_dir / "plain", None, PLAIN)) == [["no package", 0]] * 2
    (project / "map_functions.py").write_text(MAP + "# changed\n")
    assert run(cluster, project) == [["ONE!", "1.0"], ["TWO!", "1.0"]]
    assert [(node.layout.venvs_dir / str(name)).stat().st_ino for node in cluster.settings.nodes] == inodes


def test_two_projects_have_two_versions_of_one_package(cluster: TestCluster) -> None:
    for version in ("1.5", "2.5"):
        project = make_project(cluster.settings.projects_dir / f"loud-{version}")
        shouting(project / "wheels", version)
    for version in ("2.5", "1.5", "2.5"):
        project = cluster.settings.projects_dir / f"loud-{version}"
        assert run(cluster, project) == [["ONE!", version], ["TWO!", version]]


def test_a_reduce_function_has_them_too(cluster: TestCluster) -> None:
    project = make_project(cluster.settings.projects_dir / "reduced", functions="def shout(line, aux): yield line, 1\n")
    (project / "reduce_functions.py").write_text(
        "import shouting\ndef add(group, aux): yield group[0][0].strip(), shouting.VERSION\n"
    )
    shouting(project / "wheels")
    keys = {"map_function_name": "shout", "reduce_function_name": "add", "combine_function_name": None}
    cluster.run(cluster.job(job_name="reduced", project_name="reduced", **keys))
    assert sorted(cluster.items("reduced")) == [["one", "1.0"], ["two", "1.0"]]


def test_the_project_and_the_standard_library_come_first(cluster: TestCluster) -> None:
    functions = (
        "import json, click, sys\nimport here\n"
        "def shout(line, aux):\n    yield here.NAME, [bool(json.loads), click.NAME, 'click' in json.__file__]\n"
    )
    project = make_project(cluster.settings.projects_dir / "order", "click==0.1\njson\nhere\n", functions)
    (project / "here.py").write_text("NAME = 'of the project'\n")
    make_wheel(project / "wheels", "here", "1", {"here.py": "NAME = 'of a package'\n"})
    make_wheel(project / "wheels", "json", "1", {"json.py": "loads = None\n"})
    make_wheel(project / "wheels", "click", "0.1", {"click.py": "NAME = 'an old click'\n"})
    assert run(cluster, project) == [["of the project", [True, "an old click", False]]] * 2


@pytest.mark.parametrize(
    ("name", "version", "said"),
    [
        ("missing", None, "No matching distribution found for missing.*make wheels PROJECT="),
        ("ujson", "0.1", r"it asks for ujson 0\.1, and mrcore itself runs on ujson \d.*write ujson=="),
    ],
)
def test_what_cannot_be_installed_fails_the_job_by_name(
    cluster: TestCluster, name: str, version: str | None, said: str
) -> None:
    project = make_project(cluster.settings.projects_dir / f"bad-{name}", f"shouting\n{name}\n")
    shouting(project / "wheels")
    if version:
        make_wheel(project / "wheels", name, version, {f"{name}.py": ""})
    before = installed(cluster)
    with pytest.raises(JobFault, match=f"(?s)project bad-{name}.*{said}"):
        run(cluster, project)
    assert installed(cluster) == before
    for node in cluster.settings.nodes:
        assert list((node.layout.venvs_dir / ".partial").iterdir()) == []
    cluster.assert_clean()


def test_a_wheel_for_another_python_or_cpu_is_none(cluster: TestCluster) -> None:
    project = make_project(cluster.settings.projects_dir / "foreign")
    shouting(project / "wheels", tag="cp27-cp27mu-linux_alpha")
    with pytest.raises(JobFault, match=r"cannot be installed on node node-\d: .*are missing or made for another"):
        run(cluster, project)


def test_the_version_that_mrcore_has_is_no_conflict(cluster: TestCluster) -> None:
    version = metadata.version("ujson")
    project = make_project(cluster.settings.projects_dir / "same", f"shouting\nujson=={version}\n")
    shouting(project / "wheels")
    make_wheel(project / "wheels", "ujson", version, {"ujson.py": "raise SystemError\n"})
    assert run(cluster, project) == [["ONE!", "1.0"], ["TWO!", "1.0"]]


def test_what_is_ours_is_what_a_task_process_has_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, mrcore.cluster_server, mrcore.process, json\n"
        "from pathlib import Path\nfrom mrcore.project.packages import use_packages\nuse_packages(Path(sys.argv[1]))\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    loaded = set(
        json.loads(subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=True).stdout)
    )
    modules = metadata.packages_distributions()
    names = {re.sub("[-_.]+", "-", name).lower() for module in loaded for name in modules.get(module, ())}
    assert names - {"pip", "setuptools"} <= set(packages.OURS)
    assert "ujson" in names


def test_no_wheels_are_told_at_submit(home: Path, projects_dir: Path) -> None:
    job = {"job_name": "x", "project_name": "word_count", "input_dirs": ["x"], "map_function_name": "count_map"}
    (projects_dir / "word_count" / "requirements.txt").write_text("# nothing\n\n")
    assert jobs.validate(job, projects_dir)
    (projects_dir / "word_count" / "requirements.txt").write_text("shouting>=1\n")
    with pytest.raises(UsageError, match="make wheels PROJECT=word_count") as caught:
        jobs.validate(job | {"map_function_name": "cuont_map"}, projects_dir)
    assert len(caught.value.details["faults"]) == 2
    shouting(projects_dir / "word_count" / "wheels")
    assert jobs.validate(job, projects_dir)


def test_the_hash_is_of_requirements_and_wheels(tmp_path: Path) -> None:
    one, two = make_project(tmp_path / "one"), make_project(tmp_path / "two", functions=PLAIN)
    for project in (one, two):
        shouting(project / "wheels")
    first = packages.environment_hash(one)
    assert first == packages.environment_hash(two)
    (two / "requirements.txt").write_text("shouting # \n")
    assert packages.environment_hash(two) != first
    shouting(one / "wheels", "1.1")
    assert packages.environment_hash(one) != first
    assert packages.environment_hash(make_project(tmp_path / "three", None)) is None


@pytest.fixture
def agent(tmp_path: Path) -> NodeAgent:
    return NodeAgent(made_spec(tmp_path / "node"))


def deliver(agent: NodeAgent, project: Path, name: str) -> None:
    upload = agent.receive(MASTER, {"environment": name})
    with packages.Shipment(project, project) as shipment:
        fd, length = shipment._packed()
        upload.partial.write_bytes(os.pread(fd, length, 0))
    upload.finish()


def test_wheels_that_arrive_otherwise_are_refused(agent: NodeAgent, tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    shouting(project / "wheels")
    with pytest.raises(ClusterFault, match="arrived as"):
        deliver(agent, project, "0" * 32)
    with pytest.raises(ClusterFault, match="never came"):
        agent._snapshots.install_environment(MASTER, "0" * 32, "project")


def test_old_environments_are_swept_but_for_the_newest(agent: NodeAgent, tmp_path: Path) -> None:
    names = []
    for number in range(3):
        project = make_project(tmp_path / f"p{number}", f"shouting\n# {number}\n")
        shouting(project / "wheels")
        names.append(str(packages.environment_hash(project)))
        deliver(agent, project, names[-1])
        assert agent._snapshots.install_environment(MASTER, names[-1], "project")
        assert not agent._snapshots.install_environment(MASTER, names[-1], "project")
    venvs = tmp_path / "node" / "venvs"
    for number in range(KEPT_VENVS + 2):
        (folder := venvs / f"{number:032x}").mkdir()
        os.utime(folder, (number, number))
    os.utime(venvs / names[0], (1000, 1000))
    assert agent._snapshots.environment_state(MASTER, names[0]) and not agent._snapshots.environment_state(
        MASTER, "f" * 32
    )
    assert agent.sweep(MASTER, [])["venvs"] == 5
    left = sorted(path.name for path in venvs.iterdir() if path.name != ".partial")
    assert len(left) == KEPT_VENVS and set(names) <= set(left)


def test_try_uses_them(home: Path, projects_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    functions = MAP.replace("import shouting", "import click, shouting\nassert click.OLD")
    project = make_project(projects_dir / "loud", "shouting\nclick\n", functions)
    shouting(project / "wheels")
    make_wheel(project / "wheels", "click", "0.1", {"click.py": "OLD = True\n"})
    Path("in.txt").write_text("hello\n")
    command = [
        sys.executable,
        "-c",
        "from mrcore.cli.main import main; main()",
        "try",
        "loud",
        "in.txt",
        "--map",
        "shout",
    ]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, '["HELLO!", "1.0"]\n'), done.stderr
    assert len(list((tmp_path / "cache" / "mrcore" / "environments").iterdir())) == 1
    (project / "map_functions.py").write_text("def shout(line, aux): raise ValueError('no')\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("mrcore: map function shout failed")
    done = subprocess.run([*command, "--aux", "in.txt"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "is no JSON" in done.stderr
