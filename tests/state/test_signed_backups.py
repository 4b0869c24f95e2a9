"""A backup runs scripts on the master once it is restored: whose word it is, what it may hold, and who is asked."""

from __future__ import annotations

import gzip
import io
import json
import os
import sqlite3
import stat
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backups import contents, rewritten
from commands import mrcore, on_terminal
from people import TOP, People

from mrcore.errors import UsageError
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.state import backup
from mrcore.wire import pki


@pytest.fixture
def config(home: Path) -> Path:
    path = home.parent / "config.json"
    path.write_text("{}")
    return path


@pytest.fixture
def kept(settings: Settings, scheduler: Scheduler, projects_dir: Path, tmp_path: Path) -> Path:
    """A signed backup of a queue with a script in it."""
    script = tmp_path / "nightly.sh"
    script.write_text("true\n")
    scheduler.submit_job({"job_type": "script", "job_name": "nightly", "script_location": str(script)})
    file = tmp_path / "kept.backup"
    backup.backup(settings, file)
    return file


def unpacked(file: Path) -> bytes:
    """The tar of a signed backup."""
    return file.read_bytes().split(b"\n", 1)[1]


def test_the_key_is_closed_and_made_once(kept: Path, settings: Settings, tmp_path: Path) -> None:
    key = settings.pki_dir / "backup.key"
    assert (stat.S_IMODE(key.stat().st_mode), stat.S_IMODE(kept.stat().st_mode)) == (0o600, 0o600)
    before = key.read_bytes()
    backup.backup(settings, tmp_path / "second")
    assert key.read_bytes() == before
    assert tarfile.open(fileobj=io.BytesIO(unpacked(kept))).getnames()[:2] == ["backup.json", "queue.sqlite"]


@pytest.mark.parametrize(
    "where", ["signature", "start", "middle", "end", "cut", "longer", "none", "other key", "swapped"]
)
def test_what_was_changed_is_refused_by_name_and_changes_nothing(
    kept: Path, settings: Settings, tmp_path: Path, where: str
) -> None:
    before, content = contents(settings), bytearray(kept.read_bytes())
    head = content.index(b"\n") + 1
    place = {"signature": head - 3, "start": head, "middle": len(content) // 2, "end": len(content) - 1}
    if where in place:
        content[place[where]] ^= 1
    elif where == "other key":
        (settings.pki_dir / "backup.key").unlink()
        pki.make_backup_key(settings.pki_dir)
    elif where == "swapped":  # the signature of another backup of this cluster
        backup.backup(settings, tmp_path / "other")
        content[:head] = (tmp_path / "other").read_bytes()[:head]
    else:
        content = {"cut": content[:-1], "longer": content + b"\0", "none": content[head:]}[where]
    kept.write_bytes(content)
    why = "not signed" if where == "none" else "(signature is wrong|not signed)"
    with pytest.raises(UsageError, match=rf"cannot restore .*kept\.backup: .*{why}"):
        backup.restore(settings, kept, force=True)
    assert contents(settings) == before
    assert not [path for path in settings.state_dir.iterdir() if path.name.startswith("restore")]
    code, _, err = mrcore("restore", str(kept), "--force", "--yes")
    assert code == 2 and "kept.backup" in err


def test_without_the_key_that_tells_it_nothing_is_restored(kept: Path, settings: Settings) -> None:
    (settings.pki_dir / "backup.pub").unlink()
    with pytest.raises(UsageError, match=r"cannot read the key .*backup\.pub: No such file"):
        backup.restore(settings, kept, force=True)
    pki.make_backup_key(settings.pki_dir)  # which follows from the other
    assert backup.restore(settings, kept, force=True)["jobs"]


def test_an_edited_queue_is_restored_only_by_whoever_says_so(kept: Path, settings: Settings, tmp_path: Path) -> None:
    evil = tmp_path / "evil.backup"
    edited = tmp_path / "edited.sqlite"
    with tarfile.open(fileobj=io.BytesIO(unpacked(kept))) as source, tarfile.open(evil, "w:gz") as target:
        for member in source:
            content = source.extractfile(member)
            assert content
            data = content.read()
            if member.name == "queue.sqlite":
                edited.write_bytes(data)
                with sqlite3.connect(edited) as db:
                    (spec,) = db.execute("SELECT spec FROM jobs").fetchone()
                    changed = json.loads(spec) | {"script_location": "/tmp/evil\x1b[2J.sh", "job_submitter": "x\ny"}
                    db.execute("UPDATE jobs SET spec = ?", (json.dumps(changed),))
                db.close()
                data = member_of(member, edited.read_bytes())
            target.addfile(member, io.BytesIO(data))
    for file in (evil, tmp_path / "resigned"):
        if file.name == "resigned":  # the old signature before it
            file.write_bytes(kept.read_bytes().split(b"\n", 1)[0] + b"\n" + evil.read_bytes())
        before = contents(settings)
        assert mrcore("restore", str(file), "--force", "--yes")[0] == 2
        code, _, err = mrcore("restore", str(file), "--force", "--unverified")
        assert code == 2 and "nightly: script, /tmp/evil\\x1b[2J.sh, submitted by x\\ny" in err
        assert contents(settings) == before
        assert mrcore("restore", str(file), "--force", "--unverified", "--yes")[0] == 0
        assert Scheduler(settings).show("nightly")["job"]["script_location"].startswith("/tmp/evil")


def member_of(member: tarfile.TarInfo, data: bytes) -> bytes:
    member.size = len(data)
    return data


def test_a_restore_says_what_would_run_and_asks(kept: Path, settings: Settings) -> None:
    before = contents(settings)
    status, seen = on_terminal("n", "restore", str(kept), "--force")
    assert status == 1 and "nightly: script, " in seen and "nothing was done" in seen
    assert contents(settings) == before
    status, seen = on_terminal("y", "restore", str(kept), "--force")
    assert status == 0 and "restored as of" in seen


def test_another_home_with_the_key_takes_it(kept: Path, settings: Settings, tmp_path: Path) -> None:
    other = settings.model_copy(update={"state_dir": tmp_path / "new", "pki_dir": tmp_path / "keys"})
    with pytest.raises(UsageError, match=r"backup\.pub"):
        backup.restore(other, kept)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "backup.pub").write_bytes((settings.pki_dir / "backup.pub").read_bytes())
    assert [each["job_name"] for each in backup.restore(other, kept)["jobs"]] == ["nightly"]


# --- What is too much ------------------------------------------------------------------------------------------------


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, kind
    return made


class Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


HOSTILE: dict[str, Callable[[tarfile.TarFile], object]] = {
    "a large member": lambda archive: archive.addfile(member("manifests/a/1.json", 64 << 20), Zeros()),
    "a large header": lambda archive: archive.addfile(member("x", 64 << 20, tarfile.XHDTYPE), Zeros()),
    "a long name": lambda archive: archive.addfile(member("x", 64 << 20, tarfile.GNUTYPE_LONGNAME), Zeros()),
    "a member twice": lambda archive: archive.addfile(member("queue.sqlite", 512), Zeros()),
    "a device": lambda archive: archive.addfile(member("manifests/a/1.json", 0, tarfile.CHRTYPE)),
    "a link": lambda archive: archive.addfile(member("manifests/a/1.json", 0, tarfile.SYMTYPE)),
    "many members": lambda archive: [archive.addfile(member(f"manifests/a/{n}.json", 0)) for n in range(300)],
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_bomb_is_refused_before_it_grows(
    kept: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(backup, "MAX_UNPACKED_BYTES", 16 << 20)
    monkeypatch.setattr(backup, "MAX_MEMBERS", 200)
    before, file = contents(settings), rewritten(settings, tmp_path, HOSTILE[how])
    assert file.stat().st_size < 1 << 20
    with pytest.raises(UsageError, match=r"cannot restore .*hostile\.backup: "):
        backup.restore(settings, file, force=True, verify=False)
    assert contents(settings) == before
    assert not [path for path in settings.state_dir.iterdir() if path.name.startswith("restore")]


@pytest.mark.parametrize("what", ["fifo", "folder", "zeros", "empty gzip", "truncated sqlite"])
def test_what_is_no_backup_at_all(settings: Settings, scheduler: Scheduler, tmp_path: Path, what: str) -> None:
    file = tmp_path / "odd"
    if what == "fifo":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    else:
        file.write_bytes(gzip.compress(b"") if what == "empty gzip" else bytes(1000))
    begun = time.monotonic()
    for verify in (True, False):
        with pytest.raises(UsageError, match=r"cannot restore .*odd: "):
            backup.restore(settings, file, verify=verify)
    assert time.monotonic() - begun < 60


# --- A master whose jobs run as another user than root ---------------------------------------------------------------


@pytest.fixture(scope="module")
def people() -> Iterator[People]:
    made = People()
    settings = {
        "user": "mrcore", "home": f"{TOP}/home/mrcore", "projects_dir": f"{TOP}/projects", "pki_dir": f"{TOP}/keys/pki",
        "nodes": [{"name": "a", "address": "127.0.0.9", "servers": 1, "compute_dir": f"{TOP}/compute"}],
    }  # fmt: skip
    made.shell(f"cat >{TOP}/cluster.json", json.dumps(settings))
    made.shell(f"mkdir -p {TOP}/keys/pki && chmod 755 {TOP}/keys {TOP}/keys/pki")
    made.shell(f"install -d -o mrcore -m 700 {TOP}/kept; mkdir -p {TOP}/home/root")
    code = f"from mrcore.wire import pki; from pathlib import Path; pki.make_backup_key(Path('{TOP}/keys'))"
    made.shell(f'{sys.executable} -c "{code}" && chmod 400 {TOP}/keys/backup.key')
    yield made
    made.close()


@pytest.mark.needs_root
def test_only_root_signs_and_the_file_is_the_users(people: People) -> None:
    text = json.dumps({"job_type": "script", "job_name": "s", "script_location": f"{TOP}/home/mrcore/x.py"})
    people.shell("chmod 711 ~; echo 'print(1)' >~/x.py", user="mrcore")
    assert people.mrcore("mrcore", "submit", "-", input=text).returncode == 0
    done = people.mrcore("root", "backup", f"{TOP}/kept/by-root", "--keep", "3")
    assert done.returncode == 0 and "1 jobs" in done.stderr, done.stderr
    assert people.shell(f"stat -c '%U %a' {TOP}/kept/by-root") == "mrcore 600\n"
    done = people.mrcore("mrcore", "backup", f"{TOP}/kept/by-mrcore")
    assert done.returncode == 0 and "not signed" in done.stderr
    done = people.mrcore("mrcore", "restore", f"{TOP}/kept/by-mrcore", "--force", "--yes")
    assert done.returncode == 2 and "it is not signed" in done.stderr
    for user in ("root", "mrcore"):
        done = people.mrcore(user, "restore", f"{TOP}/kept/by-root", "--force", "--yes", input="")
        assert done.returncode == 0 and "submitted by" in done.stderr, done.stderr
    for user in ("mrcore", "alice"):
        with pytest.raises(AssertionError):
            people.shell(f"cat {TOP}/keys/backup.key", user=user)
    people.shell(f"echo x >>{TOP}/kept/by-root", user="mrcore")
    done = people.mrcore("root", "restore", f"{TOP}/kept/by-root", "--force", "--yes")
    assert done.returncode == 2 and "its signature is wrong" in done.stderr


@pytest.mark.needs_root
def test_a_backup_that_fails_as_the_user_is_not_signed(people: People) -> None:
    done = people.mrcore("root", "backup", f"{TOP}/no/such/folder")
    assert done.returncode == 1 and "No such file" in done.stderr
