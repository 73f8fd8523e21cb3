"""The page in a headless Chromium: what a visitor sees and does."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium of the system's packages"),
]
WIDTHS = {"desktop": 1280, "phone": 390}
PATIENCE_MS = 180_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser, service: Callable[..., str]) -> Iterator[Callable[..., Page]]:
    """Return what opens the page; at the end no script has failed and nothing came from outside."""
    problems: list[str] = []
    address: list[str] = []
    pages: list[Page] = []

    def open_page(*, width: int = 1280, colours: str = "light", num_frames: int = 177) -> Page:
        if not address:
            address.append(service(f"num_frames={num_frames}"))
        page = browser.new_page(
            viewport={"width": width, "height": 800},
            color_scheme=colours,  # pyright: ignore[reportArgumentType]
        )
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith((address[0], "data:", "blob:"))
                else problems.append(f"asked for {r.url}")
            ),
        )
        page.goto(address[0])
        page.wait_for_selector("#generate")
        pages.append(page)
        return page

    yield open_page
    seen = [*problems]  # to close a page may break a stream off, which it reports
    for page in pages:
        page.close()
    assert seen == []


def seconds(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


def test_the_first_chunk_plays_while_later_ones_are_made(visit: Callable[..., Page]):
    page = visit(num_frames=737)  # long enough for a slow machine's browser
    page.fill("#prompt textarea", "a green square moving left on a black background")
    page.click("#generate")
    playing = page.wait_for_function(
        "document.querySelector('#live video')?.currentTime > 0.05"
        " && document.querySelector('#state').innerText"
    )
    assert "in progress" in playing.json_value()
    assert page.locator("#map rect").count() > 0
    page.wait_for_function("document.querySelector('#state').innerText.includes('completed')")
    state = page.inner_text("#state")
    first, whole = seconds(r"first chunk after ([\d.]+)", state), seconds(r"in ([\d.]+) s", state)
    assert first < whole / 2
    assert page.locator("#state a").count() == 3  # mp4, JSON, record
    assert "a green square" in page.inner_text("#recent")
    page.reload()
    page.wait_for_function("document.querySelector('#state')?.innerText.includes('completed')")
    page.click("#compare")
    page.wait_for_selector("#reference video")
    page.wait_for_function("document.querySelector('#live').innerText.includes('vanilla')")


def test_a_video_can_be_cancelled(visit: Callable[..., Page]):
    page = visit()
    page.click("#generate")
    page.wait_for_selector("#map rect")
    page.click("#cancel")
    page.wait_for_function("document.querySelector('#state').innerText.includes('cancelled')")


def test_a_wrong_number_is_said_and_markup_is_shown_as_text(visit: Callable[..., Page]):
    page = visit()
    page.fill("#prompt textarea", "<img src=x onerror=alert(1)>")
    page.locator("input[type=number]").first.fill("98")
    page.click("#generate")
    page.wait_for_selector("text=num_frames must be 4 n + 1")
    page.locator("input[type=number]").first.fill("17")
    page.click("#generate")
    page.wait_for_function("document.querySelector('#recent').innerText.includes('<img src=x')")
    assert page.locator("#recent img").count() == 0


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_nothing_is_wider_than_the_screen_and_the_map_is_readable(
    visit: Callable[..., Page], width: int, colours: str
):
    page = visit(width=width, colours=colours)
    page.locator("input[type=number]").first.fill("17")
    page.click("#generate")
    page.wait_for_selector("#live video")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    labels = page.locator("#map-of-decisions > div")
    drawn = page.locator("#map-of-decisions svg").bounding_box()
    assert drawn is not None
    assert float(labels.evaluate("e => parseFloat(getComputedStyle(e).fontSize)")) >= 12
    assert labels.evaluate("e => e.getBoundingClientRect().height") == drawn["height"]
    assert drawn["width"] > width / 3


def test_the_screenshots_of_the_documentation(visit: Callable[..., Page], tmp_path: Path):
    """Take them into the folder that SCREENSHOTS names."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    options: Any = {"type": "jpeg", "quality": 80, "full_page": True}

    def wait_for(page: Page, words: str) -> None:
        page.wait_for_function(f"document.querySelector('#state').innerText.includes('{words}')")

    page = visit(width=1120)
    page.click("#generate")
    wait_for(page, "completed")
    page.click("#compare")
    page.wait_for_selector("#reference video")
    wait_for(page, "in progress")
    wait_for(page, "completed")
    page.wait_for_function("document.querySelector('#live video')?.currentTime > 0.5")
    page.screenshot(path=folder / "page_desktop.jpg", **options)
    for name, width, colours in (("phone", 390, "light"), ("dark", 1120, "dark")):
        page = visit(width=width, colours=colours)
        wait_for(page, "completed")  # the last one, which the page shows first
        page.click("#generate")
        wait_for(page, "in progress")
        page.wait_for_selector("#live video")
        if name == "phone":
            wait_for(page, "completed")
        page.wait_for_function("document.querySelector('#live video')?.currentTime > 0.2")
        page.screenshot(path=folder / f"page_{name}.jpg", **options)
    sizes = [path.stat().st_size for path in folder.glob("page_*.jpg")]
    assert len(sizes) == 3
    assert sum(sizes) < 300_000
