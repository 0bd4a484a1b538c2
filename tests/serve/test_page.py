"""The chat page in a real browser, under the headers that the server sends. No test leaves this machine, and none may break those rules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import select

from alignkit_serve.envelope import CONTENT_SECURITY_POLICY as SENT
from alignkit_serve.page import PAGES, page
from alignkit_serve.store.tables import feedback
from tests.serve.browsing import opened, watched
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running
from tests.serve.scripted import CONTENT_SECURITY_POLICY, POLICY, Refuses, Says, Scripted, model, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page, Route

ONE_BYTE_AT_A_TIME = """
const real = window.fetch;
const single = () => new TransformStream({transform: (chunk, out) => chunk.forEach((byte) => out.enqueue(new Uint8Array([byte])))});
window.fetch = async (...what) => {
  const response = await real(...what);
  return new Response(response.body.pipeThrough(single()), response);
};
"""


@pytest.fixture
def server() -> Iterator[Scripted]:
    with serving() as script:
        yield script


@pytest.fixture
def tab(browser: Browser, server: Scripted) -> Iterator[Page]:
    with watched(opened(browser), server.url) as tab:
        yield tab


@pytest.fixture
def chat(tab: Page, server: Scripted) -> Page:
    """The page, ready for a message."""
    tab.goto(server.url)
    seen(tab.locator("#model option"), count=2)
    return tab


def seen(locator: Locator, text: str | re.Pattern[str] | None = None, *, count: int | None = None) -> None:
    """Wait until it is so."""
    from playwright.sync_api import expect

    if text is not None:
        expect(locator).to_have_text(text, timeout=5_000)
    if count is not None:
        expect(locator).to_have_count(count, timeout=5_000)


def ask(chat: Page, text: str) -> None:
    chat.fill("#message", text)
    chat.press("#message", "Enter")


def answer(chat: Page, number: int = 0) -> Locator:
    return chat.locator(".answer > .text").nth(number)


def facts(chat: Page, number: int = 0) -> Locator:
    return chat.locator(".facts").nth(number)


def roles(request: dict[str, list[dict[str, str]]]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in request["messages"]]


def test_the_rules_here_are_those_of_the_server() -> None:
    assert CONTENT_SECURITY_POLICY == SENT


def test_files_come_from_a_fixed_table_and_have_nothing_inline() -> None:
    html = page("chat.html")
    assert (html.media_type, html.etag) == ("text/html; charset=utf-8", page("chat.html").etag)
    assert len({page(name).etag for name in PAGES}) == len(PAGES)
    assert not re.search(rb"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|https?:(?!//www\.w3\.org/2000/svg)", html.content)
    assert set(re.findall(rb"/assets/([\w.]+)", html.content)) == {b"chat.css", b"chat.js"}
    assert b"innerHTML" not in page("chat.js").content
    with pytest.raises(KeyError):
        page("../app.py")


def test_a_conversation(chat: Page, server: Scripted) -> None:
    server.answers += [Says("Good", " day", ",\n", "  you."), Says("Still."), Says("Anew")]
    ask(chat, "hello")
    seen(answer(chat), "Good day,\n  you.")
    seen(facts(chat), re.compile(rf"^policy {POLICY} · 4 tokens · \d+\.\d s$"))
    assert chat.locator(".answer").get_attribute("data-completion") == "choice-1"
    assert answer(chat).evaluate("(shown) => getComputedStyle(shown).whiteSpace") == "pre-wrap"
    ask(chat, "and now?")
    seen(facts(chat, 1), re.compile("· 1 token ·"))
    chat.click("#new")
    seen(chat.locator(".turn"), count=0)
    assert chat.is_visible("#welcome")
    ask(chat, "third")
    seen(answer(chat), "Anew")
    assert [roles(request) for request in server.seen] == [
        [("user", "hello")],
        [("user", "hello"), ("assistant", "Good day,\n  you."), ("user", "and now?")],
        [("user", "third")],
    ]
    assert {key: server.seen[0][key] for key in server.seen[0] if key != "messages"} == {
        "model": "live",
        "stream": True,
        "stream_options": {"include_usage": True},
        "alignkit": {"consent": {"train": False, "version": "chat-1"}},
    }


def test_an_answer_is_seen_while_it_grows_and_stops_when_told_to(chat: Page, server: Scripted) -> None:
    server.answers += [Says("Once", " upon", then="never"), Says("The end.")]
    ask(chat, "a tale")
    seen(answer(chat), "Once upon")
    seen(facts(chat), f"policy {POLICY}")
    assert chat.locator(".answer").get_attribute("aria-busy") == "true"
    assert not chat.is_visible("#send")
    ask(chat, "kept for later")
    chat.click("#stop")
    seen(facts(chat), re.compile(rf"^policy {POLICY} · \d+\.\d s · stopped$"))
    assert server.gone.wait(30)
    assert chat.locator(".answer").get_attribute("aria-busy") == "false"
    assert chat.evaluate("document.activeElement.id") == "message"
    assert chat.input_value("#message") == "kept for later"
    chat.press("#message", "Enter")
    seen(answer(chat, 1), "The end.")
    assert roles(server.seen[1]) == [("user", "a tale"), ("assistant", "Once upon"), ("user", "kept for later")]


def test_a_new_conversation_stops_the_old_ones_answer(chat: Page, server: Scripted) -> None:
    server.answers += [Says("Once", then="never"), Says("Fresh")]
    ask(chat, "a tale")
    seen(answer(chat), "Once")
    chat.click("#new")
    assert server.gone.wait(30)
    ask(chat, "again")
    seen(answer(chat), "Fresh")
    seen(chat.locator("#spoken"), "Fresh")
    assert roles(server.seen[1]) == [("user", "again")]


def test_a_stream_is_read_whole_however_it_was_cut(tab: Page, server: Scripted) -> None:
    tab.add_init_script(ONE_BYTE_AT_A_TIME)
    tab.goto(server.url)
    server.answers += [Says("Grüße, ", "🙂\u2028", "\ud83d", "data: x\n\n", "\\n")]
    ask(tab, "hi")
    seen(facts(tab), re.compile("5 tokens"))
    # Half a character has no bytes: what writes the stream puts a question mark there.
    assert answer(tab).evaluate("(shown) => shown.textContent") == "Grüße, 🙂\u2028?data: x\n\n\\n"
    assert answer(tab).evaluate("(shown) => shown.childNodes.length") == 1


def test_what_is_set_is_sent(chat: Page, server: Scripted) -> None:
    server.answers += [Says("ok", then="length"), Says("ok")]
    chat.click("#open-settings")
    chat.fill("#system", "  Be brief. ")
    chat.fill("#temperature", "0")
    chat.fill("#max-tokens", "1")
    chat.keyboard.press("Escape")
    assert not chat.is_visible("#settings")
    chat.check("#consent")
    ask(chat, "hi")
    seen(facts(chat), re.compile("· cut off at the token limit$"))
    [request] = server.seen
    assert roles(request) == [("system", "Be brief."), ("user", "hi")]
    assert (request["temperature"], request["max_tokens"]) == (0, 1)
    assert request["alignkit"] == {"consent": {"train": True, "version": "chat-1"}}
    chat.click("#open-settings")
    chat.fill("#temperature", "3")
    chat.keyboard.press("Escape")
    ask(chat, "not sent")
    assert chat.is_visible("#settings")
    assert chat.input_value("#message") == "not sent"
    assert len(server.seen) == 1
    chat.reload()
    assert not chat.is_checked("#consent")


def test_models_are_a_choice_where_they_are_several(chat: Page, server: Scripted) -> None:
    assert not chat.is_visible("#model")
    assert chat.inner_text("#model-name") == POLICY
    server.models = [model("live"), model(POLICY), model("sft-19c2", "sft-19c2")]
    chat.reload()
    seen(chat.locator("#model option"), count=3)
    assert chat.locator("#model option").all_inner_texts() == [f"live ({POLICY})", POLICY, "sft-19c2"]
    assert not chat.is_visible("#model-name")
    chat.select_option("#model", "sft-19c2")
    server.answers += [Says("ok")]
    ask(chat, "hi")
    seen(answer(chat), "ok")
    assert server.seen[0]["model"] == "sft-19c2"


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (Refuses(429, "the queue is full", {"Retry-After": "12"}), "the queue is full. Try again in 12 seconds."),
        (Refuses(503, "The server stops.", {"Retry-After": "1"}), "The server stops. Try again in 1 second."),
        (Refuses(400, "<b>max_tokens</b> is 0"), "<b>max_tokens</b> is 0"),
        (Says("half", then="error: the engine has stopped"), "the engine has stopped"),
        (Says("half", then="broken"), "The connection was lost before the answer was complete."),
    ],
)
def test_errors_are_told_in_words_and_the_question_can_be_asked_again(
    chat: Page, server: Scripted, result: Refuses | Says, shown: str
) -> None:
    server.answers += [result, Says("Better.")]
    ask(chat, "hi")
    seen(chat.locator(".answer .problem span"), shown)
    chat.click(".answer .problem button")
    seen(answer(chat), "Better.")
    assert not chat.is_visible(".answer .problem")
    assert [roles(request) for request in server.seen] == [[("user", "hi")], [("user", "hi")]]


def test_only_the_last_question_can_be_asked_again_and_what_has_no_answer_is_left_out(chat: Page, server: Scripted) -> None:
    server.answers += [Refuses(500, "a mistake"), Says("Yes.")]
    ask(chat, "first")
    seen(chat.locator(".answer .problem span"), "a mistake")
    ask(chat, "second")
    seen(answer(chat, 1), "Yes.")
    assert not chat.is_visible(".answer .problem button")
    assert roles(server.seen[1]) == [("user", "second")]


def test_a_server_that_is_away_or_not_this_one_is_told_in_words(chat: Page, server: Scripted) -> None:
    chat.context.set_offline(True)
    ask(chat, "hi")
    seen(chat.locator(".answer .problem span"), "The server cannot be reached. Is it running?")
    chat.context.set_offline(False)
    chat.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    chat.click(".answer .problem button")
    seen(chat.locator(".answer .problem span"), re.compile("^The server answered 502"))


def test_a_server_that_is_not_ready_is_asked_for_its_models_again(tab: Page, server: Scripted) -> None:
    loading = '{"error": {"message": "the policy is being loaded"}}'
    tab.route("**/v1/models", lambda route: route.fulfill(status=503, body=loading, headers={"Retry-After": "5"}), times=1)
    tab.goto(server.url)
    seen(tab.locator("#notice"), "the policy is being loaded. Try again in 5 seconds.")
    server.answers += [Says("ok")]
    ask(tab, "hi")
    seen(answer(tab), "ok")
    assert not tab.is_visible("#notice")
    assert server.seen[0]["model"] == "live"


def test_a_key_is_asked_for_kept_for_the_tab_and_forgotten(tab: Page, server: Scripted) -> None:
    server.key = "ak_1_secret"
    server.answers += [Says("Welcome."), Says("Again.")]
    tab.goto(server.url)
    tab.wait_for_selector("#key-form")
    assert tab.evaluate("document.activeElement.id") == "key"
    tab.keyboard.type("ak_wrong")
    tab.keyboard.press("Enter")
    seen(tab.locator("#key-reason"), "there is no such key, or it is not in force")
    assert tab.evaluate("sessionStorage.length") == 0
    tab.keyboard.type("ak_1_secret")
    tab.keyboard.press("Enter")
    seen(tab.locator("#model option"), count=2)
    assert not tab.is_visible("#key-form")
    assert tab.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie]") == [{"alignkit.key": "ak_1_secret"}, {}, ""]
    ask(tab, "hi")
    seen(answer(tab), "Welcome.")
    tab.click("#open-settings")
    tab.click("#forget")
    tab.keyboard.press("Escape")
    ask(tab, "and without it?")
    tab.wait_for_selector("#key-form")  # What was asked waits for the key.
    tab.fill("#key", "ak_1_secret")
    tab.click("#key-form button")
    seen(answer(tab, 1), "Again.")
    assert roles(server.seen[1]) == [("user", "hi"), ("assistant", "Welcome."), ("user", "and without it?")]


HOSTILE = [
    "<img src=x onerror=window.hacked++>",
    "</div></script><script>window.hacked++;alert(1)</script>",
    "<svg/onload=window.hacked++><iframe srcdoc='<script>parent.hacked++</script>'>",
    "[a link](javascript:window.hacked++) <a href=javascript:window.hacked++>x</a>",
    "<style>body{display:none}</style><link rel=stylesheet href=https://example.com/x.css>",
    "<img src=https://example.com/pixel.png><base href=https://example.com>",
    "&lt;b&gt; &amp; ${window.hacked++} {{7*7}} %3Cscript%3E",
    "<template><p></template><form action=https://example.com><button autofocus>",
]


def test_nothing_that_is_said_runs_or_is_fetched(chat: Page, server: Scripted) -> None:
    before = chat.locator("img, script, iframe, a, link, style, form, base, svg").count()
    for number, text in enumerate(HOSTILE):
        server.answers += [Says(*re.findall(".{1,5}", text), then="stop" if number % 2 else f"error: {text}")]
        ask(chat, text)
        seen(facts(chat, number), re.compile(r"\d s$"))
        assert answer(chat, number).evaluate("(shown) => shown.textContent") == text
        assert chat.locator(".question").nth(number).evaluate("(shown) => shown.textContent") == text
        assert chat.locator("#spoken").evaluate("(shown) => shown.textContent") == text
    assert chat.locator("img, script, iframe, a, link, style, form, base, svg").count() == before
    assert chat.locator(".answer *, #spoken *").evaluate_all("(all) => [...new Set(all.map((one) => one.localName))].sort()") == [
        "button",
        "div",
        "p",
        "span",
    ]


def test_a_model_named_in_markup_is_a_name(tab: Page, server: Scripted) -> None:
    server.models = [model("<b onclick=x>", "<i>"), model("b", "<img src=x>")]
    tab.goto(server.url)
    seen(tab.locator("#model option"), count=2)
    assert tab.locator("#model option").all_text_contents() == ["<b onclick=x> (<i>)", "b (<img src=x>)"]


def test_controls_that_turn_text_around_are_shown(chat: Page, server: Scripted) -> None:
    server.answers += [Says("safe\u202e", "\u2066gpj", ".exe\u2069", " \x1b[2J\x00 \u200fשלום\tx")]
    ask(chat, "\u202eolleh")
    shown = "safeU+202EU+2066gpj.exeU+2069 U+001B[2JU+0000 U+200Fשלום\tx"
    seen(facts(chat), re.compile(r"\d s$"))
    assert answer(chat).evaluate("(shown) => shown.textContent") == shown
    assert chat.locator(".question").inner_text() == "U+202Eolleh"
    assert answer(chat).locator(".control").count() == 6
    # What is sent back is what was said.
    server.answers += [Says("ok")]
    ask(chat, "next")
    seen(answer(chat, 1), "ok")
    assert server.seen[1]["messages"][1]["content"] == "safe\u202e\u2066gpj.exe\u2069 \x1b[2J\x00 \u200fשלום\tx"


def test_screen_readers_get_whole_sentences(chat: Page, server: Scripted) -> None:
    server.answers += [Says("One", " two", ". Thr", "ee! Fo", "ur", then="never"), Says("Five", " six")]
    ask(chat, "count")
    seen(answer(chat), "One two. Three! Four")
    assert chat.locator("#spoken p").all_text_contents() == ["One two. ", "Three! "]
    assert chat.get_attribute("#spoken", "aria-live") == "polite"
    chat.keyboard.press("Escape")
    seen(facts(chat), re.compile("stopped$"))
    assert chat.locator("#spoken p").count() == 2
    ask(chat, "on")
    seen(chat.locator("#spoken"), "Five six")


def test_all_of_it_goes_by_keyboard(chat: Page, server: Scripted) -> None:
    server.models = [model("live"), model("sft-19c2", "sft-19c2")]
    chat.reload()
    seen(chat.locator("#model option"), count=2)
    server.answers += [Says("Once", then="never"), Says("ok")]
    assert chat.evaluate("document.activeElement.id") == "message"
    chat.keyboard.type("two")
    chat.keyboard.press("Shift+Enter")
    chat.keyboard.type("lines")
    chat.evaluate(
        """document.activeElement.dispatchEvent(
            new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))"""
    )
    assert server.seen == []  # Enter chose a word of an input method.
    chat.keyboard.press("Enter")
    seen(answer(chat), "Once")
    assert roles(server.seen[0]) == [("user", "two\nlines")]
    chat.click("#open-settings")
    chat.keyboard.press("Escape")
    assert chat.is_visible("#stop")  # The first Escape closed the settings, nothing else.
    chat.keyboard.press("Escape")
    seen(facts(chat), re.compile("stopped$"))
    assert server.gone.wait(30)
    chat.focus("#message")
    chat.keyboard.type("more")
    order = []
    marked = """() => { const one = document.activeElement;
        return [one, one.closest(".field")].some((each) => each && getComputedStyle(each).outlineStyle === "solid"); }"""
    for _ in range(5):
        order.append(chat.evaluate("document.activeElement.id"))
        assert chat.evaluate(marked), order
        chat.keyboard.press("Shift+Tab")
    assert order == ["message", "conversation", "open-settings", "new", "model"]
    chat.focus("#message")
    for reached in ("send", "consent"):
        chat.keyboard.press("Tab")
        assert chat.evaluate("document.activeElement.id") == reached
    chat.keyboard.press("Space")
    chat.keyboard.press("Shift+Tab")
    chat.keyboard.press("Enter")
    seen(answer(chat, 1), "ok")
    assert server.seen[1]["alignkit"]["consent"]["train"] is True
    assert chat.evaluate("document.activeElement.id") == "message"


def test_it_fits_a_small_telephone(tab: Page, server: Scripted) -> None:
    tab.set_viewport_size({"width": 360, "height": 640})
    server.key = "k"
    wide = "() => [...document.querySelectorAll('html, main, .settings')].map((one) => one.scrollWidth - one.clientWidth)"
    tab.goto(server.url)
    tab.wait_for_selector("#key-form")
    assert tab.evaluate(wide) == [0, 0, 0]
    server.models = [model("a-policy-with-a-very-long-name-" * 3), model("another", "another")]
    tab.fill("#key", "k")
    tab.press("#key", "Enter")
    seen(tab.locator("#model option"), count=2)
    long = "Donaudampfschifffahrtsgesellschaft" * 9
    server.answers += [Says(long, " ", "word " * 400), Refuses(400, long)]
    for number in range(2):
        ask(tab, long)
        seen(tab.locator(".answer[aria-busy=false]"), count=number + 1)
    tab.click("#open-settings")
    assert tab.evaluate(wide) == [0, 0, 0]
    inside = """() => [...document.querySelectorAll("button, input, select, textarea")].filter((one) => one.checkVisibility())
        .every((one) => one.getBoundingClientRect().left >= 0 && one.getBoundingClientRect().right <= 360)"""
    assert tab.evaluate(inside)


def test_the_end_stays_in_sight_unless_one_looks_elsewhere(chat: Page, server: Scripted) -> None:
    chat.set_viewport_size({"width": 600, "height": 500})
    below = "() => { const all = document.querySelector('main'); return all.scrollHeight - all.scrollTop - all.clientHeight; }"
    server.answers += [Says(*["a line\n"] * 60), Says(*["a line\n"] * 60)]
    ask(chat, "long")
    seen(facts(chat), re.compile("60 tokens"))
    assert chat.evaluate(below) < 60
    chat.route("**/v1/chat/completions", lambda route: (chat.evaluate("document.querySelector('main').scrollTop = 0"), route.continue_()))
    ask(chat, "once more")
    seen(facts(chat, 1), re.compile("60 tokens"))
    assert chat.evaluate("document.querySelector('main').scrollTop") == 0


def test_light_and_dark_follow_the_system(chat: Page) -> None:
    colours = "() => { const body = getComputedStyle(document.body); return [body.backgroundColor, body.color]; }"
    chat.emulate_media(color_scheme="light")
    light = chat.evaluate(colours)
    chat.emulate_media(color_scheme="dark")
    assert light == ["rgb(246, 247, 249)", "rgb(28, 35, 48)"]
    assert chat.evaluate(colours) == ["rgb(16, 20, 27)", "rgb(231, 234, 240)"]


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Running]:
    """A real server, whose policy says the same to everyone."""
    with running(tmp_path / "only", f"sqlite:///{tmp_path / 'store.db'}", load=scripted(only=ScriptedEngine())) as started:
        yield started


@pytest.fixture
def own(browser: Browser, real: Running) -> Iterator[Page]:
    """An empty tab beside it."""
    with watched(opened(browser), real.url) as own:
        yield own


def asked_with(own: Page, real: Running, key: str) -> None:
    """A key is given, and a question was answered."""
    own.goto(real.url)
    own.fill("#key", key)
    own.press("#key", "Enter")
    seen(own.locator("#model option"), count=2)
    ask(own, "hi")
    seen(answer(own), "Well, yes.")
    own.wait_for_selector(".feedback button")


def thumbs(real: Running) -> list[tuple[str, str, str]]:
    """What was said, of what, and what has become of it."""
    found = real.store.read(lambda connection: list(connection.execute(select(feedback).order_by(feedback.c.id))))
    return [(row.target_id, row.value, row.state) for row in found]


def test_a_thumb_is_given_switched_and_taken_back(own: Page, real: Running) -> None:
    asked_with(own, real, real.key("infer", "feedback:write"))
    completion = own.locator(".answer").get_attribute("data-completion") or ""
    good, bad = own.get_by_role("button", name="Good answer"), own.get_by_role("button", name="Bad answer")
    pressed = ".feedback button[aria-pressed=true]"
    good.click()
    seen(own.locator(f"{pressed}.up"), count=1)
    assert thumbs(real) == [(completion, "up", "active")]
    bad.press("Enter")
    seen(own.locator(f"{pressed}.down"), count=1)
    seen(own.locator(pressed), count=1)
    assert thumbs(real) == [(completion, "up", "superseded"), (completion, "down", "active")]
    bad.click()
    seen(own.locator(pressed), count=0)
    assert thumbs(real)[1:] == [(completion, "down", "retracted")]
    good.click()
    seen(own.locator(f"{pressed}.up"), count=1)
    assert thumbs(real)[2:] == [(completion, "up", "active")]


def test_a_thumb_whose_answer_was_lost_is_given_once(own: Page, real: Running) -> None:
    asked_with(own, real, real.key("infer", "feedback:write"))

    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    own.route("**/v1/feedback", lose, times=1)
    own.get_by_role("button", name="Good answer").click()
    seen(own.locator(".feedback [role=status]"), "The server cannot be reached. Is it running?")
    seen(own.locator(".feedback button[aria-pressed=true]"), count=0)
    own.get_by_role("button", name="Good answer").click()
    seen(own.locator(".feedback button[aria-pressed=true]"), count=1)
    assert [said[1:] for said in thumbs(real)] == [("up", "active")]


def test_a_key_that_may_not_judge_is_told_so(own: Page, real: Running) -> None:
    asked_with(own, real, real.key("infer"))
    own.get_by_role("button", name="Good answer").click()
    seen(own.locator(".feedback [role=status]"), "This key may not give feedback.")
    assert not own.is_visible(".feedback button")
    assert thumbs(real) == []


def test_only_an_answer_that_ended_well_can_be_judged(chat: Page, server: Scripted) -> None:
    server.answers += [Says("half", then="broken"), Says("whole")]
    ask(chat, "hi")
    seen(chat.locator(".answer .problem span"), "The connection was lost before the answer was complete.")
    assert not chat.is_visible(".feedback")
    chat.click(".answer .problem button")
    seen(answer(chat), "whole")
    chat.wait_for_selector(".feedback button")
