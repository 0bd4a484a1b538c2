"""Redaction: what identifies somebody by its form is replaced before it is stored, nothing else is, and what is answered stays as it is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import select

from alignkit_serve.redaction import _PATTERNS, kept_of, redacted, unchanged
from alignkit_serve.settings import Limits
from alignkit_serve.store import inferences
from alignkit_serve.store.inferences import prompt_sha256
from alignkit_serve.store.tables import assignment, feedback
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running
from tests.serve.store.test_feedback import a_thumb

FOUND = {
    "jane.doe+news@mail.example.co.uk": "[email]",
    "JANE_99@example.com": "[email]",
    "jürgen@müller.de": "[email]",
    "a@b.com.c@d.com": "[email].[email]",
    "mailto:a@example.com?subject=x": "mailto:[email]?subject=x",
    "+49 30 1234567": "[phone]",
    "+1 (555) 123-4567": "[phone]",
    "+49 (0)30 / 123456": "[phone]",
    "+442071838750": "[phone]",
    "tel:+1-202-555-0143.": "tel:[phone].",
    "0049 30 123456": "[phone]",
    "DE89 3704 0044 0532 0130 00": "[iban]",
    "gb82west12345698765432": "[iban]",
    "NO9386011117947 is mine": "[iban] is mine",
    "4111 1111 1111 1111": "[card]",
    "378282246310005": "[card]",
    "from 2024, 5500-0000-0000-0004.": "from 2024, [card].",
    "2024 4111-1111-1111-1111 22": "2024 [card] 22",
    "192.168.0.1": "[ip]",
    "http://10.0.0.1:8080/": "http://[ip]:8080/",
    "::ffff:192.0.2.128": "[ip]",
    "fe80::1%eth0": "[ip]%eth0",
    "2001:db8:85a3::8a2e:370:7334": "[ip]",
    "4111 1111 1111 1111 22@b.com": "[card] [email]",
    "+49 30 123456-a@b.com": "[phone]-[email]",
    "a@b.com,c@d.com": "[email],[email]",
}
LEFT = (
    *("", "@", "a@b", "@jane", "a@b.c", "user@localhost", "50% @ 3.5"),
    *("1234567890123456", "4111 1111 1111 1112", "order 0012345678", "0.4111111111111111", "411111111111111111111"),
    *("DE89370400440532013001", "DE89 3704", "XX89370400440532013000", "DE893704004405320130000"),
    *("+1", "1 + 12345678", "2+49301234567", "(555) 123-4567", "555-1234", "+123456"),
    *("256.1.1.1", "1.2.3", "12:30:45", "00:1a:2b:3c:4d:5e", "std::vector", "a::b", "f(x)::g", "1:2:3:4:5:6:7:8:9"),
)


@pytest.mark.parametrize("text", FOUND)
def test_what_has_the_form_is_found(text: str) -> None:
    assert redacted(text) == FOUND[text]
    assert redacted(f"I said: {text}\nand left") == f"I said: {FOUND[text]}\nand left"


@pytest.mark.parametrize("text", LEFT)
def test_what_only_looks_alike_is_left(text: str) -> None:
    assert redacted(text) == text


PIECES = st.one_of(
    st.sampled_from(sorted(FOUND)),
    st.sampled_from(LEFT),
    st.sampled_from(["[email]", "[ip]", *"] [-.:@+/x7é_\n", "00", "4111", "DE89", "::1"]),
    st.text(alphabet="0123456789abcdefgxDE@+.-:()/ ]", max_size=30),
    st.text(max_size=5),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@given(TEXTS)
@example("+49 30 123456-a@b.com")
@example("a@b.com+49 30 1234567")
@example("10.0.0.1::1")
@example("1:2:3:4:5:6:7:1.2.3.4")
def test_twice_is_once(text: str) -> None:
    once = redacted(text)
    assert redacted(once) == once


LABELS = ("[email]", "[phone]", "[iban]", "[card]", "[ip]")


@given(TEXTS.filter(lambda text: not any(label in text for label in LABELS)))
def test_nothing_beside_a_match_changes(text: str) -> None:
    """What stands between the labels is in the text, in the same order, and the ends are the same."""
    marked = redacted(text)
    for label in LABELS:
        marked = marked.replace(label, "\0")
    first, *rest = marked.split("\0") if "\0" not in text else [text]
    assert text.startswith(first)
    at = len(first)
    for piece in rest:
        found = text.find(piece, at + 1)
        assert found > at or (found == at + 1 and not piece)
        at = found + len(piece)
    assert not rest or text.endswith(rest[-1])


@given(st.text(alphabet=st.characters(categories=["L", "Zs", "Po"], exclude_characters="@:./"), max_size=50))
def test_without_digits_and_signs_nothing_changes(text: str) -> None:
    assert redacted(text) == text


HARD = {
    "letters": "a",
    "digits": "4 ",
    "numbers of cards that are none": "4111111111111112-",
    "numbers of accounts that are none": "DE12 ",
    "signs of addresses": "x@",
    "addresses without an end": "a.",
    "colons": "a:",
    "plus": "+1",
    "prose": "The quick brown fox, 12 years old, said: hello. ",
}


@pytest.mark.parametrize("piece", HARD.values(), ids=HARD)
def test_a_long_text_of_almost_matches_is_read(piece: str) -> None:
    """It would not be over for hours if anything were read again and again."""
    longest = Limits().prompt_characters
    once = redacted(piece * (longest // len(piece)))
    assert len(once) <= longest
    assert redacted(once[-1000:]) == once[-1000:]


@pytest.mark.parametrize("kind", _PATTERNS)
def test_no_pattern_looks_further_than_a_word_or_two(kind: str) -> None:
    """The time is linear: from each place, no more than this is read."""
    before, form = _PATTERNS[kind]
    parser = importlib.import_module("re._parser")  # what knows a pattern's width has no public name
    assert parser.parse(before).getwidth() == (0, 0)
    assert 7 <= parser.parse(form).getwidth()[1] <= 700


def test_of_an_opinion_the_texts_are_redacted() -> None:
    thumb = a_thumb("cmp-1", rationale="ask a@b.com")
    assert kept_of(thumb, redacted).rationale == "ask [email]"
    assert kept_of(thumb, redacted).value == "up"
    for kind in ("correction", "demonstration", "comment"):
        assert kept_of(a_thumb("cmp-1", kind=kind, value="ask a@b.com"), redacted).value == "ask [email]"
    ranking = a_thumb("cmp-1", kind="ranking", value=[["10.0.0.1"], ["b"]])
    assert kept_of(ranking, redacted) == ranking
    assert kept_of(thumb, unchanged) == thumb


WORDS = ("Write ", "to ", "joe@example.com", ".")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    load = scripted(only=ScriptedEngine(words=WORDS))
    with running(tmp_path / "only", f"sqlite:///{tmp_path / 'store.db'}", load=load, redact=redacted) as started:
        yield started


def test_what_is_stored_is_redacted_and_what_is_answered_is_not(server: Running, tmp_path: Path) -> None:
    ask = {"model": "live", "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "I am jane@example.com"}]}
    with server.http("infer", "feedback:write", "feedback:read") as client:
        answer = client.post("/v1/chat/completions", json={**ask, "n": 2, "return_token_ids": True}).json()
        choice = answer["choices"][0]
        assert choice["message"]["content"] == "Write to joe@example.com."
        assert choice["alignkit"]["token_ids"] == [1, 2, 3, 4]
        shown = client.get(f"/v1/chat/completions/{answer['id']}").json()
        assert shown["choices"][0]["message"]["content"] == "Write to [email]."
        completion = choice["alignkit"]["completion_id"]
        on = {"target_type": "completion", "target_id": completion}
        sent = {**on, "kind": "correction", "value": "Call +49 30 1234567.", "rationale": "see 10.0.0.1"}
        said = client.post("/v1/feedback", json=sent, headers={"Idempotency-Key": "k"})
        again = client.post("/v1/feedback", json=sent, headers={"Idempotency-Key": "k"})
        assert (said.status_code, again.status_code, again.json()) == (201, 200, said.json())
        batch = client.post("/v1/feedback:batch", json={"items": [{**on, "kind": "comment", "value": "a@b.com", "idempotency_key": "b"}]})
        assert batch.json()["data"][0]["feedback"]["value"] == "[email]"
        revised = client.patch(f"/v1/feedback/{said.json()['id']}", json={"kind": "correction", "value": "Ask c@d.com."})
        assert revised.json()["value"] == "Ask [email]."
    found = server.store.read(lambda connection: inferences.get(connection, answer["id"]))
    assert found is not None
    assert found.redaction == "applied"
    assert [message["content"] for message in found.inference.messages] == ["Be kind.", "I am [email]"]
    assert found.inference.prompt_sha256 == prompt_sha256(found.inference.messages)
    for stored in found.completions:
        assert (stored.token_ids, stored.raw_logprobs, stored.behaviour_logprobs) == ((), None, None)
    texts = server.store.read(lambda connection: connection.execute(select(feedback.c.value, feedback.c.rationale)).all())
    assert set(texts) == {("Call [phone].", "see [ip]"), ("[email]", None), ("Ask [email].", None)}
    assert b"example.com" not in b"".join(path.read_bytes() for path in tmp_path.glob("store.db*"))


def test_what_is_labelled_is_redacted_too(server: Running) -> None:
    task = {"prompt": "Who is a@b.com?", "responses": ["a", "see 10.0.0.1"], "overlap": 1}
    with server.http("admin") as admin:
        assert admin.post("/v1/label/tasks:import", json=task).status_code == 201
    with server.http("label") as labeller:
        page = labeller.get("/label").text
        assert "Who is [email]?" in page
        assert "see [ip]" in page
        (id,) = server.store.read(lambda connection: connection.scalars(select(assignment.c.id)).all())
        draft = {"cards": [{}, {}], "comment": "ask c@d.com"}
        assert labeller.put(f"/label/{id}/draft", json=draft).status_code == 200
        assert labeller.post(f"/label/{id}/skip", data={"reason": "I know c@d.com"}).status_code == 303
    found = server.store.read(lambda connection: connection.execute(select(assignment)).one())
    assert (found.draft["comment"], found.reason) == ("ask [email]", "I know [email]")


@pytest.mark.parametrize(
    ("asked", "words", "kept"),
    [
        ("Hello?", ("Well", "."), ("none", (1, 2), (-0.5, -0.5))),
        # The ids are of the answer, and say nothing of the prompt; the log-probabilities would be those after another prompt.
        ("I am a@b.com", ("Well", "."), ("applied", (1, 2), None)),
        ("Hello?", ("a@b.com",), ("applied", (), None)),
    ],
)
def test_tokens_are_kept_where_they_tell_nothing(tmp_path: Path, asked: str, words: tuple[str, ...], kept: tuple[object, ...]) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    with (
        running(tmp_path / "only", store, load=scripted(only=ScriptedEngine(words=words)), redact=redacted) as server,
        server.http() as client,
    ):
        id = client.post("/v1/chat/completions", json={"model": "live", "messages": [{"role": "user", "content": asked}]}).json()["id"]
        found = server.store.read(lambda connection: inferences.get(connection, id))
        assert found is not None
        (stored,) = found.completions
        assert (found.redaction, stored.token_ids, stored.raw_logprobs) == kept


def test_without_the_option_everything_is_stored_as_it_was_said(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    with running(tmp_path / "only", store, load=scripted(only=ScriptedEngine(words=WORDS))) as server, server.http() as client:
        body = {"model": "live", "prompt": ["I am a@b.com", "10.0.0.1"], "max_tokens": 4}
        client.post("/v1/completions", json=body)
        rows = server.store.read(lambda connection: connection.execute(select(inferences.inference)).all())
        assert [(row.messages[0]["content"], row.redaction) for row in rows] == [("I am a@b.com", "none"), ("10.0.0.1", "none")]
