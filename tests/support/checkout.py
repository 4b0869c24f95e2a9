"""The files of this checkout: its root, texts, scripts as modules, and the commands of its CLI."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import click

PROJECT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).parent  # for processes that import from it


def module(path: str) -> ModuleType:
    """Import a script of the checkout that belongs to no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, PROJECT / path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def text_of(name: str) -> str:
    """Return the text of a file of the checkout."""
    return (PROJECT / name).read_text(encoding="utf-8")


def commands(group: click.Group, above: str = "") -> list[str]:
    """Return all commands of a group, with those of its subgroups, as they are typed."""
    names = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            names += commands(command, f"{above}{name} ")
        else:
            names.append(f"mrcore {above}{name}")
    return names
