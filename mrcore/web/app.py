"""The dashboard as one ASGI application, and the server that runs it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from mrcore.errors import ClusterFault, MrcoreError, UsageError
from mrcore.messages.kinds import PART_PATTERN
from mrcore.queue.scheduler import Scheduler
from mrcore.settings.config import Settings
from mrcore.system.paths import make_private, write_atomic
from mrcore.web import access, pages, views
from mrcore.web.connections import IDLE_SECONDS, Connection
from mrcore.web.live import Live, LiveResponse, Look
from mrcore.web.metrics import render


class _Job(StringConvertor):
    regex = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"  # no path: files are called by it


class _Run(StringConvertor):
    regex = r"[0-9]{1,12}"


class _Part(StringConvertor):
    regex = PART_PATTERN


for _name, _kind in {"job": _Job, "run": _Run, "part": _Part}.items():
    register_url_convertor(_name, _kind())
PORT = 8643
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # the text format that Prometheus always took
MAX_FORM_BYTES, MAX_FORM_FIELDS = 4_096, 10
MAX_CONNECTIONS = 100
END_SECONDS = 2  # that pages under way have when we are told to end
ACTIONS: dict[str, Callable[[Scheduler, str], object]] = {
    "pause": lambda scheduler, _: scheduler.pause(),
    "resume": lambda scheduler, _: scheduler.resume(),
    "cancel": lambda scheduler, name: scheduler.cancel(name),
    "requeue": lambda scheduler, name: scheduler.requeue(name),
    "delete": lambda scheduler, name: scheduler.delete_job(name),
}


class _QueueFile:
    """The queue's file as it was opened; SQLite goes on with it when it is moved away, and would make an empty one."""

    def __init__(self, path: Path) -> None:
        self._path, self._opened = path, path.stat()

    def require(self) -> None:
        """Raise ClusterFault when another one, or none, has its name by now."""
        with contextlib.suppress(OSError):
            if os.path.samestat(self._path.stat(), self._opened):
                return
        raise ClusterFault(
            f"the queue {self._path} is no longer the file that this dashboard has opened: bring it back, or start the "
            "dashboard again (on a deployed master, `systemctl restart mrcore-dashboard`)"
        )


class _Route(Route):
    """What is told of the queue, or done to it: nothing if its file is not there."""

    file: _QueueFile

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.file.require()
        await super().handle(scope, receive, send)


def make(
    settings: Callable[[], Settings], token: str, *, control: bool = False, names: Iterable[str] = ()
) -> access.Guard:
    """Return the dashboard of a cluster; `control`: with buttons that change the queue; `names`: see `Access`."""
    scheduler = Scheduler(settings())
    gate = access.Access(token, names)
    shown = views.Templates(control, gate.form_token, settings().cluster_name)
    here = pages.Pages(settings, scheduler, shown)
    live = Live(lambda before: Look(scheduler, before), here.elements)

    async def stream(request: Request) -> Response:
        return LiveResponse(live, request.query_params.get("job", "")[:100])

    async def metrics(request: Request) -> Response:
        return Response(await run_in_threadpool(render, settings()), media_type=METRICS_TYPE)

    async def act(request: Request) -> Response:
        if not control:
            raise HTTPException(403, "this dashboard only shows: `mrcore dashboard --control` may change the queue too")
        form = await _form(request)
        if not gate.may_act(request, form):
            raise HTTPException(403, "this was not sent by a page of this dashboard: load the page again")
        await run_in_threadpool(ACTIONS[request.url.path.rpartition("/")[2]], scheduler, form.get("name", ""))
        return RedirectResponse(_back(form.get("back", "/")), 303)

    async def refused(request: Request, error: Exception) -> Response:
        status, text = _told(request, error)
        return HTMLResponse(shown.part("error.html", status=status, text=text, here=""), status)

    told = [
        _Route("/", here.queue),
        _Route("/history", here.history),
        _Route("/nodes", here.nodes),
        _Route("/doctor", here.doctor),
        _Route("/jobs/{job:job}", here.job),
        _Route("/jobs/{job:job}/output", here.output),
        _Route("/jobs/{job:job}/parts/{part:part}", here.output),
        _Route("/jobs/{job:job}/runs/{run:run}", here.run),
        _Route("/jobs/{job:job}/runs/{run:run}/profile.svg", here.profile),
        _Route("/live", stream),
        _Route("/metrics", metrics),
        *(_Route(f"/actions/{name}", act, methods=["POST"], name=name) for name in ACTIONS),
    ]
    file = _QueueFile(scheduler.store.path)
    for route in told:
        route.file = file
    routes: list[BaseRoute] = [*told, Mount("/static", StaticFiles(directory=Path(__file__).parent / "static"))]
    handlers: Any = {MrcoreError: refused, HTTPException: refused}
    return access.Guard(Starlette(routes=routes, exception_handlers=handlers), gate)


def _told(request: Request, error: Exception) -> tuple[int, str]:
    """Return the status and the text of an answer to what cannot be done."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    text = getattr(error, "message", str(error))
    if isinstance(error, UsageError):
        return 409 if request.method == "POST" else 404, text
    return 503 if getattr(error, "retryable", False) else 500, text


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a small form."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise HTTPException(413, f"a form has {MAX_FORM_BYTES} bytes at most")
    try:
        return dict(parse_qsl(body.decode(), max_num_fields=MAX_FORM_FIELDS))
    except ValueError:
        raise HTTPException(400, "this is no form of the dashboard") from None


def _back(place: str) -> str:
    """Return where to go after an action: a page of ours, whatever the form says."""
    return place if place.startswith("/") and not place.startswith(("//", "/\\")) and place.isprintable() else "/"


@dataclass
class Server:
    """A dashboard that listens. `url` tells where, without the token."""

    settings: Callable[[], Settings]
    address: str = "127.0.0.1"
    port: int = PORT
    control: bool = False
    token_file: Path | None = None
    names: tuple[str, ...] = ()
    url: str = field(init=False, default="")

    def __post_init__(self) -> None:
        """Listen. Raises UsageError."""
        state_dir = self.settings().state_dir
        make_private(state_dir)
        self.token = access.read_token(self.token_file or token_file(state_dir))
        is_v6 = ":" in self.address
        try:
            self._socket = socket.create_server(
                (self.address, self.port), family=socket.AF_INET6 if is_v6 else socket.AF_INET
            )
        except OSError as error:
            raise UsageError(
                f"the dashboard cannot listen on {self.address}, port {self.port}: {error.strerror}; --port chooses "
                "another one"
            ) from None
        self.port = self._socket.getsockname()[1]
        host = f"[{self.address}]" if is_v6 else self.address
        self.url = f"http://{host}:{self.port}/"
        self._note = state_dir / "dashboard.url"
        app = make(self.settings, self.token, control=self.control, names=(*self.names, host))
        config = uvicorn.Config(
            app, loop="asyncio", http=Connection, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=END_SECONDS,
        )  # fmt: skip
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Note where, for `url_with_token`, and serve until SIGTERM or SIGINT."""
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn ends in its own way, then calls this
        try:
            write_atomic(self._note, self.url.encode() + b"\n", 0o600)
            self._server.run(sockets=[self._socket])
        finally:
            with contextlib.suppress(OSError):
                if self._note.read_text() == f"{self.url}\n":  # else that of one which was started later
                    self._note.unlink()


def token_file(state_dir: Path) -> Path:
    """Return the usual place of the token."""
    return state_dir / "dashboard.token"


def url_with_token(state_dir: Path, file: Path | None) -> str:
    """Return the address of the dashboard that runs, with the token. Raises UsageError when none does."""
    try:
        url = (state_dir / "dashboard.url").read_text(encoding="ascii").strip()
    except OSError:
        raise UsageError(
            "no dashboard runs here: `mrcore dashboard` starts one; on a deployed master, `mrcore_dashboard: true` in "
            "the inventory and `make deploy`"
        ) from None
    return f"{url}?token={access.read_token(file or token_file(state_dir))}"
