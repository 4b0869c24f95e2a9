"""How files and notebook cells are called where errors name them."""

from __future__ import annotations

from typing import Any


def shell() -> Any:
    """Return IPython's shell if this process has one, else None. Loads nothing."""
    import sys

    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None


def place_of(file: str) -> str:
    """Return a file's name, or `cell In[3]` for what IPython compiles a cell as."""
    running = shell()
    named = running.compile.format_code_name(file) if running is not None else None
    return file if named is None else f"{named[0].lower()} {named[1]}"
