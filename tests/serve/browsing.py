"""A real browser for tests, and what must hold of every page in it."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.environments import missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WATCH = """
window.broken = []; window.hacked = 0; window.alert = () => window.hacked++;
document.addEventListener("securitypolicyviolation", (event) => window.broken.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if importlib.util.find_spec("playwright") is None:
        missing("playwright is not installed")
    api = importlib.import_module("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("there is no chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


def opened(browser: Browser, **options: Any) -> BrowserContext:
    """A browser's context of its own, that notes which rules of the page are broken."""
    context: BrowserContext = browser.new_context(**options)
    context.set_default_timeout(20_000)
    context.add_init_script(WATCH)
    return context


@contextmanager
def watched(context: BrowserContext, url: str) -> Iterator[Page]:
    """An empty tab. Whatever a test does there: no rule is broken, no script fails, nothing is asked of anyone but ``url``."""
    tab = context.new_page()
    asked: list[str] = []
    failed: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: failed.append(str(error)))
    yield tab
    assert tab.evaluate("[window.broken, window.hacked]") == [[], 0]
    assert failed == []
    assert [each for each in asked if not each.startswith((f"{url}/", "data:image/svg+xml"))] == []
    context.close()
