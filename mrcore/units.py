"""Numbers with their units, as people read them."""

from __future__ import annotations


def size(count: float | None) -> str:
    """Return a number of bytes in the unit that keeps it short; an empty text for None."""
    if count is None:
        return ""
    power = min(4, max(0, int(abs(count)).bit_length() - 1) // 10)
    unit, amount = ("B", "KiB", "MiB", "GiB", "TiB")[power], count / 1024**power
    return f"{amount:.0f} {unit}" if power == 0 or amount >= 100 else f"{amount:.1f} {unit}"


def percent(fraction: float) -> str:
    """Return a fraction in per cent."""
    return f"{100 * fraction:.0f} %"


def seconds(length: float | None) -> str:
    """Return a length of time; an empty text for None."""
    if length is None:
        return ""
    if length < 10:
        return f"{length:.1f} s"
    if length < 60:
        return f"{length:.0f} s"
    minutes, rest = divmod(round(length), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
