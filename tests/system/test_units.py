"""Sizes and times as people read them."""

from __future__ import annotations

import pytest

from mrcore import units


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 << 10, "150 KiB"), (48 << 30, "48.0 GiB"),
        (1 << 50, "1024 TiB"), (None, ""),
    ],
)  # fmt: skip
def test_bytes_for_people(count: int | None, text: str) -> None:
    assert units.size(count) == text


@pytest.mark.parametrize(
    ("length", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59, "59 s"),
        (60, "1 min 00 s"),
        (3_599.6, "1 h 00 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_times_for_people(length: float, text: str) -> None:
    assert units.seconds(length) == text


def test_per_cent_is_whole() -> None:
    assert [units.percent(fraction) for fraction in (0, 0.426, 1)] == ["0 %", "43 %", "100 %"]
