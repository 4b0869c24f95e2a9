"""Makes one archive of those that came from the machines. Each machine's is judged by itself: a bad one is left out.

    put_together.py FOLDER ARCHIVE REASONS HOST…

FOLDER has HOST.tar.gz of each host that sent one; it is removed. REASONS is JSON: {host: why it sent none}, "" for one
that did not answer. What a machine sends is not trusted: only plain files with names that stay inside are taken, so
many and so large at most, and none that holds a private key. Exit status 1 when a machine's archive was left out or a
machine failed; the archive with those of the others is there all the same.
"""

import gzip
import io
import json
import os
import resource
import shutil
import sys
import tarfile
import time
from pathlib import Path

MAX_ENTRIES = 5000  # of one machine, folders included; collect.sh takes 500 logs
MAX_BYTES = 4 << 30  # unpacked, of one machine: its files are 4 MiB at most each
MAX_FILE_BYTES = 64 << 20
KEY = b"PRIVATE KEY"
MAX_EXTENSION_BYTES = 8 << 10  # a path of Linux has 4 KiB at most
SECONDS = 120  # for the archive of one machine
EXTENSIONS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip
MEMORY_BYTES = 1 << 30  # a header may claim any length


class Bad(Exception):
    """Why a machine's archive is not taken."""


def shown(text):
    """A text of a machine as a part of a line."""
    return ascii(str(text)[:200])[1:-1]


class Member(tarfile.TarInfo):
    """A header of a tar file whose extensions are short: long ones keep tarfile busy for hours."""

    def _proc_member(self, archive):  # the entry point that tarfile leaves to subclasses
        if self.type in EXTENSIONS and self.size > MAX_EXTENSION_BYTES:
            raise Bad(f"it cannot be read: a header of {self.size} bytes")
        return super()._proc_member(archive)


def take(source, host, name, target):
    """Copy a machine's archive into `target`, member by member. Raises Bad. Gives how many files."""
    total = count = entries = 0
    deadline = time.monotonic() + SECONDS
    with gzip.open(source) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
        for member in archive:
            entries, total = entries + 1, total + member.size
            if entries > MAX_ENTRIES or total > MAX_BYTES or member.size > MAX_FILE_BYTES:
                raise Bad(
                    f"it holds more than {MAX_ENTRIES} files, {MAX_BYTES >> 30} GiB or {MAX_FILE_BYTES >> 20} MiB"
                )
            if time.monotonic() > deadline:
                raise Bad(f"it cannot be read within {SECONDS} s")
            if member.isdir():
                continue
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if not member.isreg():
                raise Bad(f"{shown(member.name)} in it is no plain file")
            if member.name.startswith("/") or ".." in parts or not parts or "\0" in member.name:
                raise Bad(f"the name {shown(member.name)} in it leads out of it")
            content = archive.extractfile(member).read()
            if KEY in content:
                raise Bad(f"a private key is in {shown(member.name)}")
            told = tarfile.TarInfo("/".join([name, host, *parts]))
            told.size, told.mtime, told.mode, count = len(content), int(member.mtime), 0o600, count + 1
            target.addfile(told, io.BytesIO(content))
        while rest := stream.read(1 << 20):  # up to its checksum
            total += len(rest)
            if total > MAX_BYTES:
                raise Bad("it goes on behind its end")
    return count


def judge(source, host, name, folder):
    """Unpack and pack a machine's archive into a part of the whole, or give why that cannot be."""
    part = folder / f"{host}.part"
    try:
        with tarfile.open(part, "w") as target:
            return take(source, host, name, target), None
    except Bad as error:
        why = str(error)
    except Exception as error:  # noqa: BLE001  MemoryError, too: whatever this archive does to its reader, the others are kept
        why = f"it cannot be read: {shown(error) or type(error).__name__}"
    part.unlink()
    return 0, why


def add_note(target, name, text):
    content = text.encode()
    told = tarfile.TarInfo(name)
    told.size, told.mode = len(content), 0o600
    target.addfile(told, io.BytesIO(content))


def main(folder, archive, reasons, *hosts):
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    folder, archive = Path(folder), Path(archive)
    name, reasons = archive.name.removesuffix(".tar.gz"), json.loads(reasons)
    files, came, silent, bad = 0, [], [], {}
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as target:
        for host in hosts:
            source, why = folder / f"{host}.tar.gz", reasons.get(host, "")
            if source.is_file():
                count, why = judge(source, host, name, folder)
                if why is None:
                    with tarfile.open(folder / f"{host}.part") as part:
                        for member in part:
                            target.addfile(member, part.extractfile(member))
                    (folder / f"{host}.part").unlink()
                    files, came = files + count, [*came, host]
                    continue
                bad[host] = f"its archive was left out, {why}"
            elif why:
                bad[host] = f"it sent none: {shown(why)}"
            else:
                silent.append(host)
            told = bad.get(host, "did not answer when the logs were collected")
            add_note(target, f"{name}/{host}/missing.txt", told + "\n")
    os.replace(partial, archive)
    shutil.rmtree(folder)
    print(f"{archive}: {files} files of {' '.join(came) or 'no machine'}")
    print("no private key is in it")
    if silent:
        print(f"not in it, they did not answer: {' '.join(silent)}")
    for host, why in bad.items():
        print(f"not in it, {host}: {why}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
