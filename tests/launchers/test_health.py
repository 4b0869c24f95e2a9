"""What is said of nodes that do not answer: which, and what starts them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from clusters import TestCluster
from deployed import DEPLOYED

from mrcore.cluster.manage_cluster import ManageCluster, require_answers
from mrcore.errors import ClusterFault, MrcoreError, Refused, Unreachable
from mrcore.launchers import local
from mrcore.settings.config import NodeSettings, load_settings


def refusal(settings: object, **answers: MrcoreError) -> str:
    def ask(node: NodeSettings) -> None:
        if node.name.replace("-", "_") in answers:
            raise answers[node.name.replace("-", "_")]

    with pytest.raises(ClusterFault) as caught:
        require_answers(settings, ask)  # type: ignore[arg-type]
    return caught.value.message


def test_a_deployed_cluster_names_its_nodes_and_both_ways_to_start_them(home: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yml").write_text(DEPLOYED.format(home=home))
    settings = load_settings(tmp_path / "c.yml")
    require_answers(settings, lambda node: None)
    silent = Unreachable("10.0.0.2:45678 did not answer: refused")
    said = refusal(settings, beta=silent)
    assert said.startswith("no answer from beta (10.0.0.2:45678 did not answer: refused): `mrcore cluster start`")
    assert "`make start INVENTORY=…`" in said
    assert refusal(settings, alpha=silent, beta=silent).startswith("no answer from alpha, beta (10.0.0.2")
    assert refusal(settings, alpha=silent, beta=Refused("wrong role")) == "node beta: wrong role"
    assert refusal(settings, alpha=ClusterFault("runs mrcore 2")) == "node alpha: runs mrcore 2"


def test_a_home_in_which_nothing_was_ever_started(home: Path) -> None:
    with pytest.raises(ClusterFault) as caught:
        ManageCluster(load_settings()).check_nodes()
    assert caught.value.message == f"the local cluster of {home} is not started: `mrcore cluster start`"


def test_a_local_cluster_that_ran_whose_agent_is_gone_and_that_is_stopped(tmp_path: Path) -> None:
    with TestCluster(tmp_path, nodes=2, servers=1) as cluster:
        cluster.manager.check_nodes()
        agent = cluster.agent_pid(1)
        with pytest.raises(ClusterFault):  # another fault than silence is told as it is
            require_answers(cluster.settings, lambda node: (_ for _ in ()).throw(ClusterFault("no room")))
        os.kill(agent, signal.SIGKILL)
        said = "the agent of node-1 does not run: `mrcore cluster start` starts what is missing"
        with pytest.raises(ClusterFault, match=said):
            cluster.manager.check_nodes()
        local.start_cluster(cluster.settings)
        cluster.manager.check_nodes()
        local.stop_cluster(cluster.settings)
        with pytest.raises(ClusterFault, match="is not started: `mrcore cluster start`"):
            cluster.manager.check_nodes()
