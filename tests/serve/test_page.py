"""The page as people use it: render, watch, cancel, come back, find, compare, delete, sign in."""

import json
import re

import pytest
from browsing import drop, render, sent_jobs, shown_seed, slow, until, window, write
from running import Server

import zimage
from zimage.pictures.files import save

pytestmark = pytest.mark.browser

SOURCE = "document.querySelector('#frame img').getAttribute('src')"
CAT = "a cat face on a blue background"


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("page") / "data").start()
    yield running
    assert running.stop() == 0


@pytest.fixture
def page(browser, drawing):
    """The page with no job under way."""
    for job in drawing.http.get("/api/jobs?state=queued,running").json()["jobs"]:
        drawing.http.delete(f"/api/jobs/{job['id']}")
        drawing.wait(job["id"])
    with window(browser, drawing.url + "/") as one:
        yield one


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A PNG with the settings of its render, a character beyond Latin-1 among them."""
    path = tmp_path_factory.mktemp("pictures") / "owl.png"
    pipe = zimage.ZImage.load()
    result = pipe.generate("an owl on a red background, 夜", seed=2**63 - 1, steps=3, shift=2.5)
    save(result.images[0], path, result.metadata[0], replace=True)
    return path


def texts(page, selector):
    return page.locator(selector).all_inner_texts()


def test_a_render_is_watched_and_shown(page):
    write(page, CAT)
    slow(page, 60)
    page.keyboard.press("Control+Enter")
    until(page, "() => /step \\d+ of 60/.test(document.querySelector('#progress-text').textContent)")
    first = float(page.locator("#progress-bar").evaluate("(bar) => bar.value"))
    page.wait_for_selector("#frame img[src^='data:image/jpeg']")
    until(page, "(first) => document.querySelector('#progress-bar').value > first", first)
    until(page, "() => /s left$/.test(document.querySelector('#progress-text').textContent)")
    page.wait_for_selector("#frame img[src^='/api/images/']")
    assert page.locator(".caption").inner_text() == CAT
    assert page.locator("#grid .tile").first.get_attribute("aria-current") == "true"
    assert page.locator("#frame img").evaluate("(img) => img.decode().then(() => img.naturalWidth)") == 128


def test_a_picture_that_is_there_before_the_answer_is_shown(page):
    def late(route):
        answer = route.fetch()
        page.wait_for_timeout(1500)
        route.fulfill(response=answer)

    page.route("**/api/jobs", late)
    write(page, "a lemon")
    page.fill("#field-steps", "1")
    page.keyboard.press("Control+Enter")
    until(page, "() => document.querySelector('.caption')?.innerText === 'a lemon'")


def test_escape_cancels_and_the_button_does(page):
    write(page, "a fox")
    slow(page)
    for cancel in (lambda: page.keyboard.press("Escape"), lambda: page.click("#cancel")):
        page.keyboard.press("Control+Enter")
        until(page, "() => /step \\d+ of/.test(document.querySelector('#progress-text').textContent)")
        cancel()
        until(page, "() => document.querySelector('#progress').hidden")
    states = page.evaluate("fetch('/api/jobs?state=cancelled').then((answer) => answer.json())")["jobs"]
    assert [job["request"]["prompt"] for job in states] == ["a fox", "a fox"]


def test_a_reload_finds_the_job_and_keeps_what_was_typed(page):
    write(page, "a bear")
    slow(page, 100)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#progress:not([hidden])")
    page.wait_for_timeout(400)  # the draft is kept a moment after the last change
    page.reload()
    page.wait_for_selector("html[data-ready]")
    until(page, "() => /step \\d+ of 100/.test(document.querySelector('#progress-text').textContent)")
    assert page.input_value("#field-prompt") == "a bear"
    assert page.input_value("#field-steps") == "100"
    until(page, "() => document.querySelector('#progress').hidden")
    assert page.locator(".caption").inner_text() == "a bear"


def test_the_queue_is_reordered_and_cancelled(page):
    slow(page)
    for prompt in ("a red apple", "a tree", "a rose"):
        write(page, prompt)
        page.keyboard.press("Control+Enter")
        until(page, "(prompt) => document.querySelector('#queue').innerText.includes(prompt)", prompt)
    page.click("[aria-label='Earlier: a rose']")
    until(page, "() => document.querySelectorAll('.queue-prompt')[1]?.innerText === 'a rose'")
    for prompt in ("a tree", "a rose", "a red apple"):
        page.click(f"[aria-label='Cancel: {prompt}']")
        until(page, "(prompt) => !document.querySelector('#queue').innerText.includes(prompt)", prompt)
    page.wait_for_selector("#queue", state="hidden")


def test_search_and_arrows_in_the_history(page):
    for prompt in ("a crab", "an owl"):
        write(page, prompt)
        render(page)
    page.fill("#search", "crab")
    until(page, "() => document.querySelectorAll('.tile').length === 1")
    assert "crab" in page.locator(".tile").get_attribute("aria-label")
    page.fill("#search", "no such picture")
    until(page, "() => document.querySelectorAll('.tile').length === 0")
    assert "no such picture" in page.locator("#history-none").inner_text()
    page.fill("#search", "")
    until(page, "() => document.querySelectorAll('.tile').length > 1")
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    assert page.locator(".caption").inner_text() == "a crab"
    page.keyboard.press("ArrowLeft")
    assert page.locator(".caption").inner_text() == "an owl"


def test_the_settings_of_a_picture_render_the_same_one(page):
    write(page, "a penguin")
    page.fill("#field-steps", "5")
    render(page)
    source = page.locator("#frame img").get_attribute("src")
    seed = shown_seed(page)
    page.click("#reset")
    write(page, "something else")
    page.click("text=Use settings")
    until(page, "(seed) => document.querySelector('#field-seed').value === seed", seed)
    assert (page.input_value("#field-prompt"), page.input_value("#field-steps")) == ("a penguin", "5")
    page.keyboard.press("Control+Enter")
    until(page, f"(old) => /^.api.images/.test({SOURCE}) && {SOURCE} !== old", source)
    assert json.loads(sent_jobs(page)[-1]["request"])["seed"] == int(seed)
    assert same_pixels(page, source, page.locator("#frame img").get_attribute("src"))


def same_pixels(page, *sources):
    return page.evaluate(
        """async (sources) => {
          const pixels = async (src) => {
            const bitmap = await createImageBitmap(await (await fetch(src)).blob());
            const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
            context.drawImage(bitmap, 0, 0);
            return context.getImageData(0, 0, bitmap.width, bitmap.height).data.join();
          };
          const [first, second] = await Promise.all(sources.map(pixels));
          return first === second;
        }""",
        list(sources),
    )


def test_a_dropped_png_gives_its_settings_to_the_last_digit(page, picture):
    drop(page, picture, "settings")
    until(page, "() => document.querySelector('#field-seed').value !== ''")
    assert page.input_value("#field-prompt") == "an owl on a red background, 夜"
    assert page.input_value("#field-seed") == str(2**63 - 1)
    assert (page.input_value("#field-steps"), page.input_value("#field-shift")) == ("3", "2.5")
    assert page.input_value("#field-width") == ""  # it is what the model draws anyway
    render(page)
    assert f'"seed":{2**63 - 1}' in sent_jobs(page)[0]["request"]


def test_a_picture_without_settings_is_refused_in_a_line(page, tmp_path):
    path = tmp_path / "plain.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    drop(page, path, "settings")
    page.wait_for_selector(".toast.bad")
    assert "plain.png" in page.locator(".toast").inner_text()


def test_deleting_is_undone(page):
    write(page, "a snail")
    render(page)
    page.locator("h1").click()
    page.keyboard.press("Delete")
    until(page, "() => document.querySelector('.caption')?.innerText !== 'a snail'")
    page.click(".toast >> text=Undo")
    page.wait_for_selector(".tile[aria-label^='a snail']")


def test_full_view_and_compare(page):
    for prompt in ("a crown", "a bell"):
        write(page, prompt)
        render(page)
    page.click("#frame .picture")
    page.wait_for_selector("#viewer[open]")
    assert "a bell" in page.locator("#viewer-caption").inner_text()
    page.keyboard.press("ArrowRight")
    assert "a crown" in page.locator("#viewer-caption").inner_text()
    page.click("#viewer-scale")
    assert page.locator("#viewer img").evaluate("(img) => img.getBoundingClientRect().width") == 128
    page.keyboard.press("Escape")
    page.click("[aria-label='Compare with another picture']")
    page.click(".tile[aria-label^='a bell'] >> nth=0")
    page.wait_for_selector("#compare[open]")
    page.keyboard.press("Home")
    assert (
        page.locator("#compare .over").evaluate("(img) => getComputedStyle(img).clipPath") == "inset(0px 100% 0px 0px)"
    )
    assert "a crown" in page.locator("#compare-left").inner_text()
    assert "a bell" in page.locator("#compare-right").inner_text()


def test_keyboard_alone(page):
    """Every step by keys, from the first Tab to the overview of keys."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "field-prompt":
            break
    page.keyboard.type("a frog")
    render(page)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('tile')"):
            break
    before = page.evaluate("document.activeElement.dataset.id")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.id") not in (before, None)
    page.keyboard.press("f")
    page.wait_for_selector("#viewer[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.wait_for_selector("#keys[open]")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def test_a_token_is_asked_for_once(browser, new_server):
    server = new_server(environment={"ZIMAGE_TOKEN": "a-token-that-nobody-guesses"}).start()
    with window(browser, server.url + "/", ready=False, allowed=("401",)) as page:
        page.wait_for_selector("#sign-in[open]")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        until(page, "() => document.querySelector('#token-fault').textContent !== ''")
        page.fill("#token", "a-token-that-nobody-guesses")
        page.keyboard.press("Enter")
        page.wait_for_selector("html[data-ready]")
        write(page, CAT)
        render(page)
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert not page.locator("#sign-in").is_visible()
        assert re.search("cat face", page.locator(".caption").inner_text())


@pytest.mark.full
def test_a_server_that_comes_back_is_found_again(browser, new_server):
    server = new_server().start()
    with window(browser, server.url + "/", allowed=("ERR_", "Failed to load")) as page:
        write(page, CAT)
        slow(page, 60)
        page.keyboard.press("Control+Enter")
        page.wait_for_selector("#progress:not([hidden])")
        server.kill()
        page.wait_for_selector("#connection:has-text('Connecting')")
        page.fill("#field-steps", "2")
        page.click("#render")
        until(page, "() => document.querySelector('#form-fault').textContent.includes('cannot be reached')")
        server.start()
        until(page, "() => document.querySelector('#connection').textContent === ''")
        until(page, "() => document.querySelector('#progress').hidden")  # the job of before was drawn after all
        assert page.locator(".caption").inner_text() == CAT


def test_a_server_without_a_worker_is_told_in_a_line(browser, drawing):
    refused = {"error": {"message": "the model is not open yet", "fields": []}}
    routes = {"**/api/schema": lambda route: route.fulfill(status=503, json=refused)}
    with window(browser, drawing.url + "/", ready=False, routes=routes, allowed=("503", "not open")) as page:
        page.wait_for_selector(".toast.bad")
        assert "the model is not open yet" in page.locator(".toast").inner_text()
