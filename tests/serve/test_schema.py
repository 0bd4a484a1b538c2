"""Whatever is sent, the server answers as OpenAI's API would: never with a mistake of its own, and every refusal in the same form."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.schemas import BaseSchema

from alignkit_serve.app import ROUTERS
from alignkit_serve.loading import load_policy
from alignkit_serve.roster import Warm
from alignkit_serve.schemas import ChatRequest, CompletionRequest
from alignkit_serve.store.keys import SCOPES
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running

EXAMPLES = 20
"""Of each route, right ones and wrong ones."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serves a script; the folder from which other policies may be taken is empty."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "models").mkdir()
    first = scripted(only=ScriptedEngine())

    async def load(path: Path) -> Warm:
        return await (first(path) if path == folder / "only" else load_policy(path, max_rows=1))

    with running(folder / "only", f"sqlite:///{folder / 'store.db'}", models=folder / "models", load=load) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    """One that may do anything."""
    with server.http(*SCOPES) as client:
        yield client


@pytest.fixture(autouse=True)
def no_mistakes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.fixture(scope="module")
def described(server: Running) -> BaseSchema:
    return schemathesis.openapi.from_dict(server.app.openapi())


def asked() -> list[tuple[str, str, GenerationMode]]:
    """Each route that is described, asked rightly, and, where there is something to be wrong about, wrongly."""
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    found = []
    for path, methods in app.openapi()["paths"].items():
        for method, operation in methods.items():
            found.append((method, path, GenerationMode.POSITIVE))
            if "requestBody" in operation or any(parameter["in"] == "query" for parameter in operation.get("parameters", ())):
                found.append((method, path, GenerationMode.NEGATIVE))
    return found


GRANTED = [
    "temperature",
    "top_p",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stream",
    "stream_options",
    "user",
    "stop",
    "metadata",
    "store",
    "return_token_ids",
]
"""Fields any right value of which the engine can do something with."""


@pytest.mark.parametrize(("method", "path", "mode"), asked())
def test_what_the_schema_describes_and_what_it_forbids(
    described: BaseSchema, server: Running, client: httpx.Client, method: str, path: str, mode: GenerationMode
) -> None:
    key = {"Authorization": f"Bearer {server.key(*SCOPES)}"}
    ids = {"/v1/models/{id}": "live", "/v1/admin/policies/{id}/promote": "id-only"}
    statuses = set()
    with requests.Session() as session:
        # A name that is not there would be all that most requests are told about.
        @given(case=described[path][method].as_strategy(generation_mode=mode), there=st.booleans())
        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        def call(case: schemathesis.Case, there: bool) -> None:
            if there and "id" in case.path_parameters:
                case.path_parameters["id"] = ids.get(path) or post(client, hello()).json()["id"]
            if there and isinstance(case.body, dict) and "model" in case.body:
                granted = {name: value for name, value in case.body.items() if name in GRANTED}
                case.body = {**granted, **(HELLO if path.endswith("chat/completions") else {**HELLO, "prompt": "Hello"})}
            response = case.call(base_url=server.url, headers=key, session=session, timeout=30)
            check(response.status_code, response.headers.get("content-type", [""])[0], response.content)
            statuses.add(response.status_code)

        call()
    if mode is GenerationMode.POSITIVE and path.endswith("completions"):
        assert 200 in statuses


def check(status: int, content_type: str, body: bytes) -> None:
    """A good answer in the form it says it has, or a refusal with all four keys."""
    assert status < 500, body
    if status >= 400:
        refused(content_type, body)
    elif content_type.startswith("text/event-stream"):
        events(body)
    elif content_type == "application/json":
        json.loads(body)
    else:
        assert content_type or not body


def refused(content_type: str, body: bytes) -> dict[str, Any]:
    assert content_type == "application/json"
    found: dict[str, Any] = json.loads(body)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert all(isinstance(found["error"][key], str) and found["error"][key] for key in ("message", "type", "code"))
    assert found["error"]["param"] is None or isinstance(found["error"]["param"], str)
    return dict(found["error"])


def events(body: bytes) -> list[dict[str, Any]]:
    """The chunks of a stream, which begins, grows and ends as the API says."""
    *sent, done, nothing = body.decode().split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in sent if event != ": ping"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    finishes = [(choice["index"], choice["finish_reason"]) for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert {index for index, _ in finishes} == {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    assert len(finishes) == len(dict(finishes)) > 0
    return chunks


HELLO: dict[str, Any] = {"model": "live", "messages": [{"role": "user", "content": "Hello"}]}


def post(client: httpx.Client, body: bytes | str, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    content = body.encode() if isinstance(body, str) else body
    response = client.post(path, content=content, headers={"Content-Type": "application/json", **headers})
    check(response.status_code, response.headers["content-type"], response.content)
    return response


def hello(**fields: str) -> str:
    """A request with more fields, whose values are JSON as it stands."""
    return json.dumps(HELLO)[:-1] + "".join(f", {json.dumps(name)}: {value}" for name, value in fields.items()) + "}"


DEEP = 100_000
BODIES: dict[str, tuple[str | bytes, int]] = {
    "nothing": ("", 400),
    "null": ("null", 400),
    "a list": ("[]", 400),
    "a string": ('"live"', 400),
    "half a request": (hello()[:-3], 400),
    "two requests": (hello() * 2, 400),
    "lists in lists": ("[" * DEEP + "]" * DEEP, 400),
    "objects in objects": ('{"a":' * DEEP + "1" + "}" * DEEP, 400),
    "deep content": (hello(messages='[{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]"), 400),
    "a deep field that nobody reads": (hello(nobody="[" * 900 + "]" * 900), 200),
    "a deep format": (hello(response_format='{"type": "text", "schema": ' + "[" * 900 + "]" * 900 + "}"), 200),
    "a huge integer": (hello(seed="9" * 4000), 400),
    "an integer that Python refuses": (hello(seed="9" * 5000), 400),
    "a seed of 64 bits": (hello(seed=str(-(1 << 63))), 200),
    "a seed of 65 bits": (hello(seed=str(1 << 63)), 400),
    "a huge number of tokens": (hello(max_tokens="9" * 30), 400),
    "a number beyond floats": (hello(temperature="1e999"), 400),
    "NaN": (hello(temperature="NaN"), 400),
    "Infinity": (hello(top_p="Infinity"), 400),
    "-Infinity": (hello(logit_bias='{"5": -Infinity}'), 400),
    "NaN in a field that nobody reads": (hello(nobody="NaN"), 200),
    "true for 1": (hello(n="true"), 400),
    "1 for true": (hello(stream="1"), 400),
    "1.0 for 1": (hello(n="1.5"), 400),
    "a key twice": (hello(model='"nobody"', n="1")[:-1] + ', "model": "live"}', 200),
    "half a surrogate pair": (hello(messages='[{"role": "user", "content": "\\ud83d"}]'), 400),
    "half a surrogate pair as a name": (hello(model='"\\ud83d"'), 400),
    "half a surrogate pair in a key": (hello(metadata='{"\\ud83d": "x"}'), 400),
    "half a surrogate pair in a bias": (hello(logit_bias='{"\\ud83d": 1}'), 400),
    "half a surrogate pair for a field": (hello()[:-1] + ', "\\ud83d": 1}', 400),
    "half a surrogate pair for a field, strictly": (hello(alignkit='{"strict": true}')[:-1] + ', "\\ud83d": 1}', 400),
    "half a surrogate pair for an extra": (hello(alignkit='{"\\ud83d": true}'), 400),
    "NUL everywhere": (
        hello(messages='[{"role": "user", "content": "a\\u0000b"}]', user='"\\u0000"', metadata='{"\\u0000": "\\u0000"}', stop='"\\u0000"'),
        200,
    ),
    "a field without a name": (hello(**{"": "1"}), 200),
    "a field of spaces": (hello(**{" ": "1", "\t": "1"}), 200),
    "a field of two lines": (hello(**{"a\r\nSet-Cookie: b": "1"}), 200),
    "a field of Chinese": (hello(**{"电影": "1"}), 200),
    "fields that a header cuts after a space": (hello(**{"a" * 999: "1", "b": "1"}), 200),
    "fields beyond a header": (hello(**{f"field{i}": "1" for i in range(5000)}), 200),
    "Arabic digits for a token": (hello(logit_bias='{"\\u0661\\u0662": 1}'), 400),
    "superscript digits for a token": (hello(logit_bias='{"\\u00b2": 1}'), 400),
    "a token before the first": (hello(logit_bias='{"-1": 1}'), 400),
    "no stop string": (hello(stop='""'), 400),
    "no stop strings": (hello(stop="[]"), 200),
    "an empty stop string among others": (hello(stop='["a", ""]'), 400),
    "no model": (hello(model='""'), 400),
    "no message": (hello(messages="[]"), 400),
    "an empty message": (hello(messages='[{"role": "user", "content": ""}]'), 200),
    "no part": (hello(messages='[{"role": "user", "content": []}]'), 200),
    "256 parts": (hello(messages=json.dumps([{"role": "user", "content": [{"type": "text", "text": "a"}] * 256}])), 200),
    "257 parts": (hello(messages=json.dumps([{"role": "user", "content": [{"type": "text", "text": "a"}] * 257}])), 400),
    "a thousand messages": (hello(messages=json.dumps(HELLO["messages"] * 900)), 200),
    "ten thousand messages": (hello(messages=json.dumps(HELLO["messages"] * 10_000)), 400),
    "ten thousand items of metadata": (hello(metadata=json.dumps({str(i): "x" for i in range(10_000)})), 400),
    "ten thousand biases": (hello(logit_bias=json.dumps({str(i): 1 for i in range(10_000)})), 400),
    "bytes that are no UTF-8": (hello().encode().replace(b"Hello", b"\xff\xfe\xfd"), 400),
    "UTF-16": (hello().encode("utf-16"), 200),
    "a byte order mark": (b"\xef\xbb\xbf" + hello().encode(), 200),
    "gzip": (gzip.compress(hello().encode()), 400),
    "a mebibyte of spaces": (hello()[:-1] + " " * (1 << 20) + "}", 413),
}


@pytest.mark.parametrize("what", BODIES)
def test_hostile_bodies(client: httpx.Client, what: str) -> None:
    body, status = BODIES[what]
    response = post(client, body)
    assert response.status_code == status, response.text
    assert post(client, hello()).json()["choices"][0]["message"]["content"] == "Well, yes."


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "a/b;;=,", "\xff"]
)
def test_what_is_not_said_to_be_json_is_not_read_as_json(client: httpx.Client, kind: str) -> None:
    assert client.post("/v1/chat/completions", content=hello(), headers=[(b"Content-Type", kind.encode("latin-1"))]).status_code == 400


def test_a_body_that_is_said_to_be_compressed_is_not_unpacked(client: httpx.Client) -> None:
    assert post(client, gzip.compress(hello().encode()), **{"Content-Encoding": "gzip"}).status_code == 400


PATHS = {
    "/v1/models/%00": 404,
    "/v1/models/%ff%fe": 404,
    "/v1/models/..%2f..%2fetc%2fpasswd": 404,
    "/v1/models/" + "x" * 8000: 404,
    "/v1/chat/completions/%00": 404,
    "/v1/chat/completions?limit=0": 400,
    "/v1/chat/completions?limit=%D9%A3%D9%A3%D9%A3%D9%A3": 400,
    "/v1/chat/completions?limit=1&limit=x": 400,
    "/v1/chat/completions?after=%00&model=%ff": 200,
    "/v1/chat/completions?metadata[%00]=%00&metadata[]=&metadata[']=\"&metadata[a.b$]=1": 200,
    "/v1/admin/audit?limit=1e3": 400,
    "/assets/..%2fchat.html": 404,
    "//v1//models": 404,
    "/%00": 404,
    "/v1": 404,
}


@pytest.mark.parametrize("path", PATHS)
def test_hostile_addresses(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    check(response.status_code, response.headers["content-type"], response.content)
    assert response.status_code == PATHS[path]


POLICIES = ["\x00", "..", "../..", "/etc/passwd", ".", "a" * 4096, "a/" * 2000, "not there", "~", "file:///etc", "\n", "电影"]


@pytest.mark.parametrize("path", POLICIES)
def test_paths_that_are_no_policy(client: httpx.Client, path: str) -> None:
    assert post(client, json.dumps({"path": path, "promote": True}), "/v1/admin/policies").status_code == 400


def test_a_prompt_that_is_too_long_is_refused_in_the_words_that_clients_look_for(client: httpx.Client) -> None:
    long = json.dumps([{"role": "user", "content": "word " * 1200}])
    refused = post(client, hello(messages=long)).json()["error"]
    assert refused["code"] == "context_length_exceeded"
    assert refused["message"].startswith(
        "the prompt is too long: this model's maximum context length is 1000 tokens, and the prompt has 1200"
    )
    refused = post(client, hello(max_tokens="2000")).json()["error"]
    assert refused["code"] == "context_length_exceeded"
    assert refused["message"].startswith("this model's maximum context length is 1000 tokens, and the prompt has 1, which leaves 999")


def test_what_a_database_does_not_keep_is_no_mistake_on_any(tmp_path: Path, database_url: str) -> None:
    nul = '"a\\u0000b"'
    everywhere = hello(messages=f'[{{"role": "user", "content": {nul}}}]', user=nul, metadata=f"{{{nul}: {nul}}}", stop=nul)
    elsewhere = hello(alignkit=f'{{"episode_id": {nul}, "consent": {{"train": true, "version": {nul}}}}}')
    with running(tmp_path / "only", database_url, load=scripted(only=ScriptedEngine())) as server, server.http(*SCOPES) as client:
        for body in (everywhere, elsewhere):
            id = post(client, body).json()["id"]
            assert client.get(f"/v1/chat/completions/{id}").status_code == 200
        assert post(client, f'{{"metadata": {{{nul}: {nul}}}}}', f"/v1/chat/completions/{id}").status_code == 200
        assert post(client, hello(model=nul)).status_code == 404
        assert post(client, hello(alignkit=f'{{"policy": {nul}}}')).status_code == 404
        assert client.delete("/v1/chat/completions/a%00b").status_code == 404
        assert post(client, '{"metadata": {}}', "/v1/chat/completions/a%00b").status_code == 404
        for path, status in PATHS.items():
            assert client.get(path).status_code == status, path
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": b"Bearer \xff"}, trust_env=False).status_code == 401


def spoken(server: Running, *said: bytes, answers: int = 1, leaves: bool = False) -> list[int]:
    """The statuses of the responses on a connection on which this is said, until there are so many ``answers`` or it is closed."""
    heard = b""
    statuses: list[int] = []
    connection = socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=10)
    # One that is closed with something unread is reset.
    with connection, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        for data in said:
            connection.sendall(data)
        if leaves:
            connection.shutdown(socket.SHUT_WR)
        while len([status for status in statuses if status >= 200]) < answers and (data := connection.recv(65536)):
            heard += data
            statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", heard)]
    return statuses


def request(server: Running, line: str, *headers: str | bytes, body: bytes = b"", host: str = "x") -> bytes:
    own = (f"Host: {host}", f"Authorization: Bearer {server.key(*SCOPES)}", "Content-Type: application/json", *headers)
    lines = [line.encode(), *(header if isinstance(header, bytes) else header.encode("latin-1") for header in own)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


CHAT = "POST /v1/chat/completions HTTP/1.1"
LENGTH = len(hello())
CHUNKED = "Transfer-Encoding: chunked"

WIRE: dict[str, tuple[str, tuple[str | bytes, ...], bytes, list[int]]] = {
    "HTTP/1.0": ("GET /v1/models HTTP/1.0", (), b"", [200]),
    "a chat in HTTP/1.0": ("POST /v1/chat/completions HTTP/1.0", (f"Content-Length: {LENGTH}",), hello().encode(), [200]),
    "a stream in HTTP/1.0": (
        "POST /v1/chat/completions HTTP/1.0",
        (f"Content-Length: {len(hello(stream='true'))}",),
        hello(stream="true").encode(),
        [200],
    ),
    "HTTP/3.7": ("GET /v1/models HTTP/3.7", (), b"", [400]),
    "no HTTP": ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (), b"", [400]),
    "a length below nothing": (CHAT, ("Content-Length: -1",), hello().encode(), [400]),
    "a length that is no number": (CHAT, ("Content-Length: many",), hello().encode(), [400]),
    "a length in superscript": (CHAT, (b"Content-Length: \xb2",), hello().encode(), [400]),
    "a length of 5000 digits": (CHAT, (f"Content-Length: {'9' * 5000}",), hello().encode(), [400]),
    "a length beyond the limit": (CHAT, ("Content-Length: 99999999999",), hello().encode(), [413]),
    "two lengths": (CHAT, (f"Content-Length: {LENGTH}", "Content-Length: 3"), hello().encode(), [400]),
    "chunks": (CHAT, (CHUNKED,), f"{LENGTH:x}\r\n{hello()}\r\n0\r\n\r\n".encode(), [200]),
    "a chunk without a size": (CHAT, (CHUNKED,), b"zz\r\nabc\r\n0\r\n\r\n", [400]),
    "a chunk of a size below nothing": (CHAT, (CHUNKED,), b"-5\r\nabc\r\n0\r\n\r\n", [400]),
    "chunks of another coding": (CHAT, ("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n", [400]),
    "a long header": ("GET /v1/models HTTP/1.1", ("X-Long: " + "a" * 60_000,), b"", [200]),
    "a header with NUL": ("GET /v1/models HTTP/1.1", ("X-Nul: a\x00b",), b"", [400]),
    "a header without a name": ("GET /v1/models HTTP/1.1", (": a",), b"", [400]),
    "a header of high bytes": ("GET /v1/models HTTP/1.1", (b"X-Request-Id: \xff\xfe",), b"", [200]),
    "a method of nobody's": ("BREW /v1/models HTTP/1.1", (), b"", [400]),
    "a method that is not for this": ("PATCH /v1/models HTTP/1.1", (), b"", [405]),
    "a method on all": ("OPTIONS * HTTP/1.1", (), b"", [404]),
    "a whole address": ("GET http://x/v1/models HTTP/1.1", (), b"", [200]),  # as RFC 9112 (3.2.2) wants it
    "bytes in an address": ("GET /\xff\xfe HTTP/1.1", (), b"", [400]),
    "waits to be told to go on": (CHAT, ("Expect: 100-continue", f"Content-Length: {LENGTH}"), hello().encode(), [100, 200]),
    "wants another protocol": (
        "GET /v1/models HTTP/1.1",
        ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"),
        b"",
        [200],
    ),
}


@pytest.mark.parametrize("what", WIRE)
def test_hostile_connections(server: Running, client: httpx.Client, what: str) -> None:
    line, headers, body, statuses = WIRE[what]
    assert spoken(server, request(server, line, *headers, body=body)) == statuses
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("host", ["[", "]", "[::1", "a b", "", "x:y", "x:99999999999", "evil.example", "a/b", "\xe9"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/health/", "/v1/models/nothing"])
def test_the_name_under_which_the_server_is_asked_does_not_matter(server: Running, host: str, path: str) -> None:
    (status,) = spoken(server, request(server, f"GET {path} HTTP/1.1", host=host))
    assert status in ((200,) if path == "/v1/models" else (404,))


def test_requests_may_come_before_the_last_one_is_answered(server: Running) -> None:
    chat = request(server, CHAT, f"Content-Length: {LENGTH}", body=hello().encode())
    models, nothing = request(server, "GET /v1/models HTTP/1.1"), request(server, "GET /v1/nothing HTTP/1.1")
    assert spoken(server, chat + models + nothing + chat + models, answers=5) == [200, 200, 404, 200, 200]
    halves = b"".join([chat, models])
    assert spoken(server, halves[:100], halves[100:], answers=2) == [200, 200]


def test_a_header_without_an_end_is_not_listened_to(server: Running, client: httpx.Client) -> None:
    assert spoken(server, request(server, "GET /v1/models HTTP/1.1", "X-Long: " + "a" * 4_000_000)) in ([], [400])
    assert client.get("/health").json() == {"status": "ok"}


def test_a_body_that_ends_in_the_middle_is_no_mistake_of_the_server(server: Running, client: httpx.Client) -> None:
    assert spoken(server, request(server, CHAT, "Content-Length: 1000", body=hello().encode()), leaves=True) in ([], [400])
    assert spoken(server, request(server, CHAT, CHUNKED, body=b"ff\r\nabc"), leaves=True) in ([], [400])
    assert client.get("/health").json() == {"status": "ok"}


def test_a_policy_may_be_called_as_its_people_write(tmp_path: Path) -> None:
    """Names come from folders, and a header takes only some letters."""
    store = f"sqlite:///{tmp_path / 'store.db'}"
    with running(tmp_path / "модель 7", store, load=scripted(**{"модель 7": ScriptedEngine()})) as server, server.http() as client:
        for body in (hello(), hello(model='"модель 7"'), hello(stream="true")):
            response = post(client, body)
            assert response.status_code == 200
            assert response.headers["x-alignkit-policy"] == "%D0%BC%D0%BE%D0%B4%D0%B5%D0%BB%D1%8C%207@1"
        assert client.get("/v1/models").json()["data"][1]["id"] == "модель 7@1"


# Values that a JSON parser may give for a field, whatever the field is for.
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["live", "\x00", "text", "user"])
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8
)
FIELDS = st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields}))


@given(fields=st.dictionaries(FIELDS, JSON, max_size=4), path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
@settings(max_examples=200)
def test_any_value_for_any_field(client: httpx.Client, fields: dict[str, Any], path: str) -> None:
    good = HELLO if "chat" in path else {"model": "live", "prompt": "Hello"}
    post(client, json.dumps({**good, **fields}), path)
