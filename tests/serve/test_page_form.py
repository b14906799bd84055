"""The settings form: every declared field has a control, what it sends, and what the server's answer does to it."""

import base64
import io
import json
from pathlib import Path

import pytest
from browsing import PHONE, SENT_JOBS, able, drop, sent_jobs, until, window, write
from PIL import Image
from running import Server

from zimage.serve.schema import drawing_schema, rewriting_schema
from zimage.settings.declared import Request
from zimage.settings.serving import ServeSettings

pytestmark = pytest.mark.browser

FIELDS = drawing_schema(ServeSettings())["properties"]
REWRITING = rewriting_schema(ServeSettings())["properties"]
# What a control is set to where a number or a text of its kind would not do, and what is sent then.
VALUES = {
    "template": ("photo-overcast", "photo-overcast"),
    "layer_weights": ("-2:0.7,-8:0.3", "-2:0.7,-8:0.3"),
    "seed": ("7, 8", [7, 8]),
    "tile_size": ("512", 512),
    "extend": ("8", "8,0,0,0"),
    "sigmas": ("1,0.5,0", "1,0.5,0"),
}
GUIDED = {"guidance": "3"}
NEEDED = {  # without which a control has no effect
    "strength": {"hires": "2"},
    **dict.fromkeys(("negative", "guidance_method", "cfg_truncation", "cfg_normalization"), GUIDED),
}
IMAGE, MASK = ("image",), ("image", "mask")
FILES = {  # the same: files, or pictures of a list
    **dict.fromkeys(("mask", "extend"), IMAGE),
    **dict.fromkeys(("mask_invert", "mask_blur", "mask_crop", "paste"), MASK),
    **{name: ("reference",) for name in FIELDS if name.startswith("vision_")},
    **{name: ("control",) for name in FIELDS if name.startswith("control_")},
}
CONDITIONS = {"reference": [{"alpha": 0.3}], "control": [{"model": "union", "scale": 0.75}]}  # as they come


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("form")
    running = Server(folder / "data").start()
    yield running.url + "/"
    assert running.stop() == 0


@pytest.fixture
def page(browser, url):
    with window(browser, url, allowed=("422",), routes={"**/api/schema": able}) as one:
        yield one


def refuse(page, *fields, message="this is refused"):
    """Answer each request for a picture with 422, so that a test of many controls renders nothing."""
    body = json.dumps({"error": {"message": message, "fields": fields}})
    page.route("**/api/jobs", lambda route: route.fulfill(status=422, content_type="application/json", body=body))


def submitted(page) -> dict:
    """Press Render; the values that were sent."""
    before = len(sent_jobs(page))
    page.click("#render")
    until(page, f"(n) => {SENT_JOBS}.length > n", before)
    until(page, "() => !document.querySelector('#render').hasAttribute('aria-busy')")
    return json.loads(sent_jobs(page)[-1]["request"])


def put(page, name, property):
    """Set a control as its kind allows; what should be sent."""
    control = found(page, name)
    kind = control.evaluate("(node) => node.type")
    if name == "template":
        return pick_template(page)
    if kind == "checkbox":
        control.set_checked(not property["default"])
        return not property["default"]
    if kind == "select-one":
        option = control.locator("option").last.get_attribute("value")
        control.select_option(option)
        return {"true": True, "false": False}.get(option, option)
    text, value = VALUES.get(name) or numbered(property) or ("words of a text", "words of a text")
    control.fill(text)
    return value


def found(page, name):
    """A control, with its section open."""
    control = page.locator(f"#field-{name}")
    control.evaluate("(node) => node.closest('details')?.setAttribute('open', '')")
    return control


def numbered(property):
    """A number within the bounds of a field, that is not its default."""
    form = (property.get("anyOf") or [property])[0]
    if not {"integer", "number"} & set([form["type"]] if isinstance(form["type"], str) else form["type"]):
        return None
    low = form.get("minimum", form.get("exclusiveMinimum", 0))
    value = low + form.get("multipleOf", 1) if form.get("maximum", 2) - low >= 1 else (low + form["maximum"]) / 2
    value = 0.5 if value == property["default"] else value
    return str(value), value


def pick_template(page):
    page.click("#field-template")
    page.fill("#template-search", "photo-overcast")
    page.locator("#template-list .choice").click()
    page.click("#template-use")
    return "photo-overcast"


def upload(page, name, tmp_path):
    path = tmp_path / ("captions.safetensors" if name == "embeddings" else f"{name}.png")
    Image.new("RGB", (32, 32), "#224466").save(path, "png")
    page.set_input_files(f"#field-{name}", path)
    return base64.b64encode(path.read_bytes()).decode()


def test_every_declared_field_has_a_control_with_an_effect(page, tmp_path):
    assert set(FIELDS) == set(Request.names())
    for name, property in FIELDS.items():
        page.unroute_all()
        refuse(page, name, message=f"{name} is refused")
        page.click("#reset")
        page.fill("#field-prompt", "")
        for other, value in NEEDED.get(name, {}).items():
            found(page, other).fill(value)
        for other in FILES.get(name, ()):
            upload(page, other, tmp_path)
        is_file = property.get("x-attachment") or property.get("x-condition")
        wanted = upload(page, name, tmp_path) if is_file else put(page, name, property)
        got = submitted(page)
        if is_file:
            assert sent_jobs(page)[-1]["files"][name] == wanted, name
        if name in CONDITIONS:
            assert got.pop(name) == CONDITIONS[name]
        elif not is_file:
            assert got.pop(name) == wanted, name
        assert set(got) == {*NEEDED.get(name, {}), *(set(FILES.get(name, ())) & CONDITIONS.keys())}, name
        fault = page.locator(f"#fault-{name}")
        assert fault.inner_text() == f"{name} is refused", name
        assert page.locator(f"#field-{name}").get_attribute("aria-invalid") == "true", name


def test_several_pictures_each_have_values_of_their_own(page, tmp_path):
    refuse(page)
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "c")]
    for path in paths:
        Image.new("RGB", (32, 32), "#224466").save(path)
    page.set_input_files("#field-control", paths[:2])
    page.set_input_files("#field-control", paths[2:])
    page.select_option("[aria-label='File of b.png']", "x")
    page.fill("[aria-label='Scale of b.png']", "1.5")
    page.locator("[aria-label='Scale of c.png, slider']").fill("0.5")
    page.click("[aria-label='Remove a.png']")
    assert page.evaluate("document.activeElement.id") == "field-control"
    assert submitted(page) == {"control": [{"model": "x", "scale": 1.5}, {"model": "union", "scale": 0.5}]}
    assert sent_jobs(page)[-1]["files"]["control"] == base64.b64encode(paths[2].read_bytes()).decode()
    page.locator("[aria-label='Scale of c.png']").focus()
    page.keyboard.type("e")
    page.click("#render")
    assert "Scale of c.png cannot be read" in page.locator("#form-fault").inner_text()
    page.click("#reset")
    assert page.locator(".picture-row").count() == 0
    assert submitted(page) == {}


def test_without_what_looks_or_follows_there_is_nothing_to_choose(browser, url):
    with window(browser, url) as page:
        for place in ("#references", "#controls", "[data-field=reference]", "[data-field=control]"):
            assert not page.locator(place).is_visible(), place


def test_what_is_seen_is_saved(browser, url, tmp_path):
    def seen(route):
        route.fulfill(status=200, content_type="application/octet-stream", body=b"seen")

    path = tmp_path / "cat.png"
    Image.new("RGB", (32, 32), "#224466").save(path)
    with window(browser, url, routes={"**/api/schema": able, "**/api/vl/extract": seen}) as page:
        page.set_input_files("#field-reference", path)
        with page.expect_download() as download:
            page.click("#save-sight")
        assert download.value.suggested_filename == "cat.safetensors"
        assert Path(download.value.path()).read_bytes() == b"seen"
        (sent,) = page.evaluate("window.sent.filter(({ url }) => url === '/api/vl/extract')")
        assert sent["files"] == {"picture": base64.b64encode(path.read_bytes()).decode()}
        page.set_input_files("#field-reference", path)
        assert not page.locator("#save-sight").is_visible(), "of one picture at a time"


def test_what_cannot_be_seen_is_said(page, tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGB", (32, 32)).save(path)
    body = json.dumps({"error": {"message": "picture: it is too dark", "fields": ["picture"]}})
    page.route("**/api/vl/extract", lambda route: route.fulfill(status=422, content_type="application/json", body=body))
    page.set_input_files("#field-reference", path)
    page.click("#save-sight")
    until(page, "() => document.querySelector('#sight-fault').textContent === 'picture: it is too dark'")


def test_what_is_left_open_is_not_sent(page):
    refuse(page)
    write(page, "a cat")
    assert submitted(page) == {"prompt": "a cat"}
    assert page.locator("#form-fault").inner_text() == "this is refused"


def test_a_field_that_is_declared_tomorrow_has_a_control(browser, url):
    def more(route):
        schema = route.fetch().json()
        new = {"enum": ["fine", "coarse"], "type": "string", "default": "fine", "x-group": "Sampling"}
        schema["request"]["properties"]["brush"] = {**new, "description": "How --steps are taken."}
        schema["request"]["properties"]["sharpness"] = {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5}
        route.fulfill(json=schema)

    with window(browser, url, allowed=("422",), routes={"**/api/schema": more}) as page:
        refuse(page, "brush")
        page.click("[data-group=Sampling] summary")
        assert "“Steps”" in page.locator("#help-brush").inner_text()
        page.select_option("#field-brush", "coarse")
        page.click("[data-group=More] summary")
        page.fill("#field-sharpness", "0.25")
        assert submitted(page) == {"brush": "coarse", "sharpness": 0.25}
        assert page.locator("[data-group=Sampling] .count").inner_text() == "1 set"


def test_a_field_without_its_condition_is_hidden_and_not_sent(page):
    refuse(page)
    page.fill("#field-guidance", "3")
    page.fill("#field-negative", "blur")
    assert submitted(page)["negative"] == "blur"
    page.fill("#field-guidance", "0")
    assert not page.locator("#field-negative").is_visible()
    assert submitted(page) == {"guidance": 0}


def test_sliders_presets_swap_dice_and_lock(page):
    refuse(page)
    page.locator("[data-field=steps] input[type=range]").fill("12")
    page.select_option("#preset", "1280x720")
    page.click("#swap")
    page.click("[aria-label='Throw a new seed']")
    seed = int(page.input_value("#field-seed"))
    assert submitted(page) == {"steps": 12, "width": 720, "height": 1280, "seed": seed}
    assert page.input_value("#preset") == "720x1280"
    page.click("[aria-label='Keep this seed']")
    page.click("[aria-label='Leave steps open']")
    page.select_option("#preset", "")
    assert submitted(page) == {}


def test_samplers_and_schedules_have_the_names_that_people_know(page):
    refuse(page)
    for name, first in (("sampler", "Euler"), ("schedule", "Simple")):
        texts = page.locator(f"#field-{name} option").all_inner_texts()
        assert texts[:2] == [f"Default: {first}", first]
    page.select_option("#field-sampler", label="DPM++ 2M")
    page.select_option("#field-schedule", label="KL Optimal")
    assert submitted(page) == {"sampler": "dpmpp_2m", "schedule": "kl_optimal"}


def test_exact_noise_levels_leave_no_steps_and_no_schedule(page):
    refuse(page)
    page.fill("#field-steps", "12")
    page.select_option("#field-schedule", "beta")
    page.click("[data-group=Sampling] summary")
    page.fill("#field-sigmas", "1,0.6,0")
    assert not any(page.locator(f"#field-{name}").is_visible() for name in ("steps", "schedule", "shift"))
    assert submitted(page) == {"sigmas": "1,0.6,0"}
    page.fill("#field-sigmas", "")
    assert submitted(page) == {"steps": 12, "schedule": "beta"}


def test_seeds_of_63_bits_are_sent_to_the_last_digit(page):
    refuse(page)
    page.fill("#field-seed", str(2**63 - 1))
    submitted(page)
    assert sent_jobs(page)[-1]["request"] == f'{{"seed":{2**63 - 1}}}'


def test_what_cannot_be_read_is_named_before_anything_is_sent(page):
    refuse(page)
    page.locator("#field-steps").focus()
    page.keyboard.type("1e")
    page.click("#render")
    assert "Steps" in page.locator("#form-fault").inner_text()
    assert sent_jobs(page) == []


def test_the_servers_own_words_stand_at_the_field(page):
    write(page, "a cat")
    page.fill("#field-width", "100")
    page.click("#render")
    page.wait_for_selector("#fault-width:not([hidden])")
    assert "multiple of 16" in page.locator("#fault-width").inner_text()
    assert page.evaluate("document.activeElement.id") == "field-width"
    page.fill("#field-width", "96")
    assert not page.locator("#fault-width").is_visible()


@pytest.fixture
def square(tmp_path):
    path = tmp_path / "square.png"
    Image.new("RGB", (128, 64), "#77aa33").save(path)
    return path


def mask_of(page) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(sent_jobs(page)[-1]["files"]["mask"])))


def test_a_dropped_picture_is_started_from(page, square):
    write(page, "a cat")
    drop(page, square, "image")
    page.wait_for_selector(".zone-card img")
    page.fill("#field-strength", "0.5")
    page.fill("#field-width", "128")
    page.fill("#field-height", "128")
    page.click("#render")
    page.wait_for_selector("#frame img[src^='/api/images/']")
    sent = sent_jobs(page)[-1]
    assert base64.b64decode(sent["files"]["image"]) == square.read_bytes()
    assert json.loads(sent["request"])["strength"] == 0.5
    job = page.evaluate("fetch('/api/jobs').then((answer) => answer.json())")["jobs"][0]
    assert job["state"] == "done"
    assert job["request"]["image"]["hash"]


def test_a_mask_is_painted_with_the_mouse(page, square):
    refuse(page)
    page.set_input_files("#field-image", square)
    page.click("#open-painter")
    box = page.locator("#painter-canvas").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])  # noqa: E731

    def stroke(*points):
        page.mouse.move(*at(*points[0]))
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*at(*point), steps=4)
        page.mouse.up()

    stroke((0.1, 0.5), (0.9, 0.5))
    page.check("[name=brush][value=erase]", force=True)
    stroke((0.75, 0.4), (0.75, 0.6))
    page.click("#mask-done")
    submitted(page)
    mask = mask_of(page)
    assert mask.size == (1024, 512)  # finer than the small picture
    shades = [mask.convert("L").getpixel(point) for point in ((256, 256), (768, 256), (256, 32), (32, 480))]
    assert shades == [255, 0, 0, 0]
    page.click("#open-painter")
    page.click("#mask-undo")  # the erasing
    page.click("#mask-invert")
    page.click("#mask-done")
    submitted(page)
    assert [mask_of(page).convert("L").getpixel(point) for point in ((256, 256), (768, 256), (256, 32))] == [0, 0, 255]
    page.click("#open-painter")
    page.click("#mask-clear")
    page.click("#mask-done")
    submitted(page)
    assert list(sent_jobs(page)[-1]["files"]) == ["image"]


def test_a_mask_is_painted_with_keys(page, square):
    refuse(page)
    page.set_input_files("#field-image", square)
    page.click("#open-painter")
    page.wait_for_selector("#painter[open]")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("]")
    page.keyboard.press(" ")
    page.click("#mask-done")
    submitted(page)
    assert mask_of(page).convert("L").getpixel((520, 256)) == 255
    assert mask_of(page).convert("L").getpixel((32, 32)) == 0


def test_tokens_are_counted_and_coloured(page):
    level = lambda: page.locator("#counter").get_attribute("data-level")  # noqa: E731
    page.route("**/api/format-prompt", lambda route: route.fulfill(json=counted(route.request.post_data_json)))
    for words, wanted in (("a cat", "fine"), ("cat " * 470, "near"), ("cat " * 600, "over")):
        write(page, words)
        count = f"{len(words.split())} / 512"
        until(page, "(count) => document.querySelector('#token-count').textContent.startsWith(count)", count)
        assert level() == wanted
    page.click("#shorten")
    assert page.evaluate("document.activeElement.id") == "field-long_prompt"


def counted(asked):
    return {"text": "", "tokens": len(asked["prompt"].split()), "limit": 512, "outcome": ""}


def test_the_count_is_the_servers(page):
    until(page, "() => document.querySelector('#token-count').textContent !== ''")
    empty = page.locator("#token-count").inner_text()
    write(page, "a cat face on a blue background")
    until(page, "(empty) => document.querySelector('#token-count').textContent !== empty", empty)
    pick_template(page)
    one = page.locator("#token-count").inner_text()
    until(page, "(one) => document.querySelector('#token-count').textContent !== one", one)


def test_templates_are_searched_and_previewed(page):
    page.click("#field-template")
    page.fill("#template-search", "film grain")
    assert page.locator("#template-list .choice").count() >= 1
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    until(page, "() => document.querySelector('#template-preview h3') !== null")
    until(page, "() => document.querySelector('#template-preview').innerText.includes('tokens with your prompt')")
    name = page.locator("#template-preview h3").inner_text()
    page.keyboard.press("Enter")
    assert page.locator("#field-template").inner_text() == name
    page.click("[aria-label='No template']")
    assert page.locator("#field-template").inner_text() == "Template"


def test_a_rewriting_is_edited_and_taken(page):
    answer = {"prompt": "a fox, reading", "thinking": "hm", "original": "fox", "rewriter": "rewrite-photo", "seed": 1}
    page.route("**/api/rewrite", lambda route: route.fulfill(json=answer))
    write(page, "fox")
    page.click("#open-rewriter")
    page.check("[name=rewriter-choice][value=rewrite-photo]", force=True)
    page.click("#rewriter-run")
    until(page, "() => document.querySelector('#rewriter-result').value === 'a fox, reading'")
    page.fill("#rewriter-result", "a fox, reading at night")
    page.click("#rewriter-use")
    assert page.input_value("#field-prompt") == "a fox, reading at night"


def test_every_setting_of_rewriting_has_a_control_with_an_effect(page):
    refuse(page)
    page.click("#open-rewriter")
    page.check("[name=rewriter-choice][value=rewrite-photo]", force=True)
    wanted = {name: put(page, name, property) for name, property in REWRITING.items() if name != "rewriter"}
    page.keyboard.press("Escape")
    assert submitted(page) == {}
    page.click("#open-rewriter")
    page.check("#rewriter-always")
    page.keyboard.press("Escape")
    assert submitted(page) == {"rewriter": "rewrite-photo", **wanted}


def test_loras_are_listed_with_weights(browser, url):
    def with_loras(route):
        route.fulfill(json={**route.fetch().json(), "lora": {"names": ["ink.safetensors", "style.safetensors"]}})

    with window(browser, url, PHONE, allowed=("422",), routes={"**/api/schema": with_loras}) as page:
        refuse(page)
        page.click("#add-lora")
        page.click("#add-lora")
        page.locator(".lora-row select").last.select_option("style.safetensors")
        page.locator(".lora-row .weight").last.fill("0.5")
        assert submitted(page) == {"lora": ["ink.safetensors:1", "style.safetensors:0.5"]}
        page.locator("[aria-label='Remove the LoRA']").first.click()
        assert submitted(page) == {"lora": ["style.safetensors:0.5"]}
