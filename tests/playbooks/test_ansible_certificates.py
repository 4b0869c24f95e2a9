"""Which certificates count: the list that Ansible writes is the list that daemons read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkout import module

from mrcore.wire.members import Membership, read_membership

plugin = module("ansible/filter_plugins/certificates.py")


def test_the_bundle_is_what_the_folder_holds(tmp_path: Path) -> None:
    assert plugin.mrcore_authority(str(tmp_path)) == ""
    (tmp_path / "ca-previous.crt").write_text("old\n")
    (tmp_path / "ca.crt").write_text("new\n")
    assert plugin.mrcore_authority(str(tmp_path)) == "new\nold\n"


def test_serials_are_told_as_the_daemons_compare_them() -> None:
    assert plugin.mrcore_serial(0x0A1B) == "A1B"


class Controller:
    """The folder of an authority: what was issued, what is denied; and what daemons make of the list."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def issue(self, name: str, *serials: str) -> None:
        for serial in serials:
            file = self.folder / "issued" / name / f"{serial}.crt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def deny(self, serials: list[str]) -> None:
        (self.folder / "denied.json").write_text(json.dumps(serials))

    def listed(self, *nodes: str) -> Membership:
        file = self.folder / "members.json"
        file.write_text(json.dumps(plugin.mrcore_members(str(self.folder), "prod", nodes)))
        return read_membership(file)

    def counts(self, *nodes: str) -> dict[str, set[str]]:
        return {name: set(serials or ()) for (_, name), serials in self.listed(*nodes).holders.items()}


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path)


def test_what_was_issued_counts_unless_it_is_denied(controller: Controller) -> None:
    controller.issue("master", "A1")
    controller.issue("w1", "B1", "B2")
    controller.issue("gone", "C1")
    controller.deny(["B1", "C1"])
    assert controller.counts("w1", "w2") == {"master": {"A1"}, "w1": {"B2"}, "w2": set()}
    found = controller.listed("w1", "w2")
    assert found.cluster == "prod" and found.denied == {"B1", "C1"}
    assert found.objection("master", "master", "A1", "prod") is None
    assert "of the cluster 'test'" in str(found.objection("master", "master", "A1", "test"))
    assert "no member" in str(found.objection("node", "gone", "C2", "prod"))
    assert "no member" in str(found.objection("node", "master", "A1", "prod")), "a role is not another one"


def test_both_count_while_one_takes_the_others_place_and_then_the_new_one_only(controller: Controller) -> None:
    controller.issue("master", "A1")
    controller.issue("w1", "B1")
    controller.issue("w2", "C1")
    present = [{"master": "A1", "w1": "B1"}, {"w2": "C1"}]
    assert plugin.mrcore_replaced(str(controller.folder), present) == []
    for name, serial in (("master", "A2"), ("w1", "B2"), ("w2", "C2")):
        controller.issue(name, serial)
    assert controller.counts("w1", "w2") == {"master": {"A1", "A2"}, "w1": {"B1", "B2"}, "w2": {"C1", "C2"}}
    controller.deny(plugin.mrcore_replaced(str(controller.folder), [{"master": "A2", "w1": "B2"}, {"w2": "C2"}]))
    assert controller.counts("w1", "w2") == {"master": {"A2"}, "w1": {"B2"}, "w2": {"C2"}}


def test_what_a_rotation_that_was_cut_off_made_and_never_brought_goes_too(controller: Controller) -> None:
    controller.issue("w1", "B1", "B2", "B3")
    controller.deny(["F0"])
    assert plugin.mrcore_replaced(str(controller.folder), [{"w1": "B3"}]) == ["B1", "B2", "F0"]


def test_machines_that_a_run_left_out_keep_theirs(controller: Controller) -> None:
    controller.issue("w1", "B1")
    controller.issue("w2", "C1", "C2")
    assert plugin.mrcore_replaced(str(controller.folder), [{"w1": "B1"}]) == []
