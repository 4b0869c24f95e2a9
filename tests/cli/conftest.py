"""What tests of commands share: the queue of the home in which they run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import load_settings


@pytest.fixture
def scheduler(home: Path) -> Iterator[Scheduler]:
    """The queue, which is whole at the end of the test."""
    made = Scheduler(load_settings())
    yield made
    made.store.check()
    made.store.close()
