"""The labelling page in a real browser: by keyboard, by dragging, without a script, and with answers that mean harm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

from alignkit_serve.store import inferences, new_id
from alignkit_serve.store.groups import Group, add_group
from alignkit_serve.store.tables import assignment, feedback
from tests.serve.browsing import opened, watched
from tests.serve.fakes import ScriptedEngine, scripted
from tests.serve.running import Running, running
from tests.serve.store.rows import a_completion, an_inference, stored_policy
from tests.serve.store.test_labels import add
from tests.serve.test_page import HOSTILE, seen

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "only", f"sqlite:///{tmp_path / 'store.db'}", load=scripted(only=ScriptedEngine())) as started:
        yield started


@pytest.fixture
def tab(browser: Browser, server: Running) -> Iterator[Page]:
    with watched(opened(browser), server.url) as tab:
        yield tab


def pool(server: Running, texts: Sequence[str], prompt: str = "Why is the sky blue?") -> Group:
    """A task of these answers."""
    asked = an_inference(stored_policy(server.store), messages=[{"role": "user", "content": prompt}])
    answers = [a_completion(asked, i, text=text) for i, text in enumerate(texts)]
    group = Group(new_id("grp-"), asked.prompt_sha256, "n", None, asked.id, tuple((one.id, i) for i, one in enumerate(answers)))

    def make(connection: Any) -> None:
        inferences.begin(connection, asked)
        inferences.finish(connection, asked.id, answers, status="done", prompt_tokens=1, completion_tokens=1)
        add_group(connection, group)

    server.store.write(make).result()
    add(server.store, group)
    return group


def sign_in(tab: Page, server: Running) -> None:
    tab.goto(f"{server.url}/label")
    tab.fill("#key", server.key("label"))
    tab.press("#key", "Enter")
    tab.wait_for_selector("#sheet")


def ranking(tab: Page) -> list[str]:
    """The letters of each tier."""
    return [
        text.replace(" ", "")
        for text in tab.locator(".tier").evaluate_all(
            "(all) => all.map((one) => [...one.querySelectorAll('.letter')].map((each) => each.textContent).join(''))"
        )
    ]


def said(server: Running, kind: str, state: str = "active") -> list[Any]:
    """The values, in slots for completions."""
    [given] = server.store.read(lambda connection: connection.execute(select(assignment)).all())
    letters = {id: "ABCDEFGHI"[slot] for slot, id in enumerate(given.slots)}
    rows = server.store.read(
        lambda connection: connection.execute(
            select(feedback).where(feedback.c.kind == kind, feedback.c.state == state).order_by(feedback.c.id)
        ).all()
    )
    if kind == "ranking":
        return ["".join(sorted(letters[id] for id in tier)) for row in rows for tier in row.value]
    return [f"{letters.get(row.target_id, '')}{row.value}" for row in rows]


def test_all_of_it_goes_by_keyboard(tab: Page, server: Running) -> None:
    pool(server, ["one", "two", "three"])
    sign_in(tab, server)
    press = tab.keyboard.press
    assert ranking(tab) == []
    press("j")
    press("Space")  # the middle
    press("Shift+ArrowUp")
    press("j")
    press("ArrowRight")
    press("Shift+ArrowUp")
    press("Shift+ArrowUp")
    seen(tab.locator("#spoken"), "B has rank 1 of 2")
    press("3")
    press("ArrowLeft")
    assert ranking(tab) == ["B", "A"]
    press("=")
    assert ranking(tab) == ["B", "AC"]
    seen(tab.locator("#spoken"), "C has rank 2 of 2, tied with A")
    press("k")
    press("Shift+ArrowDown")
    assert ranking(tab) == ["AC", "B"]
    press("Shift+ArrowDown")  # below the last it is not ranked
    press("Shift+ArrowUp")
    press("Shift+ArrowUp")
    assert ranking(tab) == ["B", "AC"]
    press("?")
    assert tab.is_visible("#help")
    press("Escape")
    press("Enter")
    seen(tab.locator("main h2"), "All done, thank you")
    assert said(server, "ranking") == ["B", "AC"]
    assert sorted(said(server, "rating")) == ["A4", "B5", "C3"]
    press("u")
    tab.wait_for_selector("#sheet")
    assert ranking(tab) == ["B", "AC"]
    press("3")
    press("Shift+ArrowDown")
    press("ArrowLeft")
    tab.locator(".flags summary").nth(2).click()
    tab.get_by_label("Makes things up").nth(2).check()
    press("Enter")
    seen(tab.locator("main h2"), "All done, thank you")
    assert said(server, "ranking") == ["B", "A", "C"]
    assert said(server, "ranking", "superseded") == ["B", "AC"]
    assert sorted(said(server, "rating")) == ["A4", "B5", "C2"]
    assert said(server, "flag") == ["Challucination"]


def test_it_is_ranked_by_dragging(tab: Page, server: Running) -> None:
    pool(server, ["one", "two", "three"])
    sign_in(tab, server)
    chip = [tab.locator(".chip", has_text=letter) for letter in "ABC"]
    chip[0].drag_to(tab.locator(".gap").first)
    chip[1].drag_to(tab.locator(".gap").first)
    assert ranking(tab) == ["B", "A"]
    chip[2].drag_to(tab.locator(".tier").nth(0))
    assert ranking(tab) == ["BC", "A"]
    chip[0].drag_to(tab.locator(".gap").first)
    assert ranking(tab) == ["A", "BC"]
    chip[2].drag_to(tab.locator("#tray"))
    assert ranking(tab) == ["A", "B"]
    tab.get_by_role("button", name="Move C up").click()
    tab.get_by_role("button", name="Move B down").click()
    assert ranking(tab) == ["A", "C", "B"]
    assert tab.evaluate("document.activeElement.title") == "Move B down"
    for slot in range(3):
        tab.locator(f"[name=rating-{slot}][value='7']").check()
    tab.click("#submit")
    seen(tab.locator("main h2"), "All done, thank you")
    assert said(server, "ranking") == ["A", "C", "B"]


def test_it_goes_without_a_script(browser: Browser, server: Running) -> None:
    pool(server, ["one", "two", "three"])
    context = opened(browser, java_script_enabled=False)
    tab = context.new_page()
    sign_in(tab, server)
    tab.fill("[name=rank-0]", "2")
    tab.fill("[name=rank-1]", "1")
    tab.check("[name=rating-0][value='3']")
    tab.get_by_text("What is wrong with it").nth(1).click()
    tab.get_by_label("Violent content").nth(1).check()
    tab.click("#submit")
    seen(tab.locator("#problems a"), count=3)
    assert (tab.input_value("[name=rank-0]"), tab.is_checked("[name=rating-0][value='3']")) == ("2", True)
    tab.fill("[name=rank-2]", "1")
    tab.check("[name=rating-1][value='6']")
    tab.check("[name=rating-2][value='5']")
    tab.fill("[name=comment]", "\nplain")
    tab.click("#submit")
    seen(tab.locator("main h2"), "All done, thank you")
    assert said(server, "ranking") == ["BC", "A"]
    assert said(server, "flag") == ["Bviolent"]
    assert said(server, "comment") == ["\nplain"]
    tab.click("#undo button")
    assert tab.input_value("[name=comment]") == "\nplain"
    tab.click(".skip summary")
    tab.fill("#reason", "changed my mind")
    tab.click(".skip button")
    seen(tab.locator("main h2"), "Nothing to label right now")
    context.close()


def test_a_draft_survives_a_reload(tab: Page, server: Running) -> None:
    pool(server, ["one", "two"])
    sign_in(tab, server)
    for key in ("1", "ArrowRight", "Shift+ArrowUp", "2", "="):
        tab.keyboard.press(key)
    tab.fill("[name=comment]", "  so far\n")
    seen(tab.locator("#saved"), "Draft saved")
    tab.reload()
    tab.wait_for_selector(".tier")
    assert ranking(tab) == ["AB"]
    assert tab.is_checked("[name=rating-0][value='5']")
    assert tab.input_value("[name=comment]") == "  so far\n"
    tab.keyboard.press("s")
    assert tab.evaluate("document.activeElement.id") == "reason"
    tab.keyboard.type("just 1 = k")
    tab.keyboard.press("Enter")
    seen(tab.locator("main h2"), "Nothing to label right now")


def test_a_server_that_is_away_is_told_in_words_and_nothing_is_lost(tab: Page, server: Running) -> None:
    pool(server, ["one", "two"])
    sign_in(tab, server)
    tab.context.set_offline(True)
    tab.fill("[name=comment]", "kept")
    seen(tab.locator("#notice"), "The server cannot be reached. What you entered stays on this page.")
    tab.context.set_offline(False)
    tab.fill("[name=comment]", "kept, and more")
    seen(tab.locator("#saved"), "Draft saved")
    assert not tab.is_visible("#notice")
    tab.context.clear_cookies()
    tab.fill("[name=comment]", "signed out")
    seen(tab.locator("#notice"), re.compile("^You are signed out"))


def test_nothing_that_is_said_runs_or_is_fetched(tab: Page, server: Running) -> None:
    texts = [*HOSTILE, "safe\u202e\u2066gpj.exe\u2069 {% include 'x' %} {{ cards }} \u200b"]
    pool(server, texts, prompt="".join(HOSTILE))
    sign_in(tab, server)
    shown = tab.locator(".card > .text").evaluate_all("(all) => all.map((one) => one.textContent)")
    marked = "safeU+202EU+2066gpj.exeU+2069 {% include 'x' %} {{ cards }} U+200B"
    assert sorted(shown) == sorted([*HOSTILE, marked])
    assert tab.locator(".prompt .text").text_content() == "".join(HOSTILE)
    assert tab.locator(".text *:not(.control), .start *").count() == 0
    assert tab.locator("img, iframe, form[action^='https'], base").count() == 0
    for number in range(1, 10):
        tab.keyboard.press(str(number))
        tab.keyboard.press("Space")
        tab.keyboard.press("Shift+ArrowUp")
    tab.fill("[name=comment]", HOSTILE[1])
    tab.click("#submit")
    seen(tab.locator("main h2"), "All done, thank you")
    tab.click("#undo button")
    tab.wait_for_selector("#sheet")
    assert tab.input_value("[name=comment]") == HOSTILE[1]


def test_it_fits_a_small_telephone(tab: Page, server: Running) -> None:
    long = "Donaudampfschifffahrtsgesellschaft" * 9
    pool(server, [long, f"{long} " * 3, "word " * 300], prompt=long)
    tab.set_viewport_size({"width": 360, "height": 640})
    sign_in(tab, server)
    tab.keyboard.press("1")
    tab.keyboard.press("Shift+ArrowUp")
    assert tab.evaluate("document.documentElement.scrollWidth") == 360
    tab.click("#submit")
    seen(tab.locator("#problems"), count=1)
    assert tab.evaluate("[document.documentElement.scrollWidth, document.activeElement.id]") == [360, "problems"]
