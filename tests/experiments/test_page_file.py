"""A page as one file: it holds its pictures, asks nobody, and shows hostile texts as texts."""

import dataclasses
import re

import pytest
from browsing import chromium, until, window
from click.testing import CliRunner
from sweeps import folder_of, records

from zimage.cli import cli
from zimage.experiments.pages import IMPORT, MAIN, OWN, bundled, files
from zimage.experiments.record import write_records

pytestmark = pytest.mark.browser

HOSTILE = "</script><script>document.title='gone'</script><img src=x onerror=\"document.title='gone'\">\u2028'"


@pytest.fixture(scope="module")
def browser():
    with chromium() as one:
        yield one


@pytest.fixture
def folder(tmp_path):
    made = records(prompts=("a fox", HOSTILE))
    made = [dataclasses.replace(r, scores={"psnr": 20.0 + r.axes["steps"]}) for r in made]
    made[3] = dataclasses.replace(made[3], path=None, error=HOSTILE, scores={})
    folder = folder_of(tmp_path / "sweep", made)
    write_records(folder, made)
    return folder


def written(folder, *options):
    path = folder.parent / "sheet.html"
    done = CliRunner().invoke(cli, ["compare", str(folder), "-o", str(path), *options], catch_exceptions=False)
    assert done.stdout.strip() == str(path)
    return path


def test_a_page_in_a_file_needs_nobody(browser, folder):
    path = written(folder)
    with window(browser, path.as_uri()) as page:  # which sees what is asked of others, and what the console says
        assert page.title() == "sweep"
        assert page.locator(".place").count() == 12
        assert page.locator(".served:visible").count() == 0
        assert page.locator("h2:visible").all_inner_texts() == [
            "prompt a fox",
            f"prompt {HOSTILE}".replace("\u2028", " "),
        ]
        page.locator("[data-id=c000]").click()
        until(page, "() => document.querySelector('#cell-picture img').naturalWidth === 48")
        assert '"steps": 4' in page.locator("#cell-request").inner_text()
        page.click("#cell-compare")
        page.locator("[data-id=c001]").click()
        page.wait_for_selector("#compare[open]")
        page.keyboard.press("Escape")
        page.click("#open-standings")
        rows = page.locator("#standings tbody tr")
        assert rows.first.locator("th").inner_text().startswith("steps 16")
        assert page.title() == "sweep"


def test_a_page_of_differences_says_what_they_are_from(browser, folder):
    path = written(folder, "--diff", "heatmap", "--base", "steps=16", "--only", "prompt=a fox", "--score", "psnr")
    with window(browser, path.as_uri()) as page:
        assert page.locator("#note").inner_text() == "heatmap difference from steps 16, × 4"
        facts = page.locator(".facts").all_inner_texts()
        assert "base · psnr 36" in facts
        assert any(re.fullmatch(r"mean \d+\.\d\d · max \d+ · psnr 24", text) for text in facts)


def test_every_import_is_one_that_is_bundled():
    texts = {name: path.read_text() for name, path in files().items()}
    for name, text in texts.items():
        if name.endswith(".js"):
            assert len(IMPORT.findall(text)) == len(re.findall(r"^import|\bimport\(", text, re.MULTILINE)), name
            assert not re.search(r"^export (?!async function|function|class|const)", text, re.MULTILINE), name
    script = bundled(texts)
    assert all(f"module_{path.stem} " in script for path in OWN.glob("*.js"))
    assert script.index("module_dom ") < script.index(f"module_{MAIN.removesuffix('.js')} ")
    assert "</" not in script.replace("</g", "")  # which would end the element that it stands in
