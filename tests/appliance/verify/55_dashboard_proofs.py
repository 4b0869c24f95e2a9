"""The dashboard of a deployed master: it runs, on the loopback address only, for those who have its token."""

from __future__ import annotations

import shlex

from harness import ADDRESSES, Machine, Person

PORT = 8643
TOKEN = "/var/lib/mrcore/state/dashboard.token"
ASK = """
import sys, urllib.error, urllib.request
asked = urllib.request.Request(sys.argv[1], headers={"authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2:] else {})
try:
    print(urllib.request.urlopen(asked, timeout=20).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def status(m1: Machine, path: str, *token: str) -> int:
    command = ["/opt/mrcore/current/bin/python", "-c", ASK, f"http://127.0.0.1:{PORT}{path}", *token]
    return int(m1.text(shlex.join(command)))


def test_it_runs_and_comes_back_at_the_next_boot(m1: Machine) -> None:
    assert m1.text("systemctl is-active mrcore-dashboard").strip() == "active"
    assert m1.text("systemctl is-enabled mrcore-dashboard").strip() == "enabled"


def test_it_gains_no_rights(m1: Machine) -> None:
    pid = m1.text("systemctl show --property MainPID --value mrcore-dashboard").strip()
    assert "NoNewPrivs:\t1" in m1.read(f"/proc/{pid}/status")


def test_only_who_has_the_token_sees_something(m1: Machine) -> None:
    assert m1.text(f"stat -c '%a %U' {TOKEN}").split() == ["600", "mrcore"]
    token = m1.read(TOKEN).strip()
    assert [status(m1, path) for path in ("/", "/history", "/static/style.css")] == [403] * 3
    assert [status(m1, path, token) for path in ("/", "/history", "/nodes")] == [200] * 3
    assert status(m1, "/", token[:-1] + ("A" if token[-1] != "A" else "B")) == 403


def test_the_token_is_in_no_log(m1: Machine) -> None:
    token = m1.read(TOKEN).strip()
    assert token not in m1.text("journalctl --no-pager --unit mrcore-dashboard; systemctl cat mrcore-dashboard")


def test_submitters_get_the_address(m1: Machine, anna: Person) -> None:
    told = anna.mrcore("dashboard", "--show-url").stdout.strip()
    assert told == f"http://127.0.0.1:{PORT}/?token={m1.read(TOKEN).strip()}"


def test_nobody_reaches_it_over_the_network(m1: Machine, w1: Machine) -> None:
    places = [line.split()[3] for line in m1.text("ss -lntH").splitlines() if f":{PORT} " in line]
    assert places == [f"127.0.0.1:{PORT}"]
    assert not w1.reaches(f"{w1.lab.net}.{ADDRESSES['m1']}", PORT)
