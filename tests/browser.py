"""A headless Chromium, driven by Playwright, and axe-core in its pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = ("--no-sandbox", "--disable-gpu")


def find_chromium() -> str | None:
    """The browser's program; CHROMIUM names another one."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Tab:
    """A page, what it or the browser wrote to the console, and the addresses that it asked for."""

    page: Page
    reported: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Begin to write down."""
        self.page.on("console", lambda message: self.reported.append(message.text))
        self.page.on("pageerror", lambda error: self.reported.append(str(error)))
        # Playwright's own event leaves out data: addresses and the icon.
        session = self.page.context.new_cdp_session(self.page)
        session.on(
            "Network.requestWillBeSent",
            lambda event: self.requested.append(event["request"]["url"]),
        )
        session.send("Network.enable")


# For a module and no longer: while it runs, Playwright's sync API keeps an event loop running in
# this thread, and nobody else's `asyncio.run` would work.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """The installed browser."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install it)")
    program = find_chromium()
    if program is None:
        pytest.skip("needs a Chromium (apt-get install chromium), or CHROMIUM=its path")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Tab]]:
    """`visit(url, width=1280, dark=False, **options of a context)`: a new visitor's Tab, loaded."""
    contexts = []

    def opened(url: str, *, width: int = 1280, dark: bool = False, **options: Any) -> Tab:
        size, theme = {"width": width, "height": 900}, "dark" if dark else "light"
        contexts.append(chromium.new_context(viewport=size, color_scheme=theme, **options))
        tab = Tab(contexts[-1].new_page())
        tab.watch()
        tab.page.goto(url)
        return tab

    yield opened
    for context in contexts:
        context.close()


def axe_faults(page: Page) -> list[str]:
    """What axe-core finds wrong with a page, be it serious or not."""
    axe = pytest.importorskip(
        "axe_core_python.sync_playwright", reason="needs axe-core (pip install axe-core-python)"
    )
    # Of what passes, one node a rule: thousands would take seconds on their way here.
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]})
    assert len(found["passes"]) > 5  # it did look
    return [
        f"{fault['impact']}: {fault['id']}: {[node['target'] for node in fault['nodes']]}"
        for fault in found["violations"]
    ]
