"""What the doctor found last: kept as a whole, told once when it changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mrcore.admin import findings
from mrcore.admin.doctor import Finding
from mrcore.cli.main import main
from mrcore.errors import UsageError
from mrcore.settings.config import Settings, load_settings

TELL = "import sys, pathlib; pathlib.Path(sys.argv[1]).open('a').write(sys.stdin.read() + chr(10))"
DISK = Finding("node w1", "disk", "300 MiB of disk are free", "the queue will hold", "make room")
HOLD = Finding("queue", "hold", "it holds", "no job starts", "`mrcore resume`")


@pytest.fixture
def config(home: Path) -> Path:
    path = home.parent / "config.json"
    path.write_text(json.dumps({"on_findings": [sys.executable, "-c", TELL, str(home / "told")]}))
    return path


@pytest.fixture
def settings(config: Path) -> Settings:
    made = load_settings(config)
    made.state_dir.mkdir()
    return made


def told(home: Path) -> list[dict[str, Any]]:
    path = home / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(*arguments: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def test_what_is_found_is_told_once_and_again_when_it_changes(home: Path, settings: Settings) -> None:
    assert findings.last(settings) is None
    findings.keep(settings, [], 1.0)
    assert told(home) == [], "nothing is wrong, and was not before"
    findings.keep(settings, [DISK], 2.0)
    findings.keep(settings, [DISK._replace(what="299 MiB of disk are free")], 3.0)
    findings.keep(settings, [DISK, HOLD], 4.0)
    findings.keep(settings, [HOLD, DISK], 5.0)
    findings.keep(settings, [], 6.0)
    first, second, third = told(home)
    assert (first["state"], first["time"], first["new"], first["gone"]) == ("findings", 2.0, [DISK._asdict()], [])
    assert (second["findings"], second["new"]) == ([DISK._asdict(), HOLD._asdict()], [HOLD._asdict()])
    gone = [{"where": "node w1", "code": "disk"}, {"where": "queue", "code": "hold"}]
    assert (third["findings"], third["new"], third["gone"]) == ([], [], gone)


def test_the_last_findings_can_be_read_and_their_texts_are_clean(settings: Settings) -> None:
    findings.keep(settings, [DISK._replace(what="a\n\x1b[31m" + "x" * 1_000_000)], 2.0)
    kept = findings.last(settings)
    assert kept is not None and kept.time == 2.0 and kept.findings[0].code == "disk"
    assert kept.findings[0].what.startswith("a\\n\\x1b[31mxxx") and len(kept.findings[0].what) < 3_000
    assert (settings.state_dir / findings.FILE).stat().st_mode & 0o077 == 0


def test_a_damaged_file_is_named_and_written_again(home: Path, settings: Settings) -> None:
    (settings.state_dir / findings.FILE).write_text('{"time": "now"}')
    with pytest.raises(UsageError, match=r"doctor\.json is damaged.*mrcore doctor --keep"):
        findings.last(settings)
    findings.keep(settings, [DISK], 2.0)
    assert findings.last(settings) and [each["new"] for each in told(home)] == [[DISK._asdict()]]


def test_a_hook_that_was_cut_off_is_called_again(
    home: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(findings, "write_atomic", full)
        with pytest.raises(OSError):
            findings.keep(settings, [DISK], 2.0)
    findings.keep(settings, [DISK], 3.0)
    assert [each["time"] for each in told(home)] == [2.0, 3.0]


def test_the_command_keeps_what_it_finds_and_ends_well(
    home: Path, config: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status("--config", str(config), "doctor", "--json") == 1
    assert findings.last(settings) is None, "only when it is told to"
    assert status("--config", str(config), "doctor", "--keep") == 0
    kept = findings.last(settings)
    assert kept and kept.findings and [each["findings"] for each in told(home)] == [
        [{"where": each.where, "code": each.code, "what": each.what, "means": each.means, "do": each.do}
         for each in kept.findings]
    ]  # fmt: skip
    assert kept.findings[0].what in capsys.readouterr().out
