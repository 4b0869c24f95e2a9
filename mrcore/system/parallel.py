"""One way to work on many nodes, or other items, at the same time: bounded, and ended by the first error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

TICK_SECONDS = 0.2

Item = TypeVar("Item")
Result = TypeVar("Result")


def on_nodes(
    nodes: Iterable[Item],
    work: Callable[[Item], Result],
    at_once: int,
    tick: Callable[[], object] | None = None,
    abort: Callable[[], object] | None = None,
) -> list[Result]:
    """Return `work(node)` of every node, in their order; at most `at_once` threads work at a time.

    `tick` is called in between, in the caller's thread. The first error, of `work` or of `tick`, ends it: what has not
    begun does not begin, what is under way is waited for, unless `abort` ends it.
    """
    pool = ThreadPoolExecutor(at_once, "node")
    futures = [pool.submit(work, node) for node in nodes]
    waiting = set(futures)
    try:
        while waiting:
            done, waiting = wait(waiting, TICK_SECONDS if tick else None, FIRST_EXCEPTION)
            for future in done:
                future.result()
            if tick:
                tick()
    except BaseException:
        pool.shutdown(wait=abort is None, cancel_futures=True)
        if abort:
            abort()
            wait(futures, TICK_SECONDS)
        raise
    pool.shutdown(wait=False)
    return [future.result() for future in futures]
