"""Who may look at the dashboard, who may act, and what no request can do."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import CODE, mrcore
from conditions import wait_until
from dashboards import Dashboard, dashboard, fill, settings_of

from mrcore.errors import UsageError
from mrcore.state.store import Store
from mrcore.web import access

PAGES = [
    "/", "/history", "/nodes", "/doctor", "/jobs/clicks_per_user", "/jobs/broken_dates/runs/1", "/live", "/metrics",
    "/static/style.css", "/nothing",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shown")


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[Store]:
    store = fill(settings_of(folder))
    yield store
    store.check()
    store.close()


@pytest.fixture(scope="module")
def shown(folder: Path, store: Store) -> Iterator[Dashboard]:
    with dashboard(folder) as running:
        yield running


@pytest.fixture(scope="module")
def control(folder: Path, store: Store, shown: Dashboard) -> Iterator[Dashboard]:
    with dashboard(folder, "--control", "--host-name", "Master.example") as running:
        yield running


def cookie_of(where: Dashboard) -> str:
    """What a browser gets for the token."""
    return where.ask(f"/?token={where.token}", token=False).headers["set-cookie"].split(";")[0]


def form_token(where: Dashboard) -> str:
    found = re.search(r'name="form_token" value="([0-9a-f]{64})"', where.ask("/").text)
    assert found
    return found[1]


@pytest.mark.parametrize("path", PAGES)
def test_without_the_token_there_is_nothing(shown: Dashboard, path: str) -> None:
    refused = [
        shown.ask(path, token=False),
        shown.ask(path, token=False, authorization=f"Bearer {shown.token[:-1]}"),
        shown.ask(path, token=False, authorization="Bearer "),
        shown.ask(path, token=False, authorization=f"Basic {shown.token}"),
        shown.ask(path, token=False, cookie=f"{cookie_of(shown).partition('=')[0]}={shown.token}"),
        shown.ask(f"{path}?token={'x' * 43}", token=False),
        shown.ask(f"{path}?token=", token=False),
    ]
    assert {answer.status for answer in refused} == {403}
    assert len({answer.text for answer in refused}) == 1
    assert not any("clicks_per_user" in answer.text for answer in refused)


def test_the_token_in_the_address_becomes_a_cookie_and_leaves_the_address(shown: Dashboard) -> None:
    answer = shown.ask(f"/history?job=a%26b&token={shown.token}&page=2", token=False)
    assert (answer.status, answer.headers["location"]) == (303, "/history?job=a%26b&page=2")
    name, *flags = answer.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "Path=/"} <= set(flags) and "samesite=strict" in {flag.lower() for flag in flags}
    assert shown.token not in name
    assert shown.ask("/", token=False, cookie=name).status == 200
    assert shown.ask("/", token=False, cookie=name[:-1] + ("0" if name[-1] != "0" else "1")).status == 403


def test_the_way_back_never_leads_to_another_host(shown: Dashboard, control: Dashboard) -> None:
    assert shown.ask(f"//evil.example/?token={shown.token}", token=False).headers["location"] == "/evil.example/"
    for back in ("//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nb: c", ""):
        answer = control.ask("/actions/resume", "POST", f"back={access.urlencode({'': back})[1:]}")
        assert (answer.status, answer.headers["location"]) == (303, "/"), back


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("localhost:9000", 200), ("[::1]:9000", 200), ("LOCALHOST", 200),
        ("evil.example", 421), ("evil.example:8643", 421), ("127.0.0.1.evil.example", 421), ("", 421),
        ("master.example", 421), ("localhost@evil.example", 421),
    ],
)  # fmt: skip
def test_only_names_of_this_machine_are_answered(shown: Dashboard, host: str, status: int) -> None:
    """So a page whose name an attacker has lead to 127.0.0.1 learns nothing, not even with the token."""
    assert shown.ask("/history", host=host).status == status


def test_further_names_can_be_given(control: Dashboard) -> None:
    assert control.ask("/history", host="master.example:1234").status == 200


def test_every_answer_forbids_what_is_not_ours(shown: Dashboard) -> None:
    answers = [shown.ask(path) for path in PAGES if path not in ("/live", "/metrics")]
    answers += [shown.ask("/", token=False), shown.ask("/", host="evil.example")]
    for answer in answers:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in answer.headers and "server" not in answer.headers


def test_it_only_shows_unless_control_is_given(shown: Dashboard, store: Store) -> None:
    assert '<form method="post"' not in shown.ask("/").text
    assert shown.ask("/actions/pause", "POST", "").status == 403
    assert not store.get("paused")


def test_a_button_needs_the_cookie_its_origin_and_the_token_of_the_form(control: Dashboard, store: Store) -> None:
    origin, cookie, secret = control.url.rstrip("/"), cookie_of(control), form_token(control)
    whole = {"cookie": cookie, "origin": origin}
    body = f"form_token={secret}&name=&back=/history"
    wrong = [
        ({"origin": origin}, body),
        ({"cookie": cookie}, body),
        (whole | {"origin": "http://evil.example"}, body),
        (whole | {"origin": "null"}, body),
        (whole | {"origin": origin.replace("http:", "https:")}, body),
        (whole, "name=&back=/"),
        (whole, body.replace(secret, "0" * 64)),
        (whole, body.replace(secret, secret[:-1] + "é")),
    ]
    for headers, sent in wrong:
        encoded = sent.encode().decode("latin-1")
        assert control.ask("/actions/pause", "POST", encoded, token=False, **headers).status == 403, (headers, sent)
        assert not store.get("paused")
    done = control.ask("/actions/pause", "POST", body, token=False, **whole)
    assert (done.status, done.headers["location"]) == (303, "/history") and store.get("paused")
    assert control.ask("/actions/resume", "POST", body, token=False, **whole).status == 303 and not store.get("paused")


def test_a_script_acts_with_the_token(control: Dashboard, store: Store) -> None:
    assert control.ask("/actions/delete", "POST", "name=top_pages").status == 303
    assert (row := store.job("top_pages")) and row.cause == "deleted"
    assert control.ask("/actions/requeue", "POST", "name=broken_dates").status == 303
    assert (row := store.job("broken_dates")) and row.state == "queued"
    assert control.ask("/actions/cancel", "POST", "name=clicks_per_user").status == 303
    assert (run := store.running()) and run.cancel
    refused = control.ask("/actions/cancel", "POST", "name=sessions")
    assert refused.status == 409 and "is not running" in refused.text
    assert control.ask("/actions/forget", "POST", "").status == 404
    assert control.ask("/actions/pause").status == 405


def test_what_is_sent_is_bounded(control: Dashboard) -> None:
    assert control.ask("/actions/pause", "POST", "a" * 5_000).status == 413
    assert control.ask("/actions/pause", "POST", "&".join(f"a{number}=1" for number in range(50))).status == 400
    assert control.ask("/actions/pause", "POST", "a=\xff").status in (303, 400)
    assert control.ask("/actions/resume", "POST", "").status == 303
    assert control.ask(f"/history?job={'a' * 5_000}").status == 414


@pytest.mark.parametrize(
    "path",
    [
        "/static/../access.py", "/static/%2e%2e/access.py", "/static/..%2faccess.py", "/jobs/../../etc/passwd",
        "/jobs/%2e%2e", "/jobs/..%2f..%2fqueue.sqlite/output", "/jobs/.hidden", "/jobs/a%00b", "/jobs/a/parts/..%2fx",
        "/jobs/broken_dates/runs/1/../../../x", "/jobs/a/runs/-1", "/jobs/a/runs/9999999999999999999999",
        "/jobs/%2e%2e/runs/1/profile.svg", "/jobs/broken_dates/runs/2/profile.svg",
    ],
)  # fmt: skip
def test_no_path_leads_out(shown: Dashboard, path: str) -> None:
    answer = shown.ask(path)
    assert answer.status == 404 and "root:" not in answer.text and "Traceback" not in answer.text


def test_it_listens_on_the_loopback_address_only(shown: Dashboard) -> None:
    port = int(shown.url.rstrip("/").rsplit(":", 1)[1])
    listening = []
    for name in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
        listening += [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


def test_the_token_is_the_owners_alone_and_in_no_output(shown: Dashboard, folder: Path) -> None:
    file = shown.state_dir / "dashboard.token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(shown.token) >= 43
    told = shown.log.read_text()
    assert shown.url in told and shown.token not in told


def test_show_url_prints_the_address_of_the_one_that_runs(tmp_path: Path) -> None:
    settings_of(tmp_path)
    show = ["--config", str(tmp_path / "settings.yml"), "dashboard", "--show-url"]
    status, _, told = mrcore(*show)
    assert status == 2 and "no dashboard runs here" in told
    with dashboard(tmp_path) as running:
        assert mrcore(*show) == (0, f"{running.url}?token={running.token}\n", "")
    assert mrcore(*show)[0] == 2, "it has ended"
    with dashboard(tmp_path) as again:
        assert again.token == running.token


def test_a_token_of_ones_own(tmp_path: Path) -> None:
    settings_of(tmp_path)
    file = tmp_path / "secret"
    file.write_text("s" * 40 + "\n")
    file.chmod(0o600)
    with dashboard(tmp_path, "--token-file", str(file)) as running:
        assert not (running.state_dir / "dashboard.token").exists()
        assert running.ask("/", token=False, authorization=f"Bearer {'s' * 40}").status == 200


@pytest.mark.parametrize(("content", "mode"), [("s" * 40, 0o640), ("short", 0o600), ("", 0o600), ("s " * 30, 0o600)])
def test_a_token_that_others_know_or_guess_is_refused(tmp_path: Path, content: str, mode: int) -> None:
    file = tmp_path / "token"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(UsageError, match="token"):
        access.read_token(file)


def test_a_port_that_is_taken_is_told_in_a_line(shown: Dashboard, folder: Path) -> None:
    port = shown.url.rstrip("/").rsplit(":", 1)[1]
    status, _, told = mrcore("--config", str(folder / "settings.yml"), "dashboard", "--port", port)
    assert status == 2 and told.count("\n") == 1 and "--port chooses another" in told


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    settings_of(tmp_path)
    command = [sys.executable, "-c", CODE, "--config", str(tmp_path / "settings.yml"), "dashboard", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as started:
        note = tmp_path / "home/state/dashboard.url"
        wait_until(note.exists, 60, "it listens")
        os.kill(started.pid, signal.SIGINT)
        assert started.stderr and "Traceback" not in started.stderr.read()
        assert started.wait(30) == 130 and not note.exists()


def test_all_who_start_at_the_same_time_have_the_same_token(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    for number in range(20):
        file = tmp_path / f"token-{number}"
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda _, file=file: access.read_token(file), range(8)))
        assert found == {file.read_text().strip()}
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(list(tmp_path.iterdir())) == 20, "nothing is left beside them"


def test_nobody_can_prepare_the_file_of_a_token(tmp_path: Path) -> None:
    """In a folder that others may write into: by a link, or by what a file that is half written is called."""
    prepared, elsewhere = tmp_path / "token.partial", tmp_path / "elsewhere"
    prepared.write_text("")
    prepared.chmod(0o666)
    access.read_token(tmp_path / "token")
    assert prepared.read_text() == ""
    (tmp_path / "link").symlink_to(elsewhere)
    with pytest.raises(UsageError):
        access.read_token(tmp_path / "link")
    assert not elsewhere.exists()


def test_a_token_of_another_account_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access.read_token(tmp_path / "token")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UsageError, match="is another account's, who knows it: remove it, or name another file"):
        access.read_token(tmp_path / "token")


def test_dashboards_of_several_clusters_do_not_take_each_others_cookie() -> None:
    """A browser sends a host's cookies to all its ports, and tunnels lead one host to many masters."""
    cookies = [access.Access(token, ["a"]).cookie for token in ("x" * 43, "y" * 43)]
    assert len(set(cookies)) == 2


def test_a_queue_that_is_away_is_neither_told_of_nor_made_anew_nor_changed(tmp_path: Path) -> None:
    """What has it open would show it for ever, and lose what is asked for; a scrape would find an empty one."""
    store = fill(settings_of(tmp_path), 3)
    with dashboard(tmp_path, "--control") as running:
        away = store.path.with_name("elsewhere")
        assert running.ask("/").status == 200
        store.path.rename(away)
        for path in ("/", "/history", "/metrics", "/jobs/sessions", "/live"):
            answer = running.ask(path)
            assert (answer.status, "is no longer the file that this dashboard has opened" in answer.text) == (503, True)
        assert running.ask("/actions/pause", "POST", "").status == 503
        assert not store.path.exists() and not store.get("paused")
        assert running.ask("/static/style.css").status == 200
        away.rename(store.path)
        assert running.ask("/").status == running.ask("/metrics").status == 200
    store.close()


def test_the_end_of_one_dashboard_hides_no_other(tmp_path: Path) -> None:
    fill(settings_of(tmp_path), 3).close()
    with contextlib.ExitStack() as others:
        first = others.enter_context(dashboard(tmp_path))
        second = others.enter_context(dashboard(tmp_path))
        note = second.state_dir / "dashboard.url"
        assert note.read_text() == f"{second.url}\n"
        first.close()
        assert note.read_text() == f"{second.url}\n"
        others.pop_all()
        second.close()
        assert not note.exists()
