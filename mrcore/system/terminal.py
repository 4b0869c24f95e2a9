"""How a command ends: standard streams that are closed, full or cannot write a letter, and one line for each error.

All that a command prints goes through `_Stream`, so that no terminal obeys what a name or an error holds. Only `rich`,
which sends control sequences of its own, gets the stream underneath (`raw`), and cleaned texts.
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrcore import text
from mrcore.errors import MrcoreError, UsageError


class _Stream:
    """A text stream whose errors say which stream it is; else the stream itself.

    `clean`: texts from outside go to it, so what a terminal would obey is escaped.
    """

    encoding = "utf-8"  # else click replaces the stream of an ASCII locale by one of its own

    def __init__(self, stream: Any, name: str, clean: bool) -> None:
        self.stream, self._name, self._clean = stream, name, clean

    def write(self, content: str) -> int:
        """Write what is fit to be written."""
        return int(self._do(self.stream.write, text.escaped(content) if self._clean else content))

    def flush(self) -> None:
        """Have what was written taken by the reader."""
        self._do(self.stream.flush)

    def raw(self) -> _Stream:
        """Return the same without cleaning."""
        return _Stream(self.stream, self._name, clean=False)

    def _do(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return operation(*arguments)
        except OSError as error:
            error.filename = self._name
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def raw(stream: Any) -> Any:
    """Return the stream underneath, for `rich`."""
    return stream.raw() if isinstance(stream, _Stream) else stream


def speaks_unicode(stream: Any) -> bool:
    """Return whether a stream can write every letter as itself."""
    return str(getattr(stream, "stream", stream).encoding).lower().replace("-", "") == "utf8"


class JsonOutput:
    """Takes UTF-8 JSON text as bytes and writes it to standard output so that no terminal obeys any of it."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def write(self, content: bytes) -> int:
        """Write the whole characters of what came so far."""
        sys.stdout.write(text.json_text(self._decode(content)))
        return len(content)


def run(command: Callable[[], int | None]) -> int:
    """Call a command and return its exit status: what it returns, 1 (it failed), 2 (asked wrongly), 130 (Ctrl-C).

    Whatever it raises becomes one line on standard error, if that can be written; nothing is raised here.
    """
    _open_closed_streams()
    for name in ("COLUMNS", "LINES"):
        if not os.environ.get(name, "").isascii():  # rich takes "²" for a number
            del os.environ[name]
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    for stream in before:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # what logs where nothing was set up, as in a Runner
        logging.lastResort.setFormatter(LineFormatter("mrcore: %(message)s"))
    sys.stdout = _Stream(sys.stdout, "standard output", clean=True)
    sys.stderr = _Stream(sys.stderr, "standard error", clean=True)
    try:
        status = _status(command)
    finally:
        for number, stream in enumerate(before, 1):
            discard_output(stream, number, only_if_broken=True)
        sys.stdout, sys.stderr = before
    return status


def _status(command: Callable[[], int | None]) -> int:
    status = 1
    try:
        answer = command() or 0
        sys.stdout.flush()
        return answer
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mrcore cat JOB | head`: nobody reads on: quiet, as click is about it
        return 1
    except MrcoreError as error:
        message, status = error.message, 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        message = _os_error_text(error)
    except UnicodeEncodeError as error:
        message = f"{error.object[:200]!r} {text.unfit(error.object) or f'cannot be said in {error.encoding}'}"
    except Exception as error:  # noqa: BLE001  a fault of ours: one line, and where to look
        if os.environ.get("MRCORE_TRACEBACK"):
            traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}, line {last.lineno}"
        what = f"internal error: {text.type_name(error)}: {text.one_line(error, 300)} ({place})"
        message = f"{what}: a fault of mrcore; MRCORE_TRACEBACK=1 shows the way there"
    print_error(message)
    return status


def _os_error_text(error: OSError) -> str:
    what = error.strerror or text.one_line(error)
    if error.filename is not None:
        return f"{text.one_line(error.filename, 500)}: {what}"
    try:
        os.getcwd()
    except OSError:
        return "the current folder does not exist any more: change to another one"
    return what


def print_error(message: str) -> None:
    """Write one message to standard error, if anybody can be reached there."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"mrcore: {text.message(message)}\n")
        sys.stderr.flush()


def discard_output(stream: Any, number: int, only_if_broken: bool = False) -> None:
    """Have what is, or will be, written to a stream (1: standard output, 2: error) go nowhere: nobody takes it."""
    with contextlib.suppress(OSError, ValueError):
        try:
            stream.flush()
            if only_if_broken:
                return
        except OSError:
            pass
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        stream.flush()  # what it still holds


def _open_closed_streams() -> None:
    """Give descriptors 0 to 2 that the caller closed to /dev/null: the next file opened would become one of them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, hence this one
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


class LineFormatter(logging.Formatter):
    """Log lines in which no argument can pass for a line or a control sequence."""

    def __init__(self, form: str = "%(asctime)s %(name)s %(levelname)s %(message)s") -> None:
        super().__init__(form)

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line, with a traceback as indented lines behind it."""
        try:
            message = record.getMessage()
        except Exception as error:  # noqa: BLE001  an argument that cannot be shown
            message = f"{record.msg} ({text.type_name(error)})"
        record.message, record.asctime = text.one_line(message), self.formatTime(record)
        line = self.formatMessage(record)
        if record.exc_info:
            line += "\n" + text.clean(self.formatException(record.exc_info))
        return line.replace("\n", "\n  ")


def log_to(stream: Any = None, level: int = logging.INFO) -> None:
    """Have this process write its log to a stream; None: standard error."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler])
