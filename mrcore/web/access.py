"""Who may look, and who may act: the token, its cookie, the checks of Host and Origin, the headers of every answer.

The dashboard speaks plain HTTP on a loopback address, where every account of the machine and every page in the user's
browser can reach it. So nothing is answered without the token; a page of another site can neither read (Host,
SameSite) nor act (Origin, a token in each form).
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mrcore.errors import UsageError

TOKEN_BYTES = 32
MIN_TOKEN_CHARACTERS = 32
MAX_URL_BYTES = 4_096
ALWAYS = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    # No script, style or picture but our own files; nothing may show us in a frame.
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # not no-referrer: with that, browsers send no Origin that can be compared
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def read_token(file: Path) -> str:
    """Return the token in a file, which is made with a new one if it is not there. Raises UsageError."""
    try:
        if not file.exists():
            _make_token(file)
        status = file.stat()
        if os.geteuid() not in (0, status.st_uid):
            raise UsageError(f"the token {file} is another account's, who knows it: remove it, or name another file")
        if status.st_mode & 0o077:
            raise UsageError(f"others may read the token {file}: `chmod 600 {file}`, or remove it to get a new one")
        token = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the dashboard's token {file}: {error}; remove it to get a new one") from None
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isprintable() or " " in token:
        raise UsageError(f"{file} holds no token of {MIN_TOKEN_CHARACTERS} characters: remove it to get a new one")
    return token


def _make_token(file: Path) -> None:
    """Have a token in a file that nobody else could prepare; of two who make one at the same time, the first wins."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # of mode 0600, under a new name
    try:
        with open(descriptor, "w", encoding="ascii") as stream:
            stream.write(f"{secrets.token_urlsafe(TOKEN_BYTES)}\n")
            stream.flush()
            os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(partial, file)
    finally:
        os.unlink(partial)


class Access:
    """What a request must bring. `names`: of hosts, beside those of this machine itself, by which it may be called."""

    def __init__(self, token: str, names: Iterable[str] = ()) -> None:
        self._token, self._names = token, {*ALWAYS, *(name.lower() for name in names)}
        self._session, self.form_token = (self._derived(what) for what in ("session", "form"))
        # Browsers share cookies between the ports of a machine, and tunnels give dashboards of many masters one port.
        self.cookie = f"mrcore_{self._derived('cookie')[:12]}"
        self._metrics = self._derived("metrics")  # what Prometheus is given: it opens nothing else

    def _derived(self, what: str) -> str:
        return hmac.digest(self._token.encode(), what.encode(), "sha256").hex()

    def knows_host(self, host: str) -> bool:
        """Return whether a Host header names us, on whatever port a tunnel has. Else a foreign name leads here."""
        name, colon, port = host.rpartition(":")
        if not colon or not port.isdecimal():
            name = host
        return name.lower() in self._names

    def is_token(self, given: str) -> bool:
        """Return whether a text is the token, in a time that tells nothing of it."""
        return _same(given, self._token)

    def may_look(self, request: Request) -> bool:
        """Return whether a request brings the token, or the cookie that it was exchanged for."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            of_metrics = request.url.path == "/metrics" and _same(given.strip(), self._metrics)
            return of_metrics or self.is_token(given.strip())
        return _same(request.cookies.get(self.cookie, ""), self._session)

    def may_act(self, request: Request, form: dict[str, str]) -> bool:
        """Return whether a request that may look comes from a form of ours, or from a script that has the token."""
        if "authorization" in request.headers:  # no page of another site can send that
            return True
        ours = f"{request.url.scheme}://{request.headers.get('host', '')}"
        return request.headers.get("origin") == ours and _same(form.get("form_token", ""), self.form_token)

    def let_in(self, response: Response) -> None:
        """Give a browser the cookie."""
        response.set_cookie(self.cookie, self._session, httponly=True, samesite="strict")


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), wanted.encode())


class Guard:
    """The app around the app: refuses whom `Access` does, exchanges a token in the address, adds HEADERS."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *(pair for pair in more if pair[0] not in given)]
            await send(message)

        answer = self._answer(Request(scope))
        await (answer or self._app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """Return what is answered at once; None: the request may be served."""
        if not self._access.knows_host(request.headers.get("host", "")):
            return PlainTextResponse("no dashboard goes by this name; --host-name adds one\n", 421)
        if len(request.scope["raw_path"]) + len(request.scope["query_string"]) > MAX_URL_BYTES:
            return PlainTextResponse("this address is too long\n", 414)
        if (given := request.query_params.get("token")) is not None and request.method == "GET":
            if not self._access.is_token(given):
                return _forbidden()
            others = urlencode([pair for pair in request.query_params.multi_items() if pair[0] != "token"])
            path = "/" + request.url.path.lstrip("/")  # "//elsewhere/" would be another host
            response = RedirectResponse(path + (f"?{others}" if others else ""), 303)
            self._access.let_in(response)
            return response
        return None if self._access.may_look(request) else _forbidden()


def _forbidden() -> Response:
    text = "403: the token is missing or wrong.\n\n`mrcore dashboard --show-url` prints the address with the token.\n"
    return PlainTextResponse(text, 403)
