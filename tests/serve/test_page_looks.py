"""What the page weighs, how soon it is there, whether it fits, and what axe-core finds in it."""

import os
import re
from pathlib import Path

import pytest
from axe_core import THEMES, axe_source, findings, findings_by_theme
from browsing import PHONE, WIDE, able, drop, until, window, write
from histories import fill, history
from PIL import Image
from running import Server

pytestmark = pytest.mark.browser

PAGE = Path(__file__).parents[2] / "zimage/serve/page"
MOST_BYTES = 200_000
MANY = 1000  # pictures
FIRST_PAINT = 1.0  # seconds, with as many pictures in the history


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server with a long history, whose newest picture has a very long prompt."""
    folder = tmp_path_factory.mktemp("looks") / "data"
    long = "a very long prompt that goes on and on, " * 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda number: None)  # which takes nearly all the time of filling it
        kept = history(folder)
        fill(kept, MANY, lambda i: long if i == MANY - 1 else f"picture number {i}")
        kept.database.close()
    running = Server(folder).start()
    yield running.url + "/"
    assert running.stop() == 0


@pytest.fixture(scope="module")
def axe(request):
    return axe_source(request.config.cache)


def test_all_of_it_is_small():
    files = [path for path in PAGE.iterdir() if path.suffix in (".html", ".css", ".js", ".svg")]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_nothing_stands_inline_and_nothing_comes_from_elsewhere():
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=", html)
    for path in PAGE.glob("*.*"):
        if path.suffix != ".md":
            rest = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|eval\(", rest), path.name


def test_every_file_is_used_and_every_id_is_there():
    html = (PAGE / "index.html").read_text()
    code = "".join(path.read_text() for path in PAGE.glob("*.js"))
    for path in PAGE.glob("*.js"):
        assert re.search(rf"[./]{re.escape(path.name)}\"", html + code), path.name
    made = re.findall(r"id: ?\"([\w-]+)\"", code)
    ids = set(re.findall(r'\bid="([\w-]+)"', html)) | set(made)
    assert set(re.findall(r'\$\("([\w-]+)"\)', code)) <= ids


def test_a_long_history_paints_at_once(browser, url):
    with window(browser, url) as page:
        paints = []
        for _ in range(3):
            page.reload()
            page.wait_for_selector("html[data-ready]")
            until(page, "() => performance.getEntriesByName('first-contentful-paint').length > 0")
            until(page, "() => document.querySelectorAll('.tile').length > 0")
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000)
        assert min(paints) <= FIRST_PAINT, paints
        assert page.locator(".tile").count() < MANY / 4  # the rest comes when it is scrolled to
        assert (
            page.evaluate(
                "performance.getEntriesByType('resource').filter(({ name }) => name.includes('thumbnail')).length"
            )
            < 100
        )


def test_scrolling_brings_older_pictures_each_once(browser, url):
    with window(browser, url) as page:
        seen = 0
        while seen < 200:
            page.locator("#grid-end").scroll_into_view_if_needed()
            until(page, "(seen) => document.querySelectorAll('.tile').length > seen", seen)
            seen = page.locator(".tile").count()
        labels = page.locator(".tile").evaluate_all("(tiles) => tiles.map((tile) => tile.getAttribute('aria-label'))")
        assert labels[1:] == [f"picture number {MANY - 1 - i}, seed {MANY - 1 - i}" for i in range(1, seen)]


@pytest.mark.parametrize("theme", THEMES)
def test_the_system_decides_light_or_dark(browser, url, theme):
    with window(browser, url, color_scheme=theme) as page:
        colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        shades = [int(part) for part in re.findall(r"\d+", colour)[:3]]
        assert (sum(shades) > 384) == (theme == "light")


def overflow(page):
    """px by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_a_phone_needs_no_sideways_scrolling(browser, url, tmp_path):
    with window(browser, url, PHONE, has_touch=True, routes={"**/api/schema": able}) as page:
        assert overflow(page) == 0
        for section in page.locator("#groups summary").all():
            section.click()
        page.fill("#field-guidance", "4")
        write(page, "averyveryverylongwordwithoutanyspaces" * 20)
        picture = tmp_path / "a-name-of-a-file-that-is-much-too-long-for-a-phone.png"
        Image.new("RGB", (900, 60)).save(picture)
        for name in ("image", "reference", "control"):
            page.set_input_files(f"#field-{name}", picture)
        assert overflow(page) == 0
        for opener, dialog in dialogs(page):
            opener()
            page.wait_for_selector(f"{dialog}[open]")
            box = page.locator(dialog).bounding_box()
            assert 0 <= box["x"] <= PHONE["width"] - box["width"], dialog
            page.keyboard.press("Escape")
        assert page.locator("#render").bounding_box()["y"] < PHONE["height"]


def dialogs(page):
    """How each dialogue is opened, and its selector."""
    openers = {"#templates": "#field-template", "#rewriter": "#open-rewriter", "#painter": "#open-painter"}
    more = {"#keys": "#open-keys", "#viewer": "#frame .picture", "#confirm": "#clear-history"}
    opened = [(lambda opener=opener: page.click(opener), dialog) for dialog, opener in {**openers, **more}.items()]
    return [*opened, (lambda: compare(page), "#compare")]


def compare(page):
    page.click("[aria-label='Compare with another picture']")
    page.locator(".tile").nth(1).click()


NONE = {theme: [] for theme in THEMES}


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_axe_finds_nothing_serious(browser, url, axe, tmp_path, size):
    picture = tmp_path / "start.png"
    Image.new("RGB", (64, 64)).save(picture)
    with window(browser, url, size, routes={"**/api/schema": able}) as page:
        for name in ("reference", "control"):
            page.set_input_files(f"#field-{name}", picture)
        page.fill("#search", "picture number 99")  # fewer of them, which are all the same to axe
        until(page, "() => document.querySelectorAll('.tile').length < 20")
        for section in page.locator("#groups summary").all():
            section.click()
        page.fill("#field-guidance", "4")
        page.set_input_files("#field-image", picture)
        page.locator("#form-fault").evaluate("(node) => (node.textContent = 'width 100 is not a multiple of 16')")
        drop(page, tmp_path / "start.png", "settings")  # which has none: a message appears
        page.wait_for_selector(".toast.bad")
        assert findings_by_theme(page, axe) == NONE
        page.fill("#search", "")
        page.wait_for_selector("#clear-history:not([hidden])")
        for opener, dialog in dialogs(page):
            opener()
            page.wait_for_selector(f"{dialog}[open]")
            assert (dialog, findings_by_theme(page, axe, dialog)) == (dialog, NONE)
            page.keyboard.press("Escape")


def test_axe_sees_what_is_wrong(browser, url, axe):
    with window(browser, url) as page:
        page.evaluate("document.querySelector('#open-keys').removeAttribute('aria-label')")
        page.evaluate("document.querySelector('#model').style.color = '#ccc'")
        assert {rule for rule, *_ in findings(page, axe, ".head")} == {"button-name", "color-contrast"}
