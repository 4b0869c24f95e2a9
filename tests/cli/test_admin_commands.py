"""The operator's commands, called as an operator calls them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mrcore.cli import main as cli
from mrcore.settings.config import load_settings
from mrcore.settings.validation import parse_yaml

DEPLOYED = {
    "cluster_name": "office",
    "home": "/srv/x",
    "nodes": [{"name": "alpha", "address": "10.0.0.1", "servers": 2, "compute_dir": "/data/mrcore"}],
}


@pytest.fixture
def mrcore(home: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call `mrcore …` in this process; gives status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(arguments))
        out, err = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return call


def test_settings_are_printed_whole_and_can_be_read_again(
    mrcore: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file = tmp_path / "source"  # a template's validate calls with a name without an ending
    file.write_text(json.dumps(DEPLOYED))
    code, out, err = mrcore("--config", str(file), "settings")
    assert (code, err) == (0, "")
    found = parse_yaml(out, "out")
    assert (found["cluster_name"], found["max_attempts"], found["nodes"][0]["agent_port"]) == ("office", 3, 45678)
    (tmp_path / "again.yml").write_text(out)
    assert load_settings(tmp_path / "again.yml") == load_settings(file)
    assert json.loads(mrcore("--config", str(file), "settings", "--json")[1]) == found


def test_faulty_settings_end_with_status_2_and_name_all_faults(
    mrcore: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file = tmp_path / "c.yml"
    file.write_text(json.dumps(DEPLOYED | {"max_atempts": 2, "history_keep_runs": 0}))
    code, out, err = mrcore("--config", str(file), "settings")
    assert (code, out) == (2, "")
    assert "unknown key 'max_atempts' (did you mean 'max_attempts'?)" in err and "history_keep_runs" in err
