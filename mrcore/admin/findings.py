"""What the doctor found last, kept in a file for those who look (dashboard, metrics), and told when it changes.

`mrcore doctor --keep`, which a timer of the master calls, is what writes it.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable

import msgspec

from mrcore.admin.doctor import Finding
from mrcore.errors import UsageError
from mrcore.messages.kinds import Line, Seconds, Word
from mrcore.queue.hooks import Hooks
from mrcore.settings.config import Settings
from mrcore.state.manifest import load
from mrcore.system.paths import write_atomic
from mrcore.text import one_line

log = logging.getLogger(__name__)
FILE = "doctor.json"  # in state_dir
MAX_FINDINGS = 1_000


class KeptFinding(msgspec.Struct):
    """One thing that is wrong; `code` for programs, the rest for people."""

    where: Word
    code: Word
    what: Line
    means: Line
    do: Line


class Kept(msgspec.Struct):
    """What the doctor found, and when it had looked (seconds since 1970)."""

    time: Seconds
    findings: list[KeptFinding]


def last(settings: Settings) -> Kept | None:
    """Return what was found last; None: the doctor was never asked to keep it. Raises UsageError for a damaged file."""
    try:
        return load(settings.state_dir / FILE, Kept, "what the doctor found last in", "`mrcore doctor --keep` mends it")
    except FileNotFoundError:
        return None


def keep(settings: Settings, found: Iterable[Finding], now: float) -> Kept:
    """Keep what was found in place of what was before; return it.

    The hook `on_findings` is called before, if something is found that was not then, or the other way round. So one
    that was cut off is called again the next time. Place and code tell what is new: numbers in texts always change.
    """
    kept = Kept(now, [_kept(finding) for finding in itertools.islice(found, MAX_FINDINGS)])
    try:
        known = last(settings)
    except UsageError:  # a damaged file, which is written again
        known = None
    before = {(each.where, each.code) for each in (known.findings if known else ())}
    after = {(each.where, each.code) for each in kept.findings}
    if before != after:
        hooks = Hooks(settings, lambda name, run, text: log.warning("%s", text))
        new = [each for each in kept.findings if (each.where, each.code) not in before]
        gone = [{"where": where, "code": code} for where, code in sorted(before - after)]
        facts = {"findings": kept.findings, "new": new, "gone": gone}
        hooks.call(state="findings", time=now, **{key: msgspec.to_builtins(value) for key, value in facts.items()})
        hooks.close()
    write_atomic(settings.state_dir / FILE, msgspec.json.encode(kept), 0o600)
    return kept


def _kept(finding: Finding) -> KeptFinding:
    where, code, *texts = finding
    return KeptFinding(one_line(where, 140), code, *map(one_line, texts))
