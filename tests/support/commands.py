"""The `mrcore` command in processes of its own, and the characters that no output of it may contain."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

MRCORE = str(Path(sys.executable).with_name("mrcore"))
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
CODE = "import sys; sys.argv[0] = 'mrcore'; from mrcore.cli.main import main; main()"


def mrcore(*arguments: str) -> tuple[int, str, str]:
    """Run the command without a terminal; return exit status, output and errors."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def on_terminal(answer: str, *arguments: str) -> tuple[int, str]:
    """Run the command on a terminal, answer its one question; return exit status and what the screen showed."""
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", CODE, *arguments], stdin=slave, stdout=slave, stderr=slave) as started:
        os.close(slave)
        seen = b""
        try:
            while piece := os.read(master, 4096):
                seen += piece
                if answer and seen.rstrip().endswith(b"[y/N]:"):
                    os.write(master, answer.encode() + b"\n")
                    answer = ""
        except OSError:  # the other side has ended
            pass
        finally:
            os.close(master)
            status = started.wait(60)
    return status, re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", seen.decode())
