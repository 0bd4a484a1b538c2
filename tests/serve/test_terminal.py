"""The chat in the terminal: as a person uses it, through a pseudo-terminal, and as a script does, through a pipe."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from alignkit.api import AlignkitError
from alignkit_serve.terminal import chat, events, visible
from tests.serve.scripted import POLICY, Refuses, Says, Scripted, model, serving


@pytest.fixture
def server() -> Iterator[Scripted]:
    with serving() as script:
        yield script


@dataclass
class Piped:
    """A chat whose input is a file."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def __call__(
        self,
        url: str,
        *lines: str,
        key: str | None = None,
        model: str | None = None,
        system: str | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> Piped:
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        try:
            chat(url, key, model, system, temperature, max_tokens)
        finally:
            self.out, self.err = self.capsys.readouterr()
        return self


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Piped:
    return Piped(monkeypatch, capsys)


def roles(request: dict[str, list[dict[str, str]]]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in request["messages"]]


def test_each_line_of_a_file_is_answered_and_the_conversation_goes_on(server: Scripted, piped: Piped) -> None:
    server.answers += [Says("Good", " day", "."), Says("Still", " good.")]
    said = piped(server.url, "hello", "", "and now?")
    assert said.out == "Good day.\nStill good.\n"
    first, second = said.err.splitlines()
    assert first.startswith(f"policy {POLICY} · 3 tokens · ")
    assert second.startswith(f"policy {POLICY} · 2 tokens · ")
    assert [roles(request) for request in server.seen] == [
        [("user", "hello")],
        [("user", "hello"), ("assistant", "Good day."), ("user", "and now?")],
    ]
    assert server.seen[0]["model"] == "live"
    assert "temperature" not in server.seen[0]
    assert "max_tokens" not in server.seen[0]


def test_what_is_set_is_sent(server: Scripted, piped: Piped) -> None:
    server.key = "ak_1_secret"
    server.answers += [Says("ok", then="length")]
    said = piped(f"{server.url}/v1/", "hi", key="ak_1_secret", model=POLICY, system="Be brief.", temperature=0.0, max_tokens=1)
    [request] = server.seen
    assert roles(request) == [("system", "Be brief."), ("user", "hi")]
    assert (request["model"], request["temperature"], request["max_tokens"]) == (POLICY, 0.0, 1)
    assert said.err.endswith(" · cut off at the token limit\n")


def test_commands_change_what_comes_next(server: Scripted, piped: Piped) -> None:
    server.models = [model("live"), model("sft-1", "sft-1")]
    server.answers += [Says("one"), Says("two"), Says("three")]
    lines = ["a", "/system  Rhyme. ", "/model sft-1", "b", "/new", "/system", " /c", "/model", "/help", "/quit", "never asked"]
    said = piped(server.url, *lines)
    assert said.out == "one\ntwo\nthree\n"
    assert [(request["model"], roles(request)) for request in server.seen] == [
        ("live", [("user", "a")]),
        ("sft-1", [("system", "Rhyme."), ("user", "a"), ("assistant", "one"), ("user", "b")]),
        ("sft-1", [("user", "/c")]),
    ]
    assert "  live\n* sft-1\n" in said.err
    assert "/system TEXT" in said.err


@pytest.mark.parametrize(
    ("line", "message"),
    [("/model gpt-9", f"there is no model 'gpt-9'; there are: live, {POLICY}"), ("/modle x", "/modle is no command; /help lists them")],
)
def test_a_command_that_cannot_be_done_says_why(server: Scripted, piped: Piped, line: str, message: str) -> None:
    with pytest.raises(AlignkitError) as raised:
        piped(server.url, line)
    assert str(raised.value) == message


def test_errors_are_one_line_in_the_servers_words(server: Scripted, piped: Piped) -> None:
    told: dict[str, Refuses | Says] = {
        "the queue is full; try again in 3 s": Refuses(429, "the queue is full", {"Retry-After": "3"}),
        "max_tokens: [U+001B][2Jmust be positive": Refuses(400, "max_tokens: \x1b[2Jmust be positive"),
        "the engine has stopped": Says("half", then="error: the engine has stopped"),
        "the connection was lost before the answer was complete": Says("half", then="broken"),
    }
    for message, answer in told.items():
        server.answers += [answer]
        with pytest.raises(AlignkitError) as raised:
            piped(server.url, "hi")
        assert str(raised.value) == message
        assert piped.out == ("half\n" if isinstance(answer, Says) else "")


def test_who_has_no_key_is_told_how_to_make_one(server: Scripted, piped: Piped) -> None:
    server.key = "ak_1_secret"
    with pytest.raises(AlignkitError) as raised:
        piped(server.url, "hi")
    assert str(raised.value) == (
        "there is no such key, or it is not in force; make a key with: alignkit keys create --scopes infer, and set ALIGNKIT_API_KEY to it"
    )
    with pytest.raises(AlignkitError, match="the key has characters that no key has"):
        piped(server.url, "hi", key="ak_1_sécret\n")


def test_where_no_server_is_one_is_told_how_to_start_it(piped: Piped) -> None:
    with serving() as script:
        url = script.url
    with pytest.raises(AlignkitError, match=rf"no server answers at {url} \(.*refused\); start one with: alignkit serve RUN"):
        piped(url, "hi")
    with pytest.raises(AlignkitError, match=r"'127\.0\.0\.1:8000' is no address of a server; it should look like http://127"):
        piped("127.0.0.1:8000", "hi")


def test_another_kind_of_server_is_named(server: Scripted, piped: Piped) -> None:
    with pytest.raises(AlignkitError, match=r"/elsewhere/v1/models answered 404 in another form than alignkit's; is there an"):
        piped(f"{server.url}/elsewhere", "hi")
    server.models = []
    with pytest.raises(AlignkitError, match="the server has no model"):
        piped(server.url, "hi")


def test_an_answer_cannot_command_the_terminal(server: Scripted, piped: Piped) -> None:
    server.answers += [Says("\x1b[2J", "\x1b]0;title\x07", "a\rb\x9b1m", "\u202etxt", "\ttab\nline \u2028 é 🙂")]
    assert piped(server.url, "hi").out == ("[U+001B][2J[U+001B]]0;title[U+0007]a[U+000D]b[U+009B]1m[U+202E]txt\ttab\nline \u2028 é 🙂\n")


def test_half_a_character_neither_stops_a_question_nor_an_answer(server: Scripted, piped: Piped) -> None:
    server.answers += [Says("fine")]
    assert piped(server.url, "caf\udcc3").out == "fine\n"
    assert visible("\ud83d") == "[U+D83D]"


def test_a_terminal_that_lacks_a_letter_shows_another(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers += [Says("naïve 🙂")]
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    chat(server.url, None, None, None, None, None)
    assert raw.getvalue() == "naïve ?\n".encode("latin-1")


def test_events_are_whole_however_the_bytes_were_cut() -> None:
    stream = 'data: {"a": "é\u2028\x85🙂"}\r\n\r\n: ping\n\ndata:[DONE]\n\n'.encode()
    whole = ['{"a": "é\u2028\x85🙂"}', "[DONE]"]
    for size in (1, 2, 3, 7, len(stream)):
        assert list(events(stream[i : i + size] for i in range(0, len(stream), size))) == whole


def test_bytes_that_are_no_text_are_a_mistake_with_a_name(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(AlignkitError, match="the input is not utf-8 text: invalid start byte"):
        chat(server.url, None, None, None, None, None)


@dataclass
class Person:
    """Somebody at a terminal: types, and reads until something has appeared."""

    url: str
    screen: str = ""
    read: int = 0
    _process: subprocess.Popen[bytes] = field(init=False)
    _terminal: int = field(init=False)

    def __post_init__(self) -> None:
        pty = pytest.importorskip("pty", reason="there are no pseudo-terminals here")
        self._terminal, theirs = pty.openpty()
        code = f"from alignkit_serve.terminal import chat; chat({self.url!r}, None, None, None, None, None)"
        # Its own session, of which the terminal is in control: so that Ctrl-C is a signal there. A shell starts what runs in its
        # background with that signal ignored, and so would be whatever the tests start from there; a person's shell does not.
        login = (
            "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGINT, signal.SIG_DFL); "
            "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", login, sys.executable, "-c", code]
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)

    def types(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def sees(self, text: str, seconds: float = 30) -> None:
        """Wait for ``text`` after what was seen before."""
        until = time.monotonic() + seconds
        while (found := self.screen.find(text, self.read)) < 0:
            if time.monotonic() > until:
                raise TimeoutError(f"{text!r} is not on the screen: {self.screen!r}")
            if select.select([self._terminal], [], [], 0.1)[0]:
                self.screen += os.read(self._terminal, 65536).decode(errors="replace")
        self.read = found + len(text)

    def interrupts(self, text: str) -> None:
        """Press Ctrl-C until ``text`` appears."""
        for _ in range(6):
            self.types("\x03")
            # One that comes between Python's last look at signals and its wait for the network is noticed at the next.
            with contextlib.suppress(TimeoutError):
                return self.sees(text, seconds=5)
        raise AssertionError(f"Ctrl-C does not bring {text!r}: {self.screen!r}")

    def leaves(self, key: str) -> int:
        """Press ``key`` until the chat has ended; returns its exit code."""
        for _ in range(6):
            self.types(key)
            # A key that is pressed in the moment in which the prompt appears is lost: Python has not begun to wait for keys.
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(5)
        raise AssertionError(f"{key!r} does not end it: {self.screen!r}")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._terminal)


@pytest.fixture
def person(server: Scripted) -> Iterator[Person]:
    person = Person(server.url)
    yield person
    person.close()


def test_ctrl_c_stops_an_answer_and_at_the_prompt_it_leaves(server: Scripted, person: Person) -> None:
    server.answers += [Says("Once", " upon", then="never"), Says("The end.")]
    person.sees("/help")
    person.sees("> ")
    person.types("a tale\n")
    person.sees("Once upon")
    person.interrupts("stopped")
    assert server.gone.wait(30)  # The connection was closed: nobody computes for it any more.
    person.sees("> ")
    person.types("end it\n")
    person.sees("The end.")
    person.sees(f"policy {POLICY} · 1 token · ")
    assert roles(server.seen[1]) == [("user", "a tale"), ("assistant", "Once upon"), ("user", "end it")]
    person.sees("> ")
    assert person.leaves("\x03") == 0


def test_a_person_goes_on_after_a_problem_and_ctrl_d_leaves(server: Scripted, person: Person) -> None:
    server.answers += [Refuses(503, "the policy is being loaded", {"Retry-After": "2"}), Says("Here.")]
    person.sees("> ")
    person.types("there?\n")
    person.sees("error: the policy is being loaded; try again in 2 s")
    person.sees("> ")
    person.types("there?\n")
    person.sees("Here.")
    assert roles(server.seen[1]) == [("user", "there?")]
    person.sees("> ")
    assert person.leaves("\x04") == 0
    assert "Traceback" not in person.screen
