"""The functions of a user's project: how they are loaded, and how a reduce function becomes a combiner."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrcore.engine.records import BadItem, Key, Snapshot, Value, check_item, describe, loads
from mrcore.engine.user_errors import is_ours, raised_by_user, user_fault
from mrcore.errors import JobFault
from mrcore.system import forks

Function = Callable[[Any, Any], Any]
COMBINE_VALUES = 4096
_PARAMETERS = {"map": "(line, auxiliary_data)", "reduce": "(group, auxiliary)"}


def load_function(project_dir: Path, kind: str, name: str) -> Function:
    """Import `kind`_functions.py ("map" or "reduce") of a project and return the function `name` of it.

    The original's way comes first: a class MapFunctions(name) with get_map_function(); else the module's own name.
    Raises JobFault naming file, line and cause.
    """
    if str(project_dir) not in sys.path:
        sys.path.insert(0, str(project_dir))
    module_name, file = f"{kind}_functions", project_dir / f"{kind}_functions.py"
    if not file.is_file():
        text = f"project {project_dir.name} has no {file.name}: create {file} with the function {name}"
        raise JobFault(text, code="no_function")
    try:
        module = importlib.import_module(module_name)
        factory = getattr(module, f"{kind.capitalize()}Functions", None)
        function = getattr(factory(name), f"get_{kind}_function")() if isinstance(factory, type) else None
        function = function if callable(function) else getattr(module, name, None)
        if not callable(function):
            near = difflib.get_close_matches(name, [n for n in dir(module) if callable(getattr(module, n))], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise JobFault(
                f"{file.name} of project {project_dir.name} has no function {name!r}{hint}", code="no_function"
            )
    except BaseException as error:
        if is_ours(error):
            raise
        if type(error) in (SyntaxError, IndentationError, TabError) and type(error.filename) is str:  # type: ignore[attr-defined]
            where = {"code": "import", "code_file": error.filename, "code_line": error.lineno}  # type: ignore[attr-defined]
            raise JobFault(f"{error.filename}, line {error.lineno}: syntax error: {error.msg}", **where) from error  # type: ignore[attr-defined]
        raise user_fault(error, f"loading {name} from {file.name} failed", code="import") from error
    forks.check()
    result: Function = function
    try:
        parameters = inspect.signature(result, follow_wrapped=False)  # what a decorator returns is what is called
    except (ValueError, TypeError):  # a function in C may not have one
        return result
    try:
        parameters.bind(None, None)
    except TypeError as error:
        raise JobFault(
            f"{kind} function {name} of {file.name} cannot be called as f{_PARAMETERS[kind]}: its parameters are "
            f"{parameters} ({error})",
            function=name,
            code="no_function",
        ) from None
    return result


def load_auxiliary(folder: Path, name: str | None) -> Any:
    """Load the JSON of `folder/NAME.data`, or None for no name. Raises JobFault when it is missing or no JSON."""
    if name is None:
        return None
    path = folder / f"{name}.data"
    try:
        return loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        text = f"auxiliary data {name!r} is not on this node: {path} is missing; upload it first"
        raise JobFault(text, code="auxiliary") from None
    except (OSError, ValueError) as error:
        raise JobFault(f"auxiliary data {path} cannot be read as JSON: {error}", code="auxiliary") from error


def make_combiner(function: Function, name: str, auxiliary: Any) -> Callable[[Key, list[Value]], list[Value]]:
    """Wrap a reduce function as a combiner: `(key, values) -> values`.

    Raises JobFault when the function raises, returns what is no item, or changes the key.
    """
    snapshot = Snapshot()

    def combine(key: Key, values: list[Value]) -> list[Value]:
        if len(values) > COMBINE_VALUES:  # the pairs of a giant group would outweigh it many times
            starts = range(0, len(values), COMBINE_VALUES)
            fewer = [value for start in starts for value in combine(key, values[start : start + COMBINE_VALUES])]
            return combine(key, fewer) if len(fewer) <= len(values) // 2 else fewer
        try:
            result = function([(key, value) for value in values], auxiliary)
            if forks.in_child:
                forks.check()
            item = result[0] if result.__class__ is list and len(result) == 1 else None
            if item.__class__ is tuple and len(item) == 2 and item[0] is key and item[1].__class__ is int:
                return [item[1]]  # the usual combiner adds up: no need to look closer
            items = [check_item(item, snapshot) for item in result]
        except BaseException as error:
            if issubclass(type(error), BadItem) and not raised_by_user(error):
                raise JobFault(f"combiner {name} on key {describe(key)}: {error}", function=name) from error
            raise user_fault(error, f"combiner {name} failed on key {describe(key)}", function=name) from error
        for new_key, _ in items:
            if new_key != key:
                raise JobFault(
                    f"combiner {name} turned key {describe(key)} into {describe(new_key)}: a combiner must keep its "
                    "key; use the function as reduce function only",
                    function=name,
                )
        return [value for _, value in items]

    combine.__name__ = name
    return combine
