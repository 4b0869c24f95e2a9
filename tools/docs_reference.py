"""Pages of the site that are made from the code: the keys of every kind of job, and every command by its own help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from mrcore.cli.main import cli
from mrcore.queue import job as jobs

_TYPES = {"boolean": "true or false", "integer": "whole number", "number": "number", "string": "text", "array": "list"}
_BOUNDS = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}


def jobs_page() -> str:
    """Return a table of keys for each kind of job, from the models that validate them."""
    lines = ["# Reference: jobs", ""]
    lines += ["Every key of every kind of job, from the code that checks it; what they mean at length stands in"]
    lines += [
        "[Jobs](docs/jobs.md). Required keys have no default. `mrcore template KIND` prints a job with all of them.",
        "",
    ]
    for kind, model in jobs.MODELS.items():
        schema = model.model_json_schema()
        lines += [f"## {kind}", "", " ".join((model.__doc__ or "").split()), ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for key, field in model.model_fields.items():
            if key in jobs.FILLED:
                continue
            default = (
                "" if field.is_required() or field.get_default() is None else f"`{json.dumps(field.get_default())}`"
            )
            meaning = f"`{kind}`" if key == "job_type" else field.description or ""
            lines.append(f"| `{key}` | {_value(schema['properties'][key])} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _value(schema: dict[str, Any]) -> str:
    """Return what a key takes, in words."""
    choices = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    return " or ".join(filter(None, map(_choice, choices)))


def _choice(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_value(schema.get('items', {}))}".removesuffix(" of ")
    bounds = [text.format(f"{schema[name]:,}") for name, text in _BOUNDS.items() if _is_told(schema.get(name))]
    return " ".join([_TYPES.get(schema.get("type", ""), ""), *bounds])


def _is_told(bound: float | None) -> bool:
    return bound is not None and abs(bound) < 1e9  # a larger one is the end of what a machine counts


def commands_page() -> str:
    """Return what `--help` of each command prints."""
    lines = ["# Reference: commands", "", "What each command prints for `--help`.", ""]
    for names, text in _helps(cli, click.Context(cli, info_name="mrcore", max_content_width=100, terminal_width=100)):
        lines += [f"## {names}", "", "```text", text, "```", ""]
    return "\n".join(lines)


def _helps(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    yield context.command_path, command.get_help(context)
    for name, below in sorted(command.commands.items()) if isinstance(command, click.Group) else ():
        if not below.hidden:
            yield from _helps(below, click.Context(below, parent=context, info_name=name, terminal_width=100))
