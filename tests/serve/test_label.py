"""Labelling over HTTP: who may, what they see and do not see, and what becomes of what they enter."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update

from alignkit_serve.browsers import is_loopback
from alignkit_serve.page.templates import pieces, render
from alignkit_serve.store import inferences, keys
from alignkit_serve.store.groups import Group
from alignkit_serve.store.tables import annotator, assignment, feedback, rank_entry, session
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running
from tests.serve.store.test_labels import add, counted, groups

PAGE = {"Accept": "text/html", "Sec-Fetch-Site": "same-origin"}


@pytest.fixture
def server(database_url: str, tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "only", database_url, load=scripted(only=ScriptedEngine())) as started:
        yield started


def visitor(server: Running, *scopes: str, **headers: str) -> httpx.Client:
    """A browser that somebody signed in at, with a key of their own."""
    client = httpx.Client(base_url=server.url, headers={**PAGE, **headers}, timeout=60, trust_env=False)
    signed = client.post("/label/login", data={"key": server.key(*(scopes or ("label",)), rate_rpm=100_000)})
    assert signed.status_code == 303, signed.text
    return client


def pool(server: Running, *, answers: int = 3, overlap: int = 1, **values: Any) -> Group:
    [group] = groups(server.store, 1, answers)
    add(server.store, group, overlap=overlap, **values)
    return group


def assigned(client: httpx.Client) -> str:
    """The id of the assignment that is shown."""
    found = re.search(r'data-assignment="([^"]+)"', client.get("/label").text)
    assert found
    return found[1]


def filled(*ranks: int, **fields: Any) -> dict[str, Any]:
    """A form in which all is entered."""
    form = {f"rank-{slot}": str(rank) for slot, rank in enumerate(ranks)} | {f"rating-{slot}": "4" for slot in range(len(ranks))}
    return {**form, **{name.replace("_", "-", 1) if name[-1].isdigit() else name: value for name, value in fields.items()}}


def slots(server: Running, id: str) -> list[str]:
    return list(server.store.read(lambda connection: connection.scalar(select(assignment.c.slots).where(assignment.c.id == id))) or ())


def said(server: Running) -> list[tuple[str, str, Any, str]]:
    found = server.store.read(lambda connection: connection.execute(select(feedback).order_by(feedback.c.id)).all())
    return [(row.kind, row.target_id, row.value, row.state) for row in found]


def test_what_is_submitted_is_feedback_of_the_one_who_signed_in(server: Running) -> None:
    group = pool(server)
    client = visitor(server)
    id = assigned(client)
    form = filled(2, 1, 2, rating_1="7", flag_0=["hallucination", "opinion"], comment="Close.\r\n", dwell_ms="0")
    done = client.post(f"/label/{id}", data=form)
    assert (done.status_code, done.headers["location"]) == (303, "/label")
    a, b, c = slots(server, id)
    assert sorted(said(server)) == sorted(
        [
            ("ranking", group.id, [[b], [a, c]], "active"),
            ("rating", a, 4, "active"),
            ("rating", b, 7, "active"),
            ("rating", c, 4, "active"),
            ("flag", a, "hallucination", "active"),
            ("flag", a, "opinion", "active"),
            ("comment", group.id, "Close.\n", "active"),
        ]
    )
    rows = server.store.read(lambda connection: connection.execute(select(feedback)).all())
    [given] = server.store.read(lambda connection: connection.execute(select(assignment)).all())
    shown = {"slots": [a, b, c], "seed": given.seed, "ui_version": "label-1", "dwell_ms": 0}
    assert all((row.source, row.presentation, row.annotator_id) == ("page", shown, given.annotator_id) for row in rows)
    places = server.store.read(lambda connection: connection.execute(select(rank_entry.c.completion_id, rank_entry.c.rank)).all())
    assert sorted(map(tuple, places)) == sorted([(b, 1), (a, 2), (c, 2)])
    assert [row[1:] for row in counted(server.store)] == [("done", 0, 1, 0)]
    text = client.get("/label").text
    assert "<b>1</b> done today, <b>0</b> waiting" in text
    assert "All done, thank you" in text


def test_sent_twice_it_is_said_once(server: Running) -> None:
    pool(server, answers=2)
    client = visitor(server)
    id = assigned(client)
    answered: list[int] = []
    threads = [
        threading.Thread(target=lambda: answered.append(client.post(f"/label/{id}", data=filled(1, 2)).status_code)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answered == [303] * 8
    assert sorted(kind for kind, *_ in said(server)) == ["ranking", "rating", "rating"]


def test_what_is_missing_is_told_and_the_rest_is_kept(server: Running) -> None:
    pool(server)
    client = visitor(server)
    id = assigned(client)
    form = {
        "rank-0": "1",
        "rank-1": "zwei",
        "rank-2": "10",
        "rating-1": "6",
        "flag-2": "violent",
        "comment": "<i>half</i>",
        "rating-9": "1",
    }
    told = client.post(f"/label/{id}", data=form)
    assert told.status_code == 422
    problems = re.findall(r'<a href="#answer-(\d)">(.*?)</a>', told.text)
    assert problems == [
        ("0", "Answer A has no rating."),
        ("2", "Answer C has no rating."),
        ("1", "Answer B has no rank."),
        ("2", "Answer C has no rank."),
    ]
    for text in (told.text, client.get("/label").text):
        assert 'name="rank-0" min="1" max="3" step="1" inputmode="numeric" value="1"' in text
        assert 'name="rating-1" value="6" checked' in text
        assert 'name="flag-2" value="violent" checked' in text
        assert text.count(" checked") == 2
        assert "&lt;i&gt;half&lt;/i&gt;" in text
    assert said(server) == []


def test_it_is_blind(server: Running) -> None:
    group = pool(server, answers=4, gold=None)
    [other] = groups(server.store, 1, 4)
    add(server.store, other, priority=9, gold=[[id] for id, _ in other.candidates])
    client = visitor(server)
    for _ in range(2):
        page = client.get("/label")
        everything = page.text + str(page.headers) + str(page.url)
        policies = server.store.read(lambda connection: connection.exec_driver_sql("SELECT id, name FROM policy_version").all())
        hidden = [
            *(word for policy in policies for word in policy),
            group.id,
            other.id,
            *(id for id, _ in (*group.candidates, *other.candidates)),
        ]
        assert [word for word in hidden if word in everything] == []
        assert "gold" not in everything.lower()
        assert "policy" not in page.text.lower()
        id = assigned(client)
        client.post(f"/label/{id}", data=filled(1, 2, 3, 4))
    assert [row[1] for row in counted(server.store)] == ["done", "done"]


def test_an_undone_one_is_changed_and_the_old_is_kept(server: Running) -> None:
    group = pool(server)
    client = visitor(server)
    id = assigned(client)
    a, b, c = slots(server, id)
    client.post(f"/label/{id}", data=filled(1, 2, 3, flag_0="sexual", flag_2="violent", comment="first"))
    assert f'action="/label/{id}/undo"' in client.get("/label").text
    assert client.post(f"/label/{id}/undo").status_code == 303
    again = client.get("/label").text
    assert assigned(client) == id
    assert "You opened this one again" in again
    assert 'name="flag-0" value="sexual" checked' in again
    client.post(f"/label/{id}", data=filled(1, 1, 3, rating_1="5", flag_2="violent", flag_1="opinion"))
    states = sorted(said(server), key=str)
    assert states == sorted(
        [
            ("ranking", group.id, [[a], [b], [c]], "superseded"),
            ("ranking", group.id, [[a, b], [c]], "active"),
            ("rating", a, 4, "active"),
            ("rating", b, 4, "superseded"),
            ("rating", b, 5, "active"),
            ("rating", c, 4, "active"),
            ("flag", a, "sexual", "retracted"),
            ("flag", c, "violent", "active"),
            ("flag", b, "opinion", "active"),
            ("comment", group.id, "first", "retracted"),
        ],
        key=str,
    )
    # And back: what was taken back can be said once more.
    client.post(f"/label/{id}/undo")
    client.post(f"/label/{id}", data=filled(1, 2, 3, flag_0="sexual", flag_2="violent", comment="first"))
    active = {(kind, target, str(value)) for kind, target, value, state in said(server) if state == "active"}
    assert ("flag", a, "sexual") in active
    assert ("comment", group.id, "first") in active
    assert ("ranking", group.id, str([[a], [b], [c]])) in active
    assert len(active) == 7
    assert [row[1:] for row in counted(server.store)] == [("done", 0, 1, 0)]


def test_an_undone_one_that_is_skipped_says_nothing_any_more(server: Running) -> None:
    pool(server, answers=2)
    client = visitor(server)
    id = assigned(client)
    client.post(f"/label/{id}", data=filled(1, 2))
    client.post(f"/label/{id}/undo")
    assert client.post(f"/label/{id}/skip", data={"reason": "  not for me "}).status_code == 303
    assert {state for *_, state in said(server)} == {"retracted"}
    assert [row[1:] for row in counted(server.store)] == [("open", 0, 0, 1)]
    assert server.store.read(lambda connection: connection.scalar(select(assignment.c.reason))) == "not for me"


def test_a_skip_says_why(server: Running) -> None:
    pool(server)
    client = visitor(server)
    id = assigned(client)
    for reason in ({}, {"reason": "  "}, {"reason": "x" * 501}):
        assert client.post(f"/label/{id}/skip", data=reason).status_code == 400
    assert assigned(client) == id


def test_an_assignment_and_its_feedback_are_stored_both_or_neither(server: Running) -> None:
    group = pool(server)
    client = visitor(server)
    id = assigned(client)
    server.store.write(lambda connection: inferences.delete(connection, group.inference_id or "")).result()
    lost = client.post(f"/label/{id}", data=filled(1, 2, 3))
    assert (lost.status_code, "is not stored any more" in lost.text) == (409, True)
    assert said(server) == []
    assert server.store.read(lambda connection: connection.scalar(select(assignment.c.state))) == "leased"
    assert "Nothing to label right now" in client.get("/label").text


def test_whoever_is_blocked_is_not_heard(server: Running) -> None:
    pool(server)
    client = visitor(server)
    id = assigned(client)
    server.store.write(lambda connection: connection.execute(update(annotator).values(status="blocked"))).result()
    assert client.post(f"/label/{id}", data=filled(1, 2, 3)).status_code == 409
    assert said(server) == []


def test_a_draft_is_kept_as_it_is_and_nothing_else_is_taken_for_one(server: Running) -> None:
    pool(server, answers=2)
    client = visitor(server)
    id = assigned(client)
    draft = {"cards": [{"rank": 2, "rating": None, "flags": ["opinion"]}, {}], "comment": "so far", "dwell_ms": 1234}
    saved = client.put(f"/label/{id}/draft", json=draft)
    assert datetime.fromisoformat(saved.json()["lease_until"]) > datetime.now(UTC) + timedelta(minutes=9)
    assert client.post(f"/label/{id}/heartbeat").status_code == 200
    text = client.get("/label").text
    assert 'name="dwell_ms" value="1234"' in text
    assert 'value="opinion" checked' in text
    for wrong in (
        {"cards": [{}] * 3},
        {"cards": [{}, {"rank": 10}]},
        {"cards": [{}, {"flags": ["rude"]}]},
        {"cards": [{}, {}], "annotator_id": "x"},
        {"cards": [{}, {}], "comment": "x" * 10_001},
        [],
    ):
        refused = client.put(f"/label/{id}/draft", json=wrong, headers={"Accept": "application/json"})
        assert (refused.status_code, set(refused.json())) == (400, {"error"}), wrong


def test_somebody_elses_assignment_is_as_good_as_none(server: Running) -> None:
    pool(server, overlap=2)
    owner, other = visitor(server), visitor(server)
    id = assigned(owner)
    requests: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("POST", "", {"data": filled(1, 2, 3)}),
        ("POST", "/skip", {"data": {"reason": "x"}}),
        ("POST", "/undo", {}),
        ("PUT", "/draft", {"json": {"cards": [{}, {}, {}]}}),
        ("POST", "/heartbeat", {}),
    )
    for method, path, options in requests:
        for path_id in (id, "asg-none"):
            assert other.request(method, f"/label/{path_id}{path}", **options).status_code == 404
    assert assigned(other) != id
    assert said(server) == []


def test_whoever_has_lost_it_is_told(server: Running) -> None:
    pool(server)
    first, second = visitor(server), visitor(server)
    id = assigned(first)
    past = update(assignment).values(lease_until=datetime.now(UTC) - timedelta(seconds=1))
    server.store.write(lambda connection: connection.execute(past)).result()
    assert assigned(second) != id
    lost = first.post(f"/label/{id}", data=filled(1, 2, 3))
    assert (lost.status_code, "has gone to somebody else" in lost.text) == (409, True)
    told = first.post(f"/label/{id}/heartbeat", headers={"Accept": "application/json"})
    assert "has gone to somebody else" in told.json()["error"]["message"]


def test_one_signs_in_with_a_key_that_may_label_and_leaves_for_good(server: Running) -> None:
    pool(server)
    stranger = httpx.Client(base_url=server.url, headers=PAGE, trust_env=False)
    away = stranger.get("/label")
    assert (away.status_code, away.headers["location"]) == (303, "/label/login")
    assert stranger.get("/label", headers={"Accept": "application/json"}).status_code == 401
    assert 'type="password"' in stranger.get("/label/login").text
    for key, status in (("", 401), ("ak_x", 401), (server.key("infer"), 403)):
        refused = stranger.post("/label/login", data={"key": key})
        assert (refused.status_code, "set-cookie" in refused.headers) == (status, False)
        assert not key or key not in refused.text
    client = visitor(server)
    [cookie] = client.cookies.jar
    assert (cookie.name, cookie.path, cookie.secure) == ("alignkit", "/", False)
    assert client.get("/label").status_code == 200
    kept = httpx.Client(base_url=server.url, headers=PAGE, cookies=dict(client.cookies), trust_env=False)
    assert kept.get("/label").status_code == 200
    left = client.post("/label/logout")
    assert (left.headers["location"], "alignkit=" in left.headers["set-cookie"]) == ("/label/login", True)
    assert kept.get("/label").headers["location"] == "/label/login"


def test_the_cookie_is_out_of_reach_and_behind_tls_the_hosts_alone(server: Running) -> None:
    key = {"key": server.key("label")}
    plain = httpx.post(f"{server.url}/label/login", data=key, headers=PAGE, trust_env=False)
    assert re.fullmatch(r"alignkit=[^;]+; HttpOnly; Max-Age=43200; Path=/; SameSite=strict", plain.headers["set-cookie"])
    tls = httpx.post(f"{server.url}/label/login", data=key, headers={**PAGE, "X-Forwarded-Proto": "https"}, trust_env=False)
    assert re.fullmatch(r"__Host-alignkit=[^;]+; HttpOnly; Max-Age=43200; Path=/; SameSite=strict; Secure", tls.headers["set-cookie"])
    open_way = httpx.post(f"{server.url}/label/login", data=key, headers={**PAGE, "Host": "10.1.2.3:8000"}, trust_env=False)
    assert (open_way.status_code, "set-cookie" in open_way.headers) == (400, False)
    assert "sign in over https" in open_way.text
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "10.1.2.3", "example.com")] == [True] * 3 + [False] * 2


def test_a_cookie_that_was_not_signed_here_is_none(server: Running) -> None:
    client = visitor(server)
    [cookie] = client.cookies.jar
    id, _, signature = str(cookie.value).rpartition(".")
    [row] = server.store.read(lambda connection: connection.execute(select(session)).all())
    assert row.id == id
    for forged in (id, f"{id}.", f"{id}.{signature[:-1]}", f"x{id}.{signature}", ".", "", signature, "\u00e9"):
        headers = httpx.Headers({**PAGE, "Cookie": f"alignkit={forged}"}, encoding="utf-8")
        assert httpx.get(f"{server.url}/label", headers=headers, trust_env=False).status_code == 303


def test_a_session_ends_with_its_key_and_with_its_time(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    pool(server)
    text = server.key("label", rate_rpm=1000)
    client = httpx.Client(base_url=server.url, headers=PAGE, trust_env=False)
    client.post("/label/login", data={"key": text})
    assert client.get("/label").status_code == 200
    server.store.write(lambda connection: keys.revoke(connection, text.split("_")[1])).result()
    monkeypatch.setattr(server.app.state.keys, "_known", {})  # two seconds later
    assert client.get("/label").headers["location"] == "/label/login"
    old = visitor(server)
    server.store.write(lambda connection: connection.execute(update(session).values(expires_at=datetime.now(UTC)))).result()
    assert old.get("/label").headers["location"] == "/label/login"
    visitor(server)
    assert len(server.store.read(lambda connection: connection.execute(select(session)).all())) == 1  # what was over is swept


FOREIGN = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Authorization": "Bearer"},
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {},
]


@pytest.mark.parametrize("sent", FOREIGN, ids=str)
def test_another_sites_page_changes_nothing(server: Running, sent: dict[str, str]) -> None:
    pool(server)
    client = visitor(server)
    id = assigned(client)
    bearer = {"Authorization": f"Bearer {server.key('label')}"} if "Authorization" in sent else {}
    headers = {"Accept": "text/html", "Cookie": f"alignkit={client.cookies['alignkit']}", **sent, **bearer}
    for path, data in (
        (f"/label/{id}", filled(1, 2, 3)),
        (f"/label/{id}/skip", {"reason": "x"}),
        ("/label/login", {}),
        ("/label/logout", {}),
    ):
        refused = httpx.post(f"{server.url}{path}", data=data, headers=headers, trust_env=False)
        assert (refused.status_code, "page of another site" in refused.text) == (403, True)
    assert httpx.put(f"{server.url}/label/{id}/draft", json={}, headers=headers, trust_env=False).status_code == 403
    assert assigned(client) == id
    assert said(server) == []


def test_a_browser_that_tells_its_origin_alone_is_heard(server: Running) -> None:
    pool(server)
    client = visitor(server)
    id = assigned(client)
    headers = {"Accept": "text/html", "Cookie": f"alignkit={client.cookies['alignkit']}", "Origin": server.url}
    assert httpx.post(f"{server.url}/label/{id}", data=filled(1, 2, 3), headers=headers, trust_env=False).status_code == 303


def test_without_authentication_nobody_signs_in(tmp_path: Path) -> None:
    with running(tmp_path / "only", f"sqlite:///{tmp_path / 'a.db'}", auth=False, load=scripted(only=ScriptedEngine())) as server:
        pool(server)
        client = httpx.Client(base_url=server.url, headers=PAGE, trust_env=False)
        assert client.get("/label/login").headers["location"] == "/label"
        assert "Sign out" not in client.get("/label").text
        assert client.post(f"/label/{assigned(client)}", data=filled(1, 2, 3)).status_code == 303
        assert len(said(server)) == 4
        foreign = {"Sec-Fetch-Site": "cross-site"}
        assert client.post("/label/x/undo", headers=foreign).status_code == 403


def test_a_key_that_only_looks_on_is_led_there(server: Running) -> None:
    client = httpx.Client(base_url=server.url, headers=PAGE, trust_env=False)
    assert client.post("/label/login", data={"key": server.key("admin")}).headers["location"] == "/label/admin"
    told = client.get("/label")
    assert (told.status_code, "the scope &#39;label&#39; is needed" in told.text) == (403, True)


def test_pages_are_kept_by_nobody_and_have_nothing_inline(server: Running) -> None:
    pool(server)
    client = visitor(server)
    for path in ("/label", "/label/login", "/label/x"):
        page = client.get(path)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert (page.headers.get("cache-control"), page.headers["referrer-policy"]) in (
            ("no-store", "same-origin"),
            (None, "no-referrer"),
        )
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|https?:(?!//www\.w3\.org/2000/svg)", page.text)


def test_a_form_too_large_or_broken_is_refused(server: Running) -> None:
    pool(server)
    client = visitor(server)
    id = assigned(client)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post(f"/label/{id}", content=b"&".join(b"a=1" for _ in range(2000)), headers=form).status_code == 400
    assert client.post(f"/label/{id}", content=b"\xff\xfe", headers=form).status_code == 400
    assert client.post(f"/label/{id}", content=b"a=" + b"x" * (1 << 20), headers=form).status_code == 413
    assert client.post(f"/label/{id}", content=b"rank-0=%00%ff&rating-0=7", headers=form).status_code == 422


def test_what_draws_nothing_is_shown() -> None:
    text = "a\u202eb\u200b\U000e0041\u00ad c\ud83d\x00\x1b[\u2028\ufeff\u3164\U000e0100\r\nd\te \U0001f468\u200d\U0001f469\u0300"
    shown = pieces(text)
    marked = [piece for piece, name in shown if name]
    assert marked == ["U+202E", "U+200B", "U+E0041", "U+00AD", "U+D83D", "U+0000", "U+001B", "U+2028", "U+FEFF", "U+3164", "U+E0100"]
    assert "".join(piece for piece, name in shown if not name) == "ab c[\nd\te \U0001f468\u200d\U0001f469\u0300"
    assert dict(shown)["U+202E"] == "right-to-left override"
    assert pieces("") == []


def test_templates_escape_and_want_all_that_they_name() -> None:
    page = render("problem.html", title="<b>", message='"><script>')
    assert "<b>" not in page
    assert "&#34;&gt;&lt;script&gt;" in page
    with pytest.raises(Exception, match="is undefined"):
        render("problem.html", title="")


def test_the_time_it_took_is_what_the_page_counted_and_never_more_than_there_was(server: Running) -> None:
    pool(server, overlap=2)
    for counted_ms in ("999999999", ""):
        client = visitor(server)
        id = assigned(client)
        begun = server.store.read(lambda connection, id=id: connection.scalar(select(assignment.c.started_at).where(assignment.c.id == id)))
        client.post(f"/label/{id}", data=filled(1, 2, 3, dwell_ms=counted_ms))
        assert begun is not None
        most = (datetime.now(UTC) - begun).total_seconds() * 1000
        given = server.store.read(lambda connection, id=id: connection.execute(select(assignment).where(assignment.c.id == id)).one())
        dwells = server.store.read(
            lambda connection, who=given.annotator_id: connection.scalars(
                select(feedback.c.presentation).where(feedback.c.annotator_id == who)
            ).all()
        )
        assert all(0 < shown["dwell_ms"] <= most for shown in dwells)


def test_what_was_counted_is_seen_in_the_figures(server: Running) -> None:
    pool(server)
    client = visitor(server)
    client.post(f"/label/{assigned(client)}", data=filled(1, 2, 3))
    with server.http("admin") as admin:
        figures = admin.get("/metrics").text
    assert 'alignkit_feedback_total{kind="ranking",outcome="accepted"} 1.0' in figures
    assert 'alignkit_feedback_total{kind="rating",outcome="accepted"} 3.0' in figures
