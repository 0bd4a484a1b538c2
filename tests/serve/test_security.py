"""Default deny: every route, every limit, every header; what a request names is never fetched, and what people wrote is never logged."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from alignkit_serve import server as serving
from alignkit_serve.app import ROUTERS
from alignkit_serve.auth import PUBLIC, scopes_of
from alignkit_serve.settings import Limits
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running

ROUTES = scopes_of(ROUTERS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("security")
    limits = Limits(body_bytes=20_000, prompt_characters=5_000)
    with running(folder / "only", f"sqlite:///{folder / 'store.db'}", limits=limits, load=scripted(only=ScriptedEngine())) as started:
        yield started


def call(server: Running, route: str, key: str | None = None, **options: Any) -> httpx.Response:
    method, path = route.split(" ")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = server.url + path.replace("{id}", "x").replace("{id:path}", "x").replace("{name}", "chat.css")
    return httpx.request(method, url, headers=headers, trust_env=False, timeout=30, **options)


def test_few_routes_are_public_and_they_are_these() -> None:
    public = {"GET /", "GET /assets/{name}", "GET /health", "GET /ready", "GET /label/login", "POST /label/login"}
    assert {route for route, scope in ROUTES.items() if scope == PUBLIC} == public


def test_the_application_has_no_route_beside_those_that_were_walked(server: Running) -> None:
    schema = server.app.openapi()["paths"]
    found = {f"{method.upper()} {path}" for path, methods in schema.items() for method in methods}
    hidden = {"GET /", "GET /assets/{name}", *(route for route in ROUTES if route.split(" ")[1].startswith("/label"))}
    assert found == {route.replace(":path", "") for route in ROUTES} - hidden


@pytest.mark.parametrize("route", sorted(route for route, scope in ROUTES.items() if scope != PUBLIC))
def test_a_route_wants_a_key_and_the_right_one(server: Running, route: str) -> None:
    assert call(server, route).status_code == 401
    assert call(server, route, "ak_123456789012_" + "x" * 43).status_code == 401
    assert call(server, route, server.key("infer" if ROUTES[route] == "label" else "label")).status_code == 403
    allowed = call(server, route, server.key(ROUTES[route]))
    assert allowed.status_code not in (401, 403)
    assert allowed.status_code < 500


def test_errors_have_all_four_keys_wherever_they_come_from(server: Running) -> None:
    key = server.key("infer")
    for response in (
        call(server, "GET /v1/nothing"),
        call(server, "PUT /v1/models"),
        call(server, "GET /v1/models/nothing", key),
        call(server, "POST /v1/chat/completions", key),
        call(server, "GET /v1/models"),
    ):
        assert response.status_code >= 400
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"]


def post(server: Running, content: bytes, **headers: str) -> httpx.Response:
    own = {"Authorization": f"Bearer {server.key('infer')}", "Content-Type": "application/json", **headers}
    return httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=own, trust_env=False, timeout=30)


def test_a_body_that_is_not_json_is_told_where(server: Running) -> None:
    refused = post(server, b'{"model": "live", ')
    assert refused.status_code == 400
    assert "the body is not JSON" in refused.json()["error"]["message"]


def test_a_body_that_is_too_long_is_refused_declared_or_not(server: Running) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 1000

    declared = post(server, b" " * 30_000)
    own = {"Authorization": f"Bearer {server.key('infer')}", "Content-Type": "application/json"}
    chunked = httpx.post(f"{server.url}/v1/chat/completions", content=pieces(), headers=own, trust_env=False)
    for refused in (declared, chunked):
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "request_too_large"


def sent(server: Running, pieces: Iterable[bytes]) -> bytes:
    """What is answered to raw bytes, of which the first are a request's beginning, until the server hangs up."""
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname, at.port), timeout=30) as connection:
        with contextlib.suppress(ConnectionError):  # It hangs up in the middle.
            for piece in pieces:
                connection.sendall(piece)
        found = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                found += piece
        return found


@pytest.mark.parametrize("line", [b"x" * 4096, b"\r\nname: " + b"x" * 4088], ids=["one header", "many headers"])
def test_a_head_that_does_not_end_is_not_kept(server: Running, line: bytes) -> None:
    taken = 0

    def pieces() -> Iterator[bytes]:
        nonlocal taken
        yield b"GET /v1/models HTTP/1.1\r\nHost: here\r\nname: "
        for _ in range(4096):
            yield line
            taken += len(line)

    sent(server, pieces())
    assert taken < 4096 * len(line), "all of it was read"


def test_a_long_head_that_ends_is_read_and_so_is_the_next(server: Running) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: here\r\nname: " + b"x" * 20_000
    answers = sent(server, [head, b"x" * 20_000, b"\r\n\r\n", head, b"x" * 20_000, b"\r\nConnection: close\r\n\r\n"])
    assert answers.count(b"HTTP/1.1 200 ") == 2


def test_a_prompt_is_measured_before_it_is_tokenised(server: Running) -> None:
    refused = post(server, b'{"model": "live", "messages": [{"role": "user", "content": "' + b"x" * 6000 + b'"}]}')
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_nothing_that_a_request_names_is_fetched(server: Running) -> None:
    part = b'{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}'
    refused = post(server, b'{"model": "live", "messages": [{"role": "user", "content": [' + part + b"]}]}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_value")
    template = post(server, b'{"model": "live", "chat_template": "{{ 1 }}", "messages": [{"role": "user", "content": "a"}]}')
    assert template.json()["error"]["param"] == "chat_template"
    for name in ("../../etc/passwd", "/etc/passwd", "https://example.com/model"):
        assert post(server, f'{{"model": "{name}", "messages": [{{"role": "user", "content": "a"}}]}}'.encode()).status_code == 404


def test_browsers_are_told_to_be_careful(server: Running) -> None:
    for route in ("GET /health", "GET /v1/models", "GET /"):
        headers = call(server, route).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_the_log_has_ids_and_sizes_and_nobodys_words(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answer = post(server, b'{"model": "live", "user": "jane", "messages": [{"role": "user", "content": "my secret is 4711"}]}')
        call(server, "GET /v1/chat/completions?metadata[secret]=4711", server.key("infer"))
    assert answer.status_code == 200
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("alignkit")]
    assert any(answer.headers["x-request-id"] in line for line in ours)
    assert not any("4711" in line or "jane" in line or "Well" in line for line in ours)


def test_an_id_from_outside_is_kept_only_if_it_is_one(server: Running) -> None:
    body = b'{"model": "live", "messages": [{"role": "user", "content": "a"}]}'
    assert post(server, body, **{"x-request-id": "trace-1.2:3"}).headers["x-request-id"] == "trace-1.2:3"
    assert post(server, body, **{"x-request-id": "a b<script>"}).headers["x-request-id"].startswith("req-")


def test_a_revoked_key_works_no_longer(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit_serve.store import keys

    text = server.key("infer", rate_rpm=1000)
    assert call(server, "GET /v1/models", text).status_code == 200
    server.store.write(lambda connection: keys.revoke(connection, text.split("_")[1])).result()
    monkeypatch.setattr(server.app.state.keys, "_known", {})  # two seconds later
    assert call(server, "GET /v1/models", text).status_code == 401


SETTINGS: dict[str, Any] = {"policy": Path("x"), "port": 0, "store": "sqlite:///x.db", "models": Path("."), "limits": Limits()}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com"])
def test_beyond_this_machine_keys_are_needed(host: str) -> None:
    with pytest.raises(serving.ServeError, match="--no-auth with --host"):
        serving.check_exposure(serving.Settings(host=host, auth=False, **SETTINGS), has_keys=True)
    with pytest.raises(serving.ServeError, match="alignkit keys create"):
        serving.check_exposure(serving.Settings(host=host, auth=True, **SETTINGS), has_keys=False)
    serving.check_exposure(serving.Settings(host=host, auth=True, **SETTINGS), has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_on_this_machine_they_may_be_left_out(host: str) -> None:
    serving.check_exposure(serving.Settings(host=host, auth=False, **SETTINGS), has_keys=False)
