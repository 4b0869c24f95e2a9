"""Fails when a module, a function or a package grows past its limit.

Modules and functions are counted in lines of the file; packages in lines of code, that is without blank lines,
comments and docstrings, so that nobody is tempted to save on documentation. Which package may import which is checked
by import-linter (pyproject.toml).
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mrcore"
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 500, 70
# Lines of code. `engine` and `cluster` together are what a newcomer reads in a day: at most 3,600.
# Raise a number only together with what docs/architecture.md says of it. "": the modules of no package.
BUDGETS = {
    "": 295,
    "admin": 785,
    "cli": 1_870,
    "cluster": 1_205,
    "demo": 410,
    "engine": 2_440,
    "face": 865,
    "launchers": 775,
    "messages": 475,
    "node": 1_315,
    "project": 240,
    "queue": 2_340,
    "settings": 440,
    "state": 1_780,
    "system": 1_310,
    "transfer": 520,
    "web": 1_070,
    "wire": 1_190,
}
DAY = ("engine", "cluster")
MAX_DAY_LINES = 3_600


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


def package_of(path: Path) -> str:
    """Return the key of BUDGETS under which a file counts."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else ""


def check_file(path: Path) -> list[str]:
    """Return a line for the module and each of its functions that is too long."""
    text = path.read_text(encoding="utf-8")
    errors = []
    if (count := text.count("\n")) > MAX_MODULE_LINES:
        errors.append(f"{path.name}: {count} lines, at most {MAX_MODULE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.FunctionDef)
            and (size := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
        ):
            errors.append(f"{path.name}:{node.lineno}: {node.name} has {size} lines, at most {MAX_FUNCTION_LINES}")
    return errors


def check_packages(files: list[Path]) -> list[str]:
    """Return a line for each package that is too long, that has no budget, or that has no README; print them all."""
    lines = dict.fromkeys(BUDGETS, 0)
    for path in files:
        lines[package_of(path)] = lines.get(package_of(path), 0) + code_lines(path)
    errors = []
    for name, count in sorted(lines.items()):
        budget = BUDGETS.get(name)
        if budget is None:
            errors.append(f"mrcore/{name} has no budget: add it to BUDGETS in {Path(__file__).name}")
        elif count > budget:
            errors.append(f"mrcore/{name} has {count} lines of code, at most {budget}")
        if name and not (PACKAGE / name / "README.md").exists():
            errors.append(f"mrcore/{name} has no README.md")
        print(f"{count:>6} of {budget or 0:>6}  mrcore/{name}")
    if (day := sum(lines[name] for name in DAY)) > MAX_DAY_LINES:
        errors.append(f"{' and '.join(DAY)} have {day} lines of code together, at most {MAX_DAY_LINES}")
    print(f"{sum(lines.values()):>6} lines of code in {len(files)} modules")
    return errors


def main() -> int:
    """Check everything; return the exit status."""
    files = sorted(PACKAGE.rglob("*.py"))
    errors = [line for path in files for line in check_file(path)] + check_packages(files)
    for line in errors:
        print(line)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
