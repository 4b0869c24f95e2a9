"""Work on many nodes at once: order, bound, and what the first error ends."""

from __future__ import annotations

import threading
import time

import pytest

from mrcore.system.parallel import on_nodes


def test_results_come_in_order_and_no_more_work_at_a_time_than_may() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def work(number: int) -> int:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01 * (number % 3))
        with lock:
            now[0] -= 1
        return number * number

    assert on_nodes(range(20), work, 3) == [number * number for number in range(20)]
    assert most[0] == 3
    assert on_nodes([], work, 3) == []


def test_the_first_error_ends_the_rest_and_what_is_under_way_is_waited_for() -> None:
    begun: list[int] = []
    ended: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            time.sleep(0.05)
            raise ValueError("the first")
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(ValueError, match="the first"):
        on_nodes(range(10), work, 2)
    assert 2 <= len(begun) <= 4 and sorted(ended) == sorted(begun)[1:]


@pytest.mark.parametrize("who", ["work", "tick"])
def test_abort_ends_what_is_under_way(who: str) -> None:
    stop = threading.Event()

    def work(number: int) -> None:
        if number == 0 and who == "work":
            raise ValueError("ended")
        assert stop.wait(30), "nobody aborted this"

    def tick() -> None:
        if who == "tick":
            raise ValueError("ended")

    begun = time.monotonic()
    with pytest.raises(ValueError, match="ended"):
        on_nodes(range(4), work, 2, tick, stop.set)
    assert stop.is_set() and time.monotonic() - begun < 10
