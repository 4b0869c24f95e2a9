"""File transfer: one large file beside a plain TLS copy, and very many small files beside one `scp` each.

`python bench/transfer.py [--large-bytes N] [--small N] [--folder DIR] [--sshd PATH]`. Everything runs on loopback,
reads and writes the same disk and flushes what it wrote; rounds alternate and the median counts. scp is measured over
`SCP_FILES` files and multiplied; where there is no sshd, one upload of ours for each file stands in for it.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from mrcore.launchers import local
from mrcore.settings.config import Settings
from mrcore.transfer.file_transfer import FileTransfer
from mrcore.wire import tls
from mrcore.wire.tls import DATA_PROTOCOL, Pki

LARGE_BYTES, SMALL_FILES, SMALL_BYTES = 1 << 30, 100_000, 1_000
SCP_FILES, ROUNDS, BLOCK_BYTES = 200, 6, 1 << 20

# A process of its own, as the agent is one: takes one connection, writes what comes, flushes, answers one byte.
RECEIVER = """
import os, socket, sys
from pathlib import Path
from mrcore.wire import tls
context = tls.server_context(tls.Pki(Path(sys.argv[1]), "node"))
listener = socket.create_server((sys.argv[2], 0))
print(listener.getsockname()[1], flush=True)
while True:
    raw, _ = listener.accept()
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with context.wrap_socket(raw, server_side=True) as sock, open(sys.argv[3], "wb", buffering=0) as out:
        view, left = memoryview(bytearray(1 << 20)), int.from_bytes(sock.recv(8), "big")
        while left:
            got, wanted = 0, min(left, len(view))
            while got < wanted:  # TLS gives 16 KiB at a time: written one by one they would make a poor yardstick
                got += sock.recv_into(view[got:wanted])
            out.write(view[:got])
            left -= got
        os.fsync(out.fileno())
        sock.sendall(b"!")
"""


def seconds(work: Callable[[], object]) -> float:
    """Wall time, begun with nothing waiting to be written."""
    os.sync()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def plain_copy(settings: Settings, port: int, source: Path) -> None:
    """Send a file over TLS with nothing else: no checksums, no names, no publishing."""
    node = settings.nodes[0]
    context = tls.client_context(Pki(settings.pki_dir, "master"), DATA_PROTOCOL)
    raw = socket.create_connection((node.address, port))
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with context.wrap_socket(raw, server_hostname=node.name) as sock, source.open("rb", buffering=0) as stream:
        sock.sendall(source.stat().st_size.to_bytes(8, "big"))
        view = memoryview(bytearray(BLOCK_BYTES))
        while got := stream.readinto(view):
            sock.sendall(view[:got])
        if sock.recv(1) != b"!":
            raise RuntimeError("the plain copy was not taken")


def large(settings: Settings, folder: Path, size: int) -> None:
    """Alternate both copies and print their speeds and the ratio."""
    source, node, transfer = folder / "large", settings.nodes[0], FileTransfer(settings)
    with source.open("wb") as stream:
        block = os.urandom(BLOCK_BYTES)
        for _ in range(size // BLOCK_BYTES):
            stream.write(block)
    target = node.compute_dir / "plain"
    plain: list[float] = []
    ours: list[float] = []
    back: list[float] = []
    command = [sys.executable, "-c", RECEIVER, str(node.layout.pki_dir), node.address, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            assert receiver.stdout
            port = int(receiver.stdout.readline())

            def one_plain() -> None:
                target.unlink(missing_ok=True)
                plain.append(seconds(lambda: plain_copy(settings, port, source)))

            def one_upload() -> None:
                transfer.delete_files("large")
                sent = []
                ours.append(seconds(lambda: sent.append(transfer.upload(str(source), "large")["sent_bytes"])))
                if sent != [source.stat().st_size]:
                    raise RuntimeError(f"only {sent} bytes were sent")

            for number in range(ROUNDS):  # each is first every other time: who comes after a sync has it harder
                for copy in (one_plain, one_upload)[:: 1 if number % 2 else -1]:
                    copy()
                shutil.rmtree(folder / "back", ignore_errors=True)
                back.append(seconds(lambda: transfer.download("large", str(folder / "back"))))
        finally:
            receiver.kill()
    if (folder / "back/large").read_bytes() != source.read_bytes():
        raise RuntimeError("what came back is not what was sent")
    for name, times in (("plain TLS copy", plain), ("upload", ours), ("download", back)):
        ratio = statistics.median(one / other for one, other in zip(plain, times, strict=True))
        speed = size / statistics.median(times) / 1e6
        print(f"  {name:<16} {statistics.median(times):7.2f} s  {speed:7.0f} MB/s  {ratio:5.2f} of the plain copy")


def start_sshd(binary: str, folder: Path) -> tuple[subprocess.Popen[bytes], list[str]]:
    """A server of our own on loopback; gives it and the options for scp."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = {"HostKey": folder / "host", "AuthorizedKeysFile": folder / "authorized", "Port": port,
               "ListenAddress": "127.0.0.1", "StrictModes": "no", "UsePAM": "no", "PidFile": "none",
               "PermitRootLogin": "yes", "Subsystem": "sftp internal-sftp", "MaxStartups": "100"}  # fmt: skip
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen([binary, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    host = ["StrictHostKeyChecking=no", f"UserKnownHostsFile={folder / 'known'}", "LogLevel=ERROR", "BatchMode=yes"]
    options_of_scp = ["-q", "-P", str(port), "-i", str(folder / "user")] + [
        each for one in host for each in ("-o", one)
    ]
    return server, options_of_scp


def scp_each(binary: str, folder: Path, files: list[Path]) -> float:
    """Seconds for one scp per file."""
    target = folder / "scp"
    target.mkdir()
    server, options = start_sshd(binary, folder)
    where = f"{getpass.getuser()}@127.0.0.1:{target}/"
    try:
        for _ in range(100):
            if subprocess.run(["scp", *options, files[0], where], check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.05)
        return seconds(lambda: [subprocess.run(["scp", *options, each, where], check=True) for each in files])
    finally:
        server.terminate()
        server.wait()


def connection_each(settings: Settings, files: list[Path]) -> float:
    """Seconds for one upload of our own, with a connection and a commit, per file: what stands in for scp."""
    transfer = FileTransfer(settings)
    return seconds(lambda: [transfer.upload(str(each), "single", False) for each in files])


def small(settings: Settings, folder: Path, count: int, sshd: str | None) -> None:
    """Many small files up and down, and what one scp each would take."""
    source, transfer = folder / "small", FileTransfer(settings)
    source.mkdir()
    content = os.urandom(SMALL_BYTES + count)
    for number in range(count):
        (source / f"file {number:06}").write_bytes(content[number : number + SMALL_BYTES])
    up = seconds(lambda: transfer.upload_bulk(str(source), "small"))
    again = seconds(lambda: transfer.upload_bulk(str(source), "small", reload_files=False))
    down = seconds(lambda: transfer.download_bulk("small", str(folder / "small-back")))
    if subprocess.run(["diff", "-rq", source, folder / "small-back"], check=False).returncode:
        raise RuntimeError("what came back is not what was sent")
    files = sorted(source.iterdir())[:SCP_FILES]
    measured = scp_each(sshd, folder, files) if sshd else connection_each(settings, files)
    what = "one scp each" if sshd else "no sshd here: one upload of ours each"
    estimate = measured / len(files) * count
    print(f"  {what:<16} {estimate:8.1f} s  estimated from {len(files)}: {measured / len(files) * 1000:.1f} ms each")
    for name, took in (("upload_bulk", up), ("nothing new", again), ("download_bulk", down)):
        print(f"  {name:<16} {took:8.1f} s  {estimate / took:6.0f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large-bytes", type=int, default=LARGE_BYTES)
    parser.add_argument("--small", type=int, default=SMALL_FILES)
    parser.add_argument("--folder", type=Path, help="where inputs and the cluster lie (default: a temporary folder)")
    parser.add_argument("--sshd", default=shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="mrcore-transfer-", dir=options.folder))
    address = f"127.{101 + os.getpid() // 250 % 100}.{1 + os.getpid() % 250}.1"
    settings = local.configure(folder / "home", nodes=1, servers=1, address=address)
    try:
        local.start_cluster(settings)
        print(f"one file of {options.large_bytes / 1e6:.0f} MB, median of {ROUNDS}:")
        large(settings, folder, options.large_bytes)
        print(f"{options.small:,} files of {SMALL_BYTES} bytes:")
        small(settings, folder, options.small, options.sshd)
    finally:
        local.kill_cluster(settings)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
