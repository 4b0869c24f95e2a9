"""Who is trusted as what: every wrong identity against every verb of running daemons, and as a server to the master."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from by_name import ByName
from clusters import TestCluster
from conditions import wait_until
from daemons import free_port, made_spec, own_address
from forged import BOTH, IDENTITIES, NODE, Forger

from mrcore.errors import MrcoreError, Refused, Unreachable, UsageError
from mrcore.launchers import local
from mrcore.messages.methods import HEALTH
from mrcore.node.cluster_server import ClusterServer
from mrcore.node.node_agent import NodeAgent
from mrcore.wire import pki
from mrcore.wire.client import Client
from mrcore.wire.data import DataClient
from mrcore.wire.members import Membership, read_membership
from mrcore.wire.service import Method, Server
from mrcore.wire.tls import Pki, master_pki

GETS: list[dict[str, Any]] = [
    {"run": {"job": "gated", "run": 1, "id": "x", "partition": 0}},
    {"part": {"job": "gated", "name": "part-000001-00000-00000.data"}},
    {"file": ["x", 0, 0]},
]
PUTS: list[dict[str, Any]] = [{"project": "0" * 32}, {"environment": "0" * 32}, {"batch": ["x", 1]}]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    with TestCluster(tmp_path_factory.mktemp("identities"), nodes=2, servers=1) as started:
        yield started


@pytest.fixture(scope="module")
def forger(cluster: TestCluster, tmp_path_factory: pytest.TempPathFactory) -> Forger:
    """All IDENTITIES, listed or denied at both nodes as they are to be, even those that should never be listed."""
    settings = cluster.settings
    mark = local.cluster_id(settings.home)
    forger = Forger(tmp_path_factory.mktemp("forged"), settings.pki_dir, settings.nodes[1].layout.pki_dir, mark)
    for what, about in IDENTITIES.items():
        forger(what, about, ("node-1", settings.nodes[1].address))
    for node in settings.nodes:
        forger.enter(node.compute_dir / "members.json")
    return forger


def verbs(tmp_path: Path) -> dict[str, list[str]]:
    spec = made_spec(tmp_path)
    return {"agent": list(NodeAgent(spec).methods()), "server": list(ClusterServer(spec, None).methods())}  # type: ignore[arg-type]


def outcome(client: Client | DataClient, ask: Any) -> MrcoreError | None:
    with contextlib.closing(client):
        try:
            ask(client)
        except MrcoreError as error:
            return error
    return None


@pytest.mark.parametrize("what", IDENTITIES)
def test_no_wrong_identity_gets_anything(cluster: TestCluster, forger: Forger, what: str, tmp_path: Path) -> None:
    keys = forger(what, IDENTITIES[what], ())
    node = cluster.settings.nodes[0]
    for daemon, names in verbs(tmp_path).items():
        port = node.agent_port if daemon == "agent" else node.server_port
        for name in [*names, "nope"]:
            found = outcome(ByName(node.address, port, keys, node.name, 10, 10), lambda client: client.call(name))  # noqa: B023
            assert isinstance(found, Refused | Unreachable), f"{daemon}.{name}: {found!r}"
            assert "failed at" not in found.message and "has no method" not in found.message, f"{name}: {found!r}"
    for request in GETS:
        found = outcome(
            DataClient(node.address, node.agent_port, keys, node.name, 10),
            lambda client: client.get([request], lambda *_: None),  # noqa: B023
        )
        assert isinstance(found, Refused | Unreachable) and "has no" not in found.message, f"GET {request}: {found!r}"
    for request in PUTS:
        found = outcome(
            DataClient(node.address, node.agent_port, keys, node.name, 10),
            lambda client: client.put(request, b"x"),  # noqa: B023
        )
        assert isinstance(found, Refused | Unreachable) and "not taken" not in found.message, (
            f"PUT {request}: {found!r}"
        )


def test_a_node_gets_its_health_and_bytes_and_nothing_else(
    cluster: TestCluster, forger: Forger, tmp_path: Path
) -> None:
    node, other = cluster.settings.nodes
    keys = Pki(other.layout.pki_dir, "node", other.compute_dir / "members.json")
    for daemon, names in verbs(tmp_path).items():
        port = node.agent_port if daemon == "agent" else node.server_port
        for name in names:
            found = outcome(ByName(node.address, port, keys, node.name, 10, 10), lambda client: client.call(name))  # noqa: B023
            if name == "health":
                assert found is None
            else:
                assert isinstance(found, Refused) and "is the master's to call" in found.message, f"{name}: {found!r}"
    said = []
    for request in GETS:
        found = outcome(
            DataClient(node.address, node.agent_port, keys, node.name, 10),
            lambda client: client.get([request], lambda *_: None),  # noqa: B023
        )
        said.append(found.message if found else "")
    assert "has no run x" in said[0] and "has no part" in said[1] and "not served to a node" in said[2], said
    for request in PUTS:
        found = outcome(
            DataClient(node.address, node.agent_port, keys, node.name, 10),
            lambda client: client.put(request, b"x"),  # noqa: B023
        )
        assert isinstance(found, Refused) and "not taken from a node" in found.message


def test_the_master_may_call_all(cluster: TestCluster, forger: Forger) -> None:
    for node in cluster.settings.nodes:
        keys = master_pki(cluster.settings)
        assert outcome(ByName(node.address, node.agent_port, keys, node.name), lambda each: each.call("health")) is None
        assert outcome(ByName(node.address, node.server_port, keys, node.name), lambda each: each.call("hello")) is None


# --- the other side: whom the master, and a node that fetches, take for a node ----------------------------------------

SERVERS: dict[str, tuple[dict[str, Any], str]] = {
    "unlisted": (NODE, "not on this cluster's list"),
    "denied": (NODE | {"denied": True}, "was withdrawn"),
    "of another cluster": (NODE | {"o": "another"}, "is of the cluster 'another'"),
    "of no cluster": (NODE | {"o": None}, "is of the cluster ''"),
    "with the master's role": ({"cn": "node-1"}, "a master, not the node node-1"),
    "another node's": (NODE | {"cn": "node-0"}, "there answers node-0"),
    "of no member": (NODE | {"cn": "node-9"}, "there answers node-9"),
    "without a role": (NODE | {"ou": None}, "names no holder or no role"),
    "of two roles": (NODE | {"first_ou": "master"}, "names no holder or no role"),
    "expired": (NODE | {"days": (-30, -1)}, "certificate has expired"),
    "for clients only": (NODE | {"purposes": BOTH[1:]}, "certificate"),
    "of another name": (NODE | {"names": ("other",)}, "no acceptable certificate"),
    "for any name": (NODE | {"names": ("*",)}, "no acceptable certificate"),
    "self-signed": (NODE | {"signer": None}, "certificate"),
    "of another authority": (NODE | {"signer": "other"}, "certificate"),
    "signed by a node": (NODE | {"signer": "node"}, "certificate"),
}


@pytest.mark.parametrize("what", SERVERS)
@pytest.mark.parametrize("kind", [Client, DataClient])
def test_no_wrong_server_is_taken_for_a_node(
    cluster: TestCluster, forger: Forger, what: str, kind: type[Client] | type[DataClient]
) -> None:
    about, why = SERVERS[what]
    address = own_address()
    keys = forger(f"server {what}", about, ("node-1", address))
    asked: list[str] = []
    everybody = Membership({("node", "node-0"): None, ("node", "node-1"): None})
    methods = {"health": Method(lambda caller: asked.append("health"), "member")}
    server = Server(address, free_port(address), keys, lambda: everybody, methods)
    server.start()
    members = forger.folder / f"members of {what}.json"
    listed = read_membership(cluster.settings.members_file)
    denied = [forger.serials[f"server {what}"]] if about.get("denied") else []
    plain = json.loads(cluster.settings.members_file.read_text())
    if what != "unlisted":
        plain["members"]["node-1"]["serials"].append(forger.serials[f"server {what}"])
    members.write_text(json.dumps(plain | {"denied": denied}))
    try:
        for mine in (
            Pki(cluster.settings.pki_dir, "master", members),
            Pki(cluster.settings.nodes[0].layout.pki_dir, "node", members),
        ):
            with contextlib.closing(kind(address, server.port, mine, "node-1", 10)) as client:
                with pytest.raises((Refused, Unreachable), match=why) as refused:
                    client.call(HEALTH) if isinstance(client, Client) else client.get(GETS, lambda *_: None)
                assert not isinstance(refused.value, UsageError)
        assert not asked and listed.cluster == local.cluster_id(cluster.settings.home)
    finally:
        server.close()


def test_two_clusters_with_one_authority_do_not_trust_each_other(cluster: TestCluster, tmp_path: Path) -> None:
    """Somebody copied pki/ to begin a second cluster with it: same authority, same key."""
    home = tmp_path / "home"
    shutil.copytree(cluster.settings.pki_dir, home / "pki")
    first = own_address()
    second = local.configure(home, nodes=1, servers=1, address=first, memory_bytes=256 << 20)
    try:
        local.start_cluster(second)
        theirs, ours = second.nodes[0], cluster.settings.nodes[0]
        for settings, node in ((cluster.settings, theirs), (second, ours)):
            keys = master_pki(settings)
            with pytest.raises(Refused, match="is of the cluster"):
                ByName(node.address, node.agent_port, keys, node.name).call("health")
            with pytest.raises(Refused, match="is of the cluster"):  # nor does the node take this master for its own
                ByName(node.address, node.agent_port, Pki(keys.folder, "master"), node.name).call("health")
        assert ByName(theirs.address, theirs.agent_port, master_pki(second), theirs.name).call("health")
        assert ByName(ours.address, ours.agent_port, master_pki(cluster.settings), ours.name).call("health")
    finally:
        local.kill_cluster(second)


# --- connections that are there already -------------------------------------------------------------------------------


def write(file: Path, plain: dict[str, Any]) -> None:
    partial = file.with_suffix(".new")
    partial.write_text(json.dumps(plain))
    partial.replace(file)


def test_a_serial_that_leaves_the_list_loses_its_live_connections(cluster: TestCluster) -> None:
    """On both sides; and who has a certificate that is listed comes back without a restart, on the same client."""
    node, file = cluster.settings.nodes[0], cluster.settings.nodes[0].compute_dir / "members.json"
    before, mine = json.loads(file.read_text()), cluster.settings.members_file
    serial = pki.serial(cluster.settings.pki_dir / "master.crt")
    keys = master_pki(cluster.settings)
    with (
        contextlib.closing(ByName(node.address, node.agent_port, keys, node.name)) as rpc,
        contextlib.closing(DataClient(node.address, node.agent_port, keys, node.name)) as data,
    ):
        assert rpc.call("health")
        with pytest.raises(Refused, match="has no part"):
            data.get(GETS[1:2], lambda *_: None)
        changed = json.loads(json.dumps(before))
        changed["members"]["master"]["serials"] = ["AB"]
        write(file, changed)
        try:
            for _ in range(2):
                with pytest.raises(Refused, match=f"{serial} of master is not on this cluster's list"):
                    rpc.call("health")
                with pytest.raises(Refused, match=f"{serial} of master is not on this cluster's list"):
                    data.get(GETS[1:2], lambda *_: None)
        finally:
            write(file, before)
        assert rpc.call("health")

        listed = json.loads(mine.read_text())  # and the same for what the server showed
        changed = json.loads(json.dumps(listed))
        changed["members"][node.name]["serials"] = ["AB"]
        write(mine, changed)
        try:
            with pytest.raises(Refused, match=f"of {node.name} is not on this cluster's list"):
                rpc.call("health")
            with pytest.raises(Refused, match=f"of {node.name} is not on this cluster's list"):
                data.get(GETS[1:2], lambda *_: None)
        finally:
            write(mine, listed)
        assert rpc.call("health")


def test_a_rotation_disturbs_nobody_and_leaves_nothing_of_before(cluster: TestCluster, tmp_path: Path) -> None:
    """Both are listed, then the new ones take the place of the former, then the former go: on live connections."""
    settings, node = cluster.settings, cluster.settings.nodes[0]
    files = [settings.members_file, *(each.compute_dir / "members.json" for each in settings.nodes)]
    before = [json.loads(file.read_text()) for file in files]
    stolen = tmp_path / "stolen"
    shutil.copytree(settings.pki_dir, stolen)
    shutil.copytree(node.layout.pki_dir, tmp_path / "stolen-node")
    mark = local.cluster_id(settings.home)
    holders: list[tuple[Any, ...]] = [("master", settings.pki_dir, "master", "master", [])]
    holders += [("node", each.layout.pki_dir, each.name, "node", [each.address]) for each in settings.nodes]
    with contextlib.closing(ByName(node.address, node.agent_port, master_pki(settings), node.name)) as client:
        assert client.call("health")
        fresh = {}
        for role, folder, name, stem, addresses in holders:
            fresh[name] = pki.issue(settings.pki_dir, tmp_path / name, stem, name, role, addresses, mark), folder, stem
        for file, plain in zip(files, before, strict=True):
            both = json.loads(json.dumps(plain))
            for name, (serial, _, _) in fresh.items():
                both["members"][name]["serials"].append(serial)
            write(file, both)
        assert client.call("health")
        for name, (_, folder, stem) in fresh.items():
            for suffix in ("key", "crt"):
                (tmp_path / name / f"{stem}.{suffix}").replace(folder / f"{stem}.{suffix}")
            assert client.call("health"), f"{name} has its new pair"
        for file, plain in zip(files, before, strict=True):
            new = json.loads(json.dumps(plain))
            for name, (serial, _, _) in fresh.items():
                new["denied"] += new["members"][name]["serials"]
                new["members"][name]["serials"] = [serial]
            write(file, new)
        assert client.call("health")
        shown = client._stream
        assert shown is not None and shown.sock.getpeercert()["serialNumber"].lstrip("0") == fresh[node.name][0]
    for keys in (Pki(stolen, "master"), Pki(tmp_path / "stolen-node", "node")):
        with pytest.raises(Refused, match="was withdrawn"):
            ByName(node.address, node.agent_port, keys, node.name).call("health")
    cluster.write_inputs({"a": "one two two\n", "b": "two\n"})
    wait_until(lambda: cluster.run(cluster.job())["parts"], 60)
    assert sorted(cluster.items()) == [["one", 1], ["two", 3]]


def test_the_list_of_an_older_release_lets_in_by_name_until_the_new_one_comes(cluster: TestCluster) -> None:
    node, file = cluster.settings.nodes[0], cluster.settings.nodes[0].compute_dir / "members.json"
    before = json.loads(file.read_text())
    other = cluster.settings.nodes[1]
    keys = Pki(other.layout.pki_dir, "node", other.compute_dir / "members.json")
    serial = pki.serial(other.layout.pki_dir / "node.crt")
    try:
        write(file, {"members": ["node-0", "node-1"], "denied": []})
        assert ByName(node.address, node.agent_port, keys, node.name).call("health")
        assert ByName(node.address, node.agent_port, master_pki(cluster.settings), node.name).call("health")
        write(file, {"members": ["node-0", "node-1"], "denied": [serial]})
        with pytest.raises(Refused, match="was withdrawn"):
            ByName(node.address, node.agent_port, keys, node.name).call("health")
        write(file, {"members": ["node-0"], "denied": []})
        with pytest.raises(Refused, match="no member of this cluster"):
            ByName(node.address, node.agent_port, keys, node.name).call("health")
    finally:
        write(file, before)
    assert ByName(node.address, node.agent_port, keys, node.name).call("health")
