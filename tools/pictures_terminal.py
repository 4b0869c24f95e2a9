"""Makes docs/pictures/terminal-*.svg: what `mrcore` shows on a terminal of 80 columns, from commands that really ran.

    .venv/bin/python tools/pictures_terminal.py

A local cluster in a temporary folder runs two jobs, one of which fails. The pictures name no font to be fetched.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

CHECKOUT = Path(__file__).resolve().parent.parent
MRCORE = Path(sys.executable).with_name("mrcore")
PICTURES = CHECKOUT / "docs/pictures"
COLUMNS = 80
FETCHED_FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
SCENES = {
    "terminal-history": [["history"], ["queue"]],
    "terminal-why": [["plan", "words.yml"], ["why", "nightly_visits_by_page"]],
}
ADDRESS = "127.77.0.1"  # where no other cluster is
JOBS = """\
- {job_name: words, project_name: word_count, input_dirs: [/usr/share/common-licenses], map_function_name: count_words,
   combine_function_name: add_up, reduce_function_name: add_up, run_once: true}
- {job_name: nightly_visits_by_page, project_name: word_count, input_dirs: [/usr/share/common-licenses], run_once: true,
   map_function_name: count_words, reduce_function_name: broken}
- {job_name: report, job_type: script, script_location: report.py, not_before: 2030-01-01}
"""


def shown(arguments: list[str], environment: dict[str, str], folder: Path) -> str:
    """Return what a command writes to a terminal."""
    master, theirs = pty.openpty()
    with subprocess.Popen([MRCORE, *arguments], cwd=folder, env=environment, stdout=theirs, stderr=theirs):
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(master, 65536):
                seen += piece
        except OSError:  # the other side has ended
            pass
    os.close(master)
    return seen.decode().replace("\r\n", "\n")


def picture(title: str, text: str) -> str:
    """Return an SVG of a terminal that shows a text with its colours."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)
    console.print(Text.from_ansi(text), overflow="fold")
    svg = console.export_svg(title=title, theme=MONOKAI, unique_id=title.replace(" ", "-"))
    return FETCHED_FONT.sub("", svg).replace("Fira Code", "ui-monospace, Menlo, Consolas")


def main() -> None:
    """Make all pictures anew."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(CHECKOUT / "projects", folder / "projects")
        functions = folder / "projects/word_count/reduce_functions.py"
        functions.write_text(
            functions.read_text() + "\n\ndef broken(group, auxiliary_data):\n    return group[0][1] / 0\n"
        )
        (folder / "jobs.yml").write_text(JOBS)
        (folder / "words.yml").write_text(JOBS.split("\n- ")[0] + "\n")
        (folder / "report.py").write_text("print('a report')\n")
        environment = {key: value for key, value in os.environ.items() if key not in ("MRCORE_CONFIG", "NO_COLOR")}
        environment |= {"MRCORE_HOME": str(folder / "home"), "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
        started = ["cluster", "start", "--nodes", "2", "--servers", "1", "--address", ADDRESS]
        try:
            for arguments in (started, ["submit", "jobs.yml"], ["run", "--once"]):
                print(shown(arguments, environment, folder), end="")
            for scene, commands in SCENES.items():
                text = "\n".join(f"$ mrcore {' '.join(each)}\n{shown(each, environment, folder)}" for each in commands)
                (PICTURES / f"{scene}.svg").write_text(picture("mrcore", text.replace(str(folder), "~")))
        finally:
            shown(["cluster", "kill"], environment, folder)


if __name__ == "__main__":
    main()
