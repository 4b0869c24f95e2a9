"""Waiting with a deadline for a condition, instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest


def wait_until(condition: Callable[[], Any], deadline_seconds: float = 10.0, message: str = "the condition") -> Any:
    """Call `condition` until its result is true and return that; fail naming `message` at the deadline."""
    deadline = time.monotonic() + deadline_seconds
    pause_seconds = 0.002
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            pytest.fail(f"{message}: not true within {deadline_seconds} s (last: {result!r})")
        time.sleep(pause_seconds)
        pause_seconds = min(pause_seconds * 1.5, 0.1)
