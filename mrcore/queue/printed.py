"""What a task, or a script, printed last: the end of its log, wherever that lies."""

from __future__ import annotations

import threading

from mrcore.errors import MrcoreError
from mrcore.queue import scripts
from mrcore.queue.why import Explanation
from mrcore.settings.config import Settings
from mrcore.system.logs import last_lines
from mrcore.system.tags import parse_tag
from mrcore.text import one_line

SHOWN_LINES = 10
READ_LINES = 400  # of a server's log, among which those of the task are looked for
LOG_SECONDS = 10.0  # to read a log on another machine
CRASH = "Fatal Python error: "  # with which the stack of a crash begins, which an explanation has already


def with_printed(explanation: Explanation, settings: Settings) -> Explanation:
    """Add to an explanation what the task, or the script, that it names printed last, or why that is not known."""
    facts = explanation.facts | explanation.facts.get("failure", {})
    try:
        if "server" in facts:
            names = ("node", "server", "job_name", "run", "task")
            lines = by_task(settings, *(facts.get(name) for name in names))
            title = f"it printed last (`mrcore logs {facts['server']}` has more):"
        else:
            lines = by_script(settings, explanation.job_name, facts.get("run", 0))
            title = "it printed last:"
    except MrcoreError as error:
        explanation.lines.append(f"what it printed cannot be read: {error.message}")
        return explanation
    if lines:
        explanation.lines += [title, *(f"  {line}" for line in lines)]
        explanation.facts["printed"] = lines
    return explanation


def by_script(settings: Settings, job_name: str, run: int) -> list[str]:
    """Return the last lines that a run of a script job printed so far."""
    file = scripts.log_of(settings, job_name, run)
    return _shown(last_lines(file, SHOWN_LINES)) if file.is_file() else []


def by_task(settings: Settings, node: str, server: str, job_name: str, run: int, task: str | None) -> list[str]:
    """Return the last lines that a task printed (task None: any of this run on this server).

    Raises ClusterFault, UsageError when the node, or the log on it, cannot be reached in LOG_SECONDS.
    """
    tags = (parse_tag(line) for line in _shown(_read(settings, node, server)))
    of_run = [tag for tag in tags if tag and (tag.job, tag.run) == (job_name, run)]
    lines = [tag.text for tag in of_run if task in (None, tag.task)]
    crash = next((number for number, line in enumerate(lines) if line.startswith(CRASH)), len(lines))
    return lines[max(0, crash - SHOWN_LINES) : crash]


def _read(settings: Settings, node: str, server: str) -> bytes:
    from mrcore.launchers import launcher_of  # which loads an SSH client

    found: list[bytes | MrcoreError | None] = []

    def read() -> None:
        try:
            found.append(launcher_of(settings).read_log(settings, node, server, READ_LINES))
        except MrcoreError as error:
            found.append(error)

    reader = threading.Thread(target=read, name=f"log of {server}", daemon=True)
    reader.start()
    reader.join(LOG_SECONDS)
    if not found:
        raise MrcoreError(f"node {node} gave no answer in {LOG_SECONDS:g} s")
    if isinstance(found[0], MrcoreError):
        raise found[0]
    return found[0] or b""


def _shown(content: bytes) -> list[str]:
    return [one_line(line) for line in content.decode(errors="backslashreplace").splitlines()]
