"""What machines answer to Ansible may be damaged or hostile: the machine is named, the others are not concerned."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
PYTHON = "/usr/bin/python3"


def load(name: str) -> Any:
    """A filter plugin of Ansible as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_answers", PROJECT / f"ansible/filter_plugins/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


machines, doctor, day_two = load("machines"), load("doctor"), load("day_two")
FIT: dict[str, Any] = {
    "skew_seconds": 0.3, "python": [3, 11, 2], "os_id": "debian", "os_version": "12", "systemd": True,
    "machine": "x86_64", "glibc": "2.36", "disk_free_bytes": 50 << 30, "address_is_here": True, "ports_taken": [],
    "unknown_users": [], "release": None, "configured": False, "authority": "",
}  # fmt: skip
HOST = {"python": PYTHON, "compute_dir": "/c", "min_free_bytes": 1 << 30, "cluster_ip": "10.0.0.1"}
CLUSTER = {
    "master": "m1", "nodes": ["w1", "w2"], "hosts": dict.fromkeys(("m1", "w1", "w2"), HOST), "pki_dir": "/p",
    "max_clock_skew_seconds": 60,
}  # fmt: skip


def answer(text: str, **result: Any) -> dict[str, Any]:
    return {"rc": 0, "stdout": text} | result


def judged(result: Any, w1: Any = None) -> list[str]:
    """The faults when w2 gives this result; every one is a sentence without anything that a terminal obeys."""
    fit = answer(json.dumps(FIT))
    results = {"m1": answer(json.dumps(FIT | {"configured": True})), "w1": w1 or fit, "w2": result}
    faults: list[str] = machines.mrcore_machines(results, CLUSTER, "", "1-a", ())["faults"]
    for fault in faults:
        assert fault.endswith(".") and fault.isprintable() and len(fault) < 800, fault
    return faults


def test_a_fit_machine_has_no_fault() -> None:
    assert judged(answer(json.dumps(FIT))) == []


@pytest.mark.parametrize("key", FIT)
def test_an_answer_that_lacks_a_key_names_the_machine_and_the_key(key: str) -> None:
    (fault,) = judged(answer(json.dumps({each: FIT[each] for each in FIT if each != key})))
    assert fault == f"Host w2 gave an answer without {key}: see what {PYTHON} is there."


WRONG = [None, "x\n\x1b[2J", -1, 1.5, True, [], {}, [None], ["a\x07"], [[1]], {"a": 1}, "../../x", "9" * 5000, 1 << 70]


@pytest.mark.parametrize("key", FIT)
def test_a_value_of_a_wrong_kind_names_the_machine_and_is_never_an_error(key: str) -> None:
    for value in [*WRONG, float("nan"), float("inf")]:
        faults = judged(answer(json.dumps(FIT | {key: value})))
        assert all("w2" in fault for fault in faults), faults
        if isinstance(value, bool) and isinstance(FIT[key], bool):
            continue
        may_be = {"skew_seconds": (int, float), "release": (str, type(None))}.get(key, type(FIT[key]))
        if not isinstance(value, may_be) or isinstance(value, bool):
            assert any(f"w2 gave an answer that cannot be ({key}: " in fault for fault in faults), (value, faults)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (answer("{"), "gave an answer that is none ({)"),
        (answer("{" * 100_000), "gave an answer that is none"),
        (answer('{"a":' * 50_000), "gave an answer that is none"),
        (answer('{"a": ' + "9" * 100_000 + "}"), "gave an answer"),
        (answer('{"skew_seconds": 1'), "gave an answer that is none"),
        (answer("{}"), "without skew_seconds"),
        (answer("{\x1b[2J}"), "gave an answer that is none"),
        (answer("[1]\n", rc=1), "let nothing be run as root"),
        (answer("", rc=127), "has no /usr/bin/python3"),
        (answer("Traceback (most recent call last):\n  x\nFileNotFoundError: /etc/os-release\n", rc=1),
         "could not be looked at (FileNotFoundError: /etc/os-release)"),
        ({"rc": 1, "stderr": "Traceback (most recent call last):\n  x\nKeyError: 'ID'"}, "looked at (KeyError: 'ID')"),
        ({"unreachable": True, "msg": "no\x1b[2J route\n"}, "cannot be reached (no?[2J route)"),
        ({"unreachable": True, "msg": "x" * 100_000}, "cannot be reached"),
        ({}, "let nothing be run as root"),
        ({"stdout": None, "rc": None}, "let nothing be run as root"),
        (None, "was not asked"),
        ("text", "was not asked"),
        ([], "was not asked"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_told_with_the_machines_name(result: Any, said: str) -> None:
    (fault,) = judged(result)
    assert fault.startswith("Host w2 ") and said in fault, fault


def test_the_faults_of_all_machines_come_at_once() -> None:
    faults = judged(answer("{}"), w1=answer(json.dumps(FIT | {"systemd": 1})))
    assert [fault.split()[1] for fault in faults] == ["w1", "w2"]


def test_the_probe_gives_what_the_table_wants() -> None:
    asked = {"address": "127.0.0.1", "compute_dir": "/var/lib/none", "ports": [], "users": ["root", "nobody-at-all"]}
    done = subprocess.run(
        [sys.executable, str(PROJECT / "roles/common/files/probe.py"), "0", json.dumps(asked)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found.keys() == machines.ANSWER.keys()
    assert all(accepts(found[key]) for key, accepts in machines.ANSWER.items()), found


# ---- the doctor


@pytest.mark.parametrize("facts", [{}, {"release": None}, {"release": []}, [], "text", {"release": {"current": 5}}])
def test_the_doctor_judges_the_others_when_one_machine_answers_nonsense(facts: Any) -> None:
    cluster = CLUSTER | {"certificate_renew_days": 30}
    cluster["hosts"] = {name: HOST | {"servers": 1, "agent_port": 1} for name in ("m1", "w1")}
    silent = {"unreachable": True, "msg": "no route"}
    for results in ({"m1": {"facts": facts}, "w1": silent}, {"m1": silent, "w1": {"facts": facts}}):
        found = doctor.findings(cluster, results, "prod")
        told = {each["where"]: each["what"] for each in found}
        assert set(told) == {"m1", "w1"}
        assert any("gave no answer about" in each["what"] for each in found), found
        assert any("does not answer" in each["what"] for each in found)
        assert "gave no answer about" in doctor.report(found)


# ---- collected logs


def archive(*members: tuple[str, bytes | str]) -> bytes:
    """A tar.gz; text is where a symbolic link leads."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        for name, content in members:
            told = tarfile.TarInfo(name)
            if isinstance(content, str):
                told.type, told.linkname = tarfile.SYMTYPE, content
                tar.addfile(told)
            else:
                told.size = len(content)
                tar.addfile(told, io.BytesIO(content))
    return target.getvalue()


def special(kind: bytes, **more: Any) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as tar:
        told = tarfile.TarInfo("x")
        told.type = kind
        for key, value in more.items():
            setattr(told, key, value)
        tar.addfile(told)
    return target.getvalue()


def header_that_claims(size: int, kind: bytes) -> bytes:
    told = tarfile.TarInfo("x")
    told.type, told.size = kind, size
    return gzip.compress(told.tobuf(tarfile.GNU_FORMAT) + b"0" * min(size, 8 << 20))


GOOD = archive(("./system.txt", b"fine\n"), ("./logs/var/a b\nc/S_0.log", b"log\n"))
BAD: dict[str, tuple[bytes, str]] = {
    "no archive": (b"text", "cannot be read"),
    "empty": (b"", "cannot be read"),
    "cut off": (GOOD[:-40], "cannot be read"),
    "damaged": (GOOD[:60] + b"\xff\xff\xff" + GOOD[63:], "cannot be read"),
    "gzip of text": (gzip.compress(b"text" * 1000), "cannot be read"),
    "out by ..": (archive(("../../etc/x", b"x")), "leads out of it"),
    "absolute": (archive(("/etc/x", b"x")), "leads out of it"),
    "link": (archive(("a", "/etc/passwd"), ("a", b"x")), "is no plain file"),
    "hard link": (special(tarfile.LNKTYPE, linkname="/etc/passwd"), "is no plain file"),
    "device": (special(tarfile.CHRTYPE, devmajor=1, devminor=3), "is no plain file"),
    "fifo": (special(tarfile.FIFOTYPE), "is no plain file"),
    "key": (archive(("a/node.txt", b"-----BEGIN PRIVATE KEY-----")), "a private key is in a/node.txt"),
    "too many": (archive(*((f"f{number}", b"") for number in range(5001))), "it holds more than"),
    "too large": (archive(("zeros", bytes(65 << 20))), "it holds more than"),
    "a name of gigabytes": (header_that_claims(6 << 30, tarfile.GNUTYPE_LONGNAME), "cannot be read"),
    "a header of gigabytes": (header_that_claims(6 << 30, tarfile.XHDTYPE), "cannot be read"),
    "many bad headers": (gzip.compress(gzip.decompress(header_that_claims(8 << 10, tarfile.XHDTYPE)) * 3), "cannot be"),
    "escapes": (archive(("\x1b[2J/../x", b"x")), r"the name \x1b[2J/../x in it"),
}


def put_together(folder: Path, reasons: dict[str, str], **sent: bytes | None) -> tuple[int, str, dict[str, bytes]]:
    """Exit status, output and the files of the one archive, without its own name."""
    came = folder / "came"
    came.mkdir()
    for host, content in sent.items():
        if content is not None:
            (came / f"{host}.tar.gz").write_bytes(content)
    target = folder / "out/mrcore-logs-c-1.tar.gz"
    command = [sys.executable, str(PROJECT / "ansible/files/put_together.py"), str(came), str(target)]
    done = subprocess.run([*command, json.dumps(reasons), *sent], capture_output=True, text=True, timeout=120)
    assert done.stderr == "" and not came.exists()
    assert target.stat().st_mode & 0o077 == 0
    with tarfile.open(target) as tar:
        files = {each.name.partition("/")[2]: tar.extractfile(each) for each in tar.getmembers()}
        return done.returncode, done.stdout, {name: stream.read() for name, stream in files.items() if stream}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_archive_takes_no_other_away_and_is_named_with_its_reason(tmp_path: Path, kind: str) -> None:
    content, why = BAD[kind]
    status, output, files = put_together(tmp_path, {}, m1=GOOD, w1=content, w2=GOOD)
    assert status == 1
    assert files.keys() == {
        "m1/system.txt", "m1/logs/var/a b\nc/S_0.log", "w1/missing.txt", "w2/system.txt", "w2/logs/var/a b\nc/S_0.log",
    }  # fmt: skip
    assert files["w2/logs/var/a b\nc/S_0.log"] == b"log\n"
    last = output.splitlines()[-1]
    assert last.startswith("not in it, w1: its archive was left out, ") and why in last and last.isprintable()
    assert "4 files of m1 w2" in output and why in files["w1/missing.txt"].decode()


def test_who_did_not_answer_and_who_failed_are_told_apart(tmp_path: Path) -> None:
    status, output, files = put_together(tmp_path, {"w2": "disk\nfull\x1b"}, m1=GOOD, w1=None, w2=None)
    assert status == 1
    assert output.splitlines()[-2:] == [
        "not in it, they did not answer: w1",
        r"not in it, w2: it sent none: disk\nfull\x1b",
    ]
    assert files["w1/missing.txt"] == b"did not answer when the logs were collected\n"


def test_without_a_fault_the_status_is_0_also_with_a_silent_machine(tmp_path: Path) -> None:
    status, output, files = put_together(tmp_path, {"m1": "", "w1": ""}, m1=GOOD, w1=None)
    assert status == 0 and "not in it, they did not answer: w1" in output and "m1/system.txt" in files


def test_an_archive_is_made_even_when_no_machine_sent_one(tmp_path: Path) -> None:
    status, output, files = put_together(tmp_path, {"m1": "no bash"}, m1=None)
    assert status == 1 and files.keys() == {"m1/missing.txt"} and "no bash" in output


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ({}, "no reason given"),
        ({"__collect_archive": {"unreachable": True, "msg": "no route"}}, ""),
        ({"__collect_archive": {"rc": 1, "stderr": "mktemp: no space\n"}, "__collect_fetched": {"skipped": True}},
         "mktemp: no space"),
        ({"__collect_archive": {"rc": 0, "stdout": "junk"}, "__collect_fetched": {"skipped": True}}, "junk"),
        ({"__collect_archive": {"rc": 0, "stdout": "/x"}, "__collect_fetched": {"msg": "file not found"}},
         "file not found"),
        ({"__collect_archive": {"rc": 0, "stdout": "/x"}, "__collect_fetched": {"checksum": "ab"}}, ""),
        ({"__collect_archive": {"rc": 0, "stdout": "/x"}, "__collect_fetched": {"unreachable": True}}, ""),
    ],
)  # fmt: skip
def test_why_a_machine_sent_nothing(host: dict[str, Any], why: str) -> None:
    assert day_two.why_nothing_came(host) == why


def test_no_machine_ends_the_collecting_of_the_others() -> None:
    """Whatever a task on the machines does, the play goes on; and only a path of ours is removed on one."""
    gather, _ = yaml.safe_load((PROJECT / "ansible/collect_logs.yml").read_text())[1:]
    tasks = gather["tasks"][1:]
    assert gather["ignore_unreachable"] and all(task["failed_when"] is False for task in tasks)
    assert [("match('/var/tmp/mrcore-collect" in task.get("when", "")) for task in tasks] == [False, True, True]
