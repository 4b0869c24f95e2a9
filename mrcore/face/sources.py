"""The source of a user's functions, and what of their module they use, as plain text of another module.

A function of a script or a notebook cell goes by its source, together with the imports, functions, classes and
constants that it names. One of a module that can be imported goes by an import of it. What is neither raises
`NotSource`.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import inspect
import linecache
import re
import symtable
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from mrcore.face import modules
from mrcore.face.places import place_of
from mrcore.project.origin import Piece
from mrcore.text import one_line

MAX_LITERAL_BYTES = 1 << 20  # of the text of one constant
_FUTURE = "from __future__ import annotations"
_SCALARS = (str, int, float, bool, bytes, type(None))


class NotSource(Exception):
    """A thing that no source can stand for; the text says why."""


class Definition(NamedTuple):
    """The source of a function or class, and where it was written."""

    text: str
    place: str
    line: int


class Module:
    """A module in the making: `use` things by name, then `text` is its source."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._imports: dict[str, str] = {}  # by name
        self._constants: dict[str, str] = {}
        self._definitions: dict[str, Definition | str] = {}  # those that others need when they are made come first
        self._known: dict[str, Any] = {}
        self.local: set[str] = set()  # modules of the user's own, which have to go along

    def function(self, function: Any, role: str) -> str:
        """Take a function in, with all that it uses; return its name in the module. Raises NotSource."""
        base = inspect.unwrap(function) if callable(function) else function
        name = getattr(base, "__name__", "")
        if not isinstance(name, str) or not (name == "<lambda>" or name.isidentifier()):
            raise NotSource(f"an object of type {type(function).__name__} is no function with a name")
        if isinstance(base, FunctionType) and base.__code__.co_flags & __future__.annotations.compiler_flag:
            self._imports["annotations"] = _FUTURE
        if name == "<lambda>":
            name = f"{role}_lambda"
            self._once(name, function)
            self._define(name, _lambda(base, name), base.__globals__)
            return name
        self._use(name, function, vars(sys.modules.get(str(base.__module__), builtins)))
        return name

    def _once(self, name: str, thing: Any) -> bool:
        """Return whether this is new under its name. Raises NotSource when another thing has it."""
        if name in self._known:
            if self._known[name] is not thing:
                raise NotSource(f"two things are called {name}: rename one of them")
            return False
        self._known[name] = thing
        return True

    def _use(self, name: str, thing: Any, scope: dict[str, Any]) -> None:
        if not self._once(name, thing):
            return
        if isinstance(thing, ModuleType):
            self.local |= modules.local(thing.__name__)
            self._imports[name] = f"import {thing.__name__}" + (f" as {name}" if thing.__name__ != name else "")
        elif importable := _importable(thing):
            module, own = importable
            self.local |= modules.local(module)
            self._imports[name] = f"from {module} import {own}" + (f" as {name}" if own != name else "")
        elif isinstance(thing, re.Pattern):
            self._imports["re"] = "import re"
            self._constants[name] = f"{name} = re.compile({thing.pattern!r}, {int(thing.flags)})"
        elif (literal := _constant(thing)) is not None:
            text = f"{name} = {literal}"
            if len(text) > MAX_LITERAL_BYTES:
                raise NotSource(f"{name} has more than {MAX_LITERAL_BYTES >> 20} MiB: give it as auxiliary data")
            self._constants[name] = text
        else:
            base = inspect.unwrap(thing) if callable(thing) else thing
            if not isinstance(base, FunctionType | type):
                raise NotSource(f"{name} is an object of type {type(thing).__name__}")
            if isinstance(base, FunctionType) and base.__code__.co_freevars:
                raise NotSource(f"{name} closes over {', '.join(base.__code__.co_freevars)}")
            found = _source(base)
            within = base.__globals__ if isinstance(base, FunctionType) else scope
            if base.__name__ == name or self._once(base.__name__, thing):
                self._define(base.__name__, found, within)
            if base.__name__ != name:
                self._definitions[name] = f"{name} = {base.__name__}"

    def _define(self, name: str, found: Definition, scope: dict[str, Any]) -> None:
        try:
            names = _names(found.text, "annotations" in self._imports)
        except SyntaxError:
            raise NotSource(f"the source of {name} cannot be told from what is around it") from None
        for used in names:
            if used != name and used in scope:
                self._use(used, scope[used], scope)
                self._submodules(used, scope[used], found.text)
        self._definitions[name] = found

    def _submodules(self, name: str, thing: Any, text: str) -> None:
        """Import what `import xml.etree` loads beside `xml`, as far as a definition names it."""
        if not isinstance(thing, ModuleType):
            return
        for chain in re.findall(rf"\b{name}((?:\.\w+)+)", text):
            path = chain
            while path and f"{thing.__name__}{path}" not in sys.modules:
                path = path.rpartition(".")[0]
            if path:
                self._imports[f"{name}{path}"] = f"import {thing.__name__}{path}"

    def text(self) -> str:
        """Return the module's source, which ends with what lets errors name the places of origin."""
        imports = dict.fromkeys(self._imports.values())
        head = [
            f"# {self._title}",
            "",
            *([_FUTURE, ""] if _FUTURE in imports else []),
            "from mrcore.project import origin as _origin",
        ]
        head += [line for line in imports if line != _FUTURE]
        lines = "\n".join([*head, *([""] if self._constants else []), *self._constants.values()]).split("\n")
        pieces = []
        for definition in self._definitions.values():
            if isinstance(definition, str):
                lines += ["", "", definition]
                continue
            lines += ["", "", f"# {one_line(definition.place)}, line {definition.line}"]
            body = definition.text.rstrip("\n").split("\n")
            pieces.append(Piece(len(lines) + 1, len(lines) + len(body), definition.place, definition.line))
            lines += body
        lines += ["", "", "# Errors name the places where these functions were written."]
        lines += ["_origin.restore(", "    __file__,", "    [", *(f"        {tuple(piece)!r}," for piece in pieces)]
        return "\n".join([*lines, "    ],", ")", ""])


def _importable(thing: Any) -> tuple[str, str] | None:
    """Return module and name by which a task can import a thing; None: it is of an interactive module or a script."""
    module, name = getattr(thing, "__module__", None), getattr(thing, "__qualname__", getattr(thing, "__name__", None))
    if not isinstance(module, str) or not isinstance(name, str) or not name.isidentifier() or module == "__main__":
        return None
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    return (module, name) if found is thing and modules.is_importable(module) else None


def _constant(thing: Any) -> str | None:
    """Return what `_literal` does; None also for what holds itself, or an int that is too large to be read back."""
    try:
        return _literal(thing)
    except (RecursionError, ValueError):
        return None


def _literal(thing: Any) -> str | None:
    """Return source that makes an equal thing of the same type, the same text in every process; None: there is none."""
    kind = type(thing)
    if kind in _SCALARS:
        return repr(thing) if kind is not float or thing - thing == 0 else None  # neither nan nor an infinity
    if kind is dict:
        texts = [text and f"{text}: " for text in map(_literal, thing)]
        values = list(map(_literal, thing.values()))
        return None if None in texts + values else f"{{{', '.join(map(str.__add__, texts, values))}}}"  # type: ignore[arg-type]
    if kind not in (list, tuple, set, frozenset):
        return None
    members = list(map(_literal, thing))
    if None in members:
        return None
    text = ", ".join(members if kind in (list, tuple) else sorted(members))  # type: ignore[arg-type]
    if kind is tuple:
        return f"({text},)" if len(members) == 1 else f"({text})"
    return f"[{text}]" if kind is list else f"{kind.__name__}([{text}])"


def _source(thing: FunctionType | type) -> Definition:
    """Return the source of a function or class. Raises NotSource."""
    name = thing.__name__
    if isinstance(thing, FunctionType):
        try:
            lines, first = inspect.getsourcelines(thing)
        except (OSError, TypeError):
            raise NotSource(f"the source of {name} cannot be found") from None
        place = place_of(thing.__code__.co_filename)
        if lines[0][:1].isspace():  # inside of another one: as it is, since a text in it may be indented, too
            return Definition("if True:\n" + "".join(lines), place, first - 1)
        return Definition("".join(lines), place, first)
    for file in _files_of(thing):
        lines = linecache.getlines(file)
        for node in _top_level("".join(lines)):
            if isinstance(node, ast.ClassDef) and node.name == name:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                return Definition("".join(lines[first - 1 : node.end_lineno]), place_of(file), first)
    raise NotSource(f"the source of class {name} cannot be found")


def _files_of(kind: type) -> Iterator[str]:
    """Yield the files in which a class may have been written: its methods', its module's, the cells of a notebook."""
    yield from dict.fromkeys(
        value.__code__.co_filename
        for value in vars(kind).values()
        if isinstance(value, FunctionType) and value.__module__ == kind.__module__
    )
    if file := getattr(sys.modules.get(kind.__module__), "__file__", None):
        yield file
    yield from reversed([name for name in list(linecache.cache) if isinstance(name, str) and not Path(name).exists()])


def _top_level(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError):
        return []


def _lambda(function: FunctionType, name: str) -> Definition:
    """Return a lambda as an assignment. Raises NotSource unless its text can be told from others of its line."""
    code = function.__code__
    if code.co_freevars:
        raise NotSource(f"the lambda closes over {', '.join(code.co_freevars)}")
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        found = [
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno
        ]
    except (SyntaxError, ValueError):
        found = []
    segment = ast.get_source_segment(text, found[0]) if len(found) == 1 else None
    if segment is None:
        raise NotSource("the source of the lambda cannot be told from that of another")
    return Definition(f"{name} = ({segment})", place_of(code.co_filename), code.co_firstlineno)


def _names(text: str, late: bool) -> list[str]:
    """Return the names that a definition takes from its module; `late`: its annotations are not evaluated."""
    found: dict[str, None] = {}

    def look(table: symtable.SymbolTable, outermost: bool) -> None:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (outermost or symbol.is_global()):
                found[symbol.get_name()] = None
        for inner in table.get_children():
            look(inner, False)

    look(symtable.symtable(f"{_FUTURE}\n{text}" if late else text, "<source>", "exec"), True)
    return list(found)
