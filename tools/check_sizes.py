"""Fails when a module, a function or the package grows past its limit, or an import goes up the floors.

Modules and functions are counted in lines of the file; the package in lines of code, that is without blank lines,
comments and docstrings, so that nobody is tempted to save on documentation.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mrcore"
# The package was meant to stay below 6,000 lines. The engine alone does; the queue (transfers, scripts, increments,
# backup) and the appliance (launching over SSH, submitters, doctor, projects' packages) took it past that.
# Raise this number only together with what docs/architecture.md says of it.
MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_CODE_LINES = 500, 70, 12_300

# Imports go down, or sideways without a circle (docs/architecture.md says what each module is for).
FLOORS = [
    {
        "errors",
        "text",
        "terminal",
        "logs",
        "limited_log",
        "ratelimit",
        "answers",
        "doorbell",
        "config",
        "validation",
        "access",
        "environments",
        "job",
        "phases",
        "records",
        "paths",
        "manifest",
        "task",
        "procfs",
        "watched",
        "faults",
        "forks",
        "readers",
        "globbing",
    },
    {
        "memory",
        "runs",
        "disk_list",
        "disk_sort",
        "sorter",
        "inputs",
        "listing",
        "ledger",
        "output",
        "store",
        "pki",
        "delegate",
        "usercode",
        "staging",
    },
    {"shuffler", "mapper", "reducer"},
    {"process", "trial"},
    {"rpc"},
    {"supervisor", "agent_files", "agent_moves", "node_agent", "cluster_server"},
    {"launchers", "links", "preflight", "manage_cluster", "outputs"},
    {"transfer_crew", "file_transfer", "scripts", "hooks", "backup", "drain", "turns", "runner", "scheduler", "doctor"},
    {"cli_common", "cli_admin", "cli_cluster", "cli_files", "cli"},
]
ONLY = {"rpyc": {"rpc"}, "fabric": {"launchers"}, "paramiko": {"launchers"}, "cryptography": {"pki"}}
# Never in a daemon: memory, start time.
HEAVY = {"pydantic", "cryptography", "fabric", "paramiko", "click", "rich", "yaml"}
DAEMONS = ("node_agent", "cluster_server")


def code_lines(path: Path) -> int:
    """Count the lines that hold code."""
    text = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def statements(tree: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """Walk a syntax tree, on demand only through what runs when the module is imported."""
    for node in ast.iter_child_nodes(tree):
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if inside_functions or not (late or typing_only):
            yield node
            yield from statements(node, inside_functions)


def imports(path: Path, inside_functions: bool = True) -> list[tuple[str, int]]:
    """Give every imported module name with its line, also from imports inside functions if wanted."""
    found = []
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), inside_functions):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = node.module in ("mrcore", "mrcore.launchers", "mrcore.rpc")
            found += [
                (f"{node.module}.{alias.name}" if submodules else node.module, node.lineno) for alias in node.names
            ]
    return found


def unit_of(path: Path) -> str:
    """Give the name under which a file stands in FLOORS."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def check_floors(files: list[Path]) -> list[str]:
    """Give a line for every import that goes up, round in a circle, or to a library that is not for that module."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    faults, graph = [], {}
    for path in files:
        unit = unit_of(path)
        if unit == "__init__":
            continue
        if unit not in floor:
            faults.append(f"{path.name}: on no floor: add {unit!r} to FLOORS in {Path(__file__).name}")
            continue
        for name, line in imports(path):
            top = name.split(".")[0]
            if top in ONLY and unit not in ONLY[top]:
                faults.append(f"{path.name}:{line}: {top} may be imported by {', '.join(ONLY[top])} only")
            if top != "mrcore" or name.count(".") == 0:
                continue
            target = name.split(".")[1]
            if target in floor:
                graph.setdefault(unit, set()).add(target)
                if floor[target] > floor[unit]:
                    faults.append(f"{path.name}:{line}: floor {floor[unit]} imports {target} of floor {floor[target]}")
    for start in graph:
        seen, todo = set(), [target for target in graph[start] if target != start]
        while todo:
            unit = todo.pop()
            if unit == start:
                faults.append(f"{start}: imports itself in a circle")
                break
            if unit not in seen:
                seen.add(unit)
                todo += graph.get(unit, ())
    return faults


def check_daemons() -> list[str]:
    """Give a line for every heavy library that a daemon would load when it starts, with the way that leads there."""
    faults = []
    for daemon in DAEMONS:
        ways = {f"mrcore.{daemon}": daemon}
        todo = list(ways)
        while todo:
            module = todo.pop()
            path = PACKAGE.parent / (module.replace(".", "/") + ".py")
            for name, _ in imports(path, inside_functions=False) if path.exists() else ():
                top = name.split(".")[0]
                if top in HEAVY and top not in ways:
                    ways[top] = f"{ways[module]} → {top}"
                    faults.append(f"{daemon} loads {top}: {ways[top]}")
                elif top == "mrcore" and name not in ways:
                    ways[name] = f"{ways[module]} → {name.removeprefix('mrcore.')}"
                    todo.append(name)
    return faults


def check_sizes(files: list[Path]) -> list[str]:
    """Give a line for every module, function and package that is too long."""
    faults = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        if (count := text.count("\n")) > MAX_MODULE_LINES:
            faults.append(f"{path.name}: {count} lines, at most {MAX_MODULE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef)
                and (size := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
            ):
                faults.append(f"{path.name}:{node.lineno}: {node.name} has {size} lines, at most {MAX_FUNCTION_LINES}")
    if (total := sum(map(code_lines, files))) > MAX_CODE_LINES:
        faults.append(f"mrcore/ has {total} lines of code, at most {MAX_CODE_LINES}")
    print(f"mrcore/: {total} lines of code in {len(files)} modules")
    return faults


def main() -> int:
    """Check everything; give the exit status."""
    files = sorted(PACKAGE.rglob("*.py"))
    faults = check_sizes(files) + check_floors(files) + check_daemons()
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
