"""The page in a real browser: Debian's Chromium, driven by Playwright, against a real server."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 30_000  # ms; the machines that run tests may be busy with others

# Keeps what the page sends, files as base64: {url, headers, request, files}.
RECORDER = """
window.sent = [];
const real = window.fetch;
const base64 = async (file) => btoa(String.fromCharCode(...new Uint8Array(await file.arrayBuffer())));
window.fetch = async (url, init = {}) => {
  const { body } = init;
  const record = { url, method: init.method ?? "GET", headers: init.headers, request: null, files: {} };
  if (body instanceof FormData) {
    for (const [name, file] of body) {
      if (name === "request") record.request = await file.text();
      else record.files[name] = await base64(file);
    }
  } else record.request = body;
  window.sent.push(record);
  return real(url, init);
};
"""


@contextmanager
def chromium() -> Iterator["sync_api.Browser"]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def window(browser, url, viewport=WIDE, ready=True, allowed=(), routes=None, **options) -> Iterator["sync_api.Page"]:
    """The page of a server; at the end, nothing may have been said on the console or asked of another server.

    `allowed` are words of console messages that the test provokes, `routes` answers that it gives itself.
    """
    context = browser.new_context(viewport=viewport, **options)
    context.add_init_script(RECORDER)
    for pattern, answer in (routes or {}).items():
        context.route(pattern, answer)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    if ready:
        page.wait_for_selector("html[data-ready]")
    yield page
    context.close()
    assert [text for text in said if not any(word in text for word in allowed)] == []
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []


def able(route):
    """A server that can look at pictures, and has a control file."""
    schema = route.fetch().json()
    schema["vision"], schema["control"] = {"available": True, "name": "vl", "mode": "full"}, {"names": ["union", "x"]}
    schema["request"]["properties"]["control"]["items"]["properties"]["model"]["enum"] = ["union", "x"]
    route.fulfill(json=schema)


def until(page, holds: str, arg: object = None) -> None:
    """Wait for what JavaScript says, which must be a function; Playwright's own way is stopped by the page's policy."""
    for _ in range(PATIENCE // 25):
        if page.evaluate(holds, arg):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never true: {holds}")


SENT_JOBS = "window.sent.filter(({ url, method }) => url === '/api/jobs' && method === 'POST')"


def sent_jobs(page) -> list[dict]:
    """What was asked of POST /api/jobs: {request: text of the JSON, files: {name: base64}, headers}."""
    return page.evaluate(SENT_JOBS)


def write(page, prompt: str) -> None:
    page.fill("#field-prompt", prompt)


def render(page) -> None:
    """Render and wait for the picture."""
    before = page.locator(".facts").all_inner_texts()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#progress:not([hidden])")
    until(page, "() => document.querySelector('#progress').hidden")
    until(page, "(before) => document.querySelector('.facts')?.innerText !== before[0]", before)


def shown_seed(page) -> str:
    """The seed in the line under the picture."""
    return page.locator(".facts").inner_text().split("seed ")[1].split(" ")[0]


def slow(page, steps: int = 200) -> None:
    """So many steps that the demo model can be watched as it draws."""
    page.fill("#field-steps", str(steps))


def drop(page, path, target: str) -> None:
    """Drop a file from outside on a place of the page."""
    data = page.evaluate_handle(
        """([bytes, name]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
          return transfer;
        }""",
        [list(path.read_bytes()), path.name],
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": data})
    page.wait_for_selector("#drop:not([hidden])")
    page.dispatch_event(f".drop-target[data-target={target}]", "drop", {"dataTransfer": data})
