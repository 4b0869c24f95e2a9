"""Where a task of a job with `profile` spends its time: the stack of its main thread, a hundred times a second.

While the task computes, the kernel's timer of its processor time (SIGPROF) takes the samples: a thread would have to
wait until the main thread lets go of the interpreter, and so would see mostly calls of the system. While it waits, that
timer stands still, and a thread takes them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from mrcore.messages.tasks import MAX_STACKS
from mrcore.text import one_line

SAMPLE_SECONDS = 0.01
LATE_SECONDS = 0.001  # of the thread: the main one computed when it was to look
MAX_FRAMES, MAX_FRAME = 100, 99  # of a stack, from its root on; characters of one, so that a stack is a `tasks.Stack`
MAX_PROFILE_BYTES = 4 << 20  # of all stacks of a task; the rare ones are counted together then
OTHERS = "(other stacks)"
_HOME = str(Path(__file__).parents[2])


class Sampler:
    """Samples the stack of the main thread, which enters it, below the frame that does so. Use as a context manager."""

    def __init__(self) -> None:
        # By the identity of the code in each frame, the leaf first: code is equal to that of another file. (): no room.
        self._stacks: Counter[tuple[int, ...]] = Counter()
        self._codes: dict[int, CodeType] = {}
        self._thread_id = self._native_id = 0
        self._root: FrameType | None = None
        self._before: Any = None  # what SIGPROF did
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="profile", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread_id, self._native_id, self._root = (
            threading.get_ident(),
            threading.get_native_id(),
            sys._getframe(1),
        )
        self._before = signal.signal(signal.SIGPROF, lambda _, frame: self._take(frame))
        signal.siginterrupt(signal.SIGPROF, False)  # libraries that know of no interrupted calls are not to meet any
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_SECONDS, SAMPLE_SECONDS)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, signal.SIG_IGN)  # drops one that is on its way, which would end the process
        signal.signal(signal.SIGPROF, self._before or signal.SIG_DFL)
        self._end.set()
        self._thread.join()
        self._root = None

    def _watch(self) -> None:
        """Take a sample of each interval in which the main thread mostly waited.

        While it computes, this thread is let in late, and where the main thread happens to let go of the interpreter:
        then the stack that was seen before is the one that it waited in.
        """
        seconds, busy, before = time.monotonic(), self._busy_seconds(), list[CodeType]()
        while not self._end.wait(SAMPLE_SECONDS):
            passed, was_busy = time.monotonic() - seconds, self._busy_seconds() - busy
            seconds, busy = seconds + passed, busy + was_busy
            is_late = passed > SAMPLE_SECONDS + LATE_SECONDS
            stack = [] if is_late and before else self._stack(sys._current_frames().get(self._thread_id))
            if was_busy < passed / 2:
                self._count(stack or before)
            before = [] if is_late else stack

    def _busy_seconds(self) -> float:
        """Return how long the main thread has computed, or waited for a processor that others had."""
        with contextlib.suppress(OSError, ValueError):
            computed, waited, _ = Path(f"/proc/self/task/{self._native_id}/schedstat").read_text().split()
            return (int(computed) + int(waited)) / 1e9
        return time.process_time()

    def _take(self, frame: FrameType | None) -> None:
        """Count a stack. No frame, with all that it refers to, is held when this returns."""
        self._count(self._stack(frame))

    def _stack(self, frame: FrameType | None) -> list[CodeType]:
        """Return the code in each frame, the leaf first, up to where the sampler was entered."""
        codes: list[CodeType] = []
        while frame is not None and frame is not self._root:
            codes.append(frame.f_code)
            frame = frame.f_back
        return codes[-MAX_FRAMES:]

    def _count(self, codes: list[CodeType]) -> None:
        stack = tuple(map(id, codes))
        if stack not in self._stacks:
            if len(self._stacks) < MAX_STACKS - 1:
                self._codes.update(zip(stack, codes, strict=True))
            else:
                stack = ()
        self._stacks[stack] += 1

    def stacks(self) -> dict[str, int]:
        """Return the samples by stack: `function (file:line)` from the root on, joined by ";"."""
        roots = sorted({_HOME, *sys.path} - {""}, key=len, reverse=True)
        names = {number: _name(code, roots) for number, code in self._codes.items()}
        told: Counter[str] = Counter()
        room = MAX_PROFILE_BYTES
        for codes, count in self._stacks.most_common():
            stack = ";".join(names[code] for code in reversed(codes)) or OTHERS
            room -= 0 if stack in told else len(stack.encode("ascii", "backslashreplace"))
            told[stack if room >= 0 else OTHERS] += count
        return dict(told)


def _name(code: CodeType, roots: list[str]) -> str:
    """Return how a frame is called; `line` is that of the function's definition, so all its samples are one frame."""
    file = code.co_filename
    root = next((root for root in roots if file.startswith(root.rstrip(os.sep) + os.sep)), None)
    file = file if root is None else file[len(root.rstrip(os.sep)) + 1 :]
    name = f"{code.co_qualname[:50]} ({file[-40:]}:{code.co_firstlineno})"
    return one_line(name, 200).replace(";", ",")[:MAX_FRAME]
