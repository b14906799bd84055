"""OpenAI's images API, asked by its own package: a real server for what it draws, a fake one for what goes wrong."""

import asyncio
import base64
import io
import json
import time
from dataclasses import replace

import httpx
import openai
import pytest
from fake import FakeService, app_of
from fastapi.testclient import TestClient
from PIL import Image

from zimage.errors import RequestError
from zimage.pictures.files import read_metadata
from zimage.serve.conditions import Piece
from zimage.serve.forms import openai as form
from zimage.serve.forms.openai_answer import Partials
from zimage.serve.forms.openai_request import from_parts, is_known, opaque_mask, translated
from zimage.serve.refusals import NoRoom, TooLarge, TooMany, Unavailable


@pytest.fixture
def service(tmp_path):
    return FakeService(tmp_path)


@pytest.fixture
def client(service):
    """The official client, on an app in this process."""
    http = TestClient(app_of(form, service))
    return openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=0)


@pytest.fixture(scope="module")
def real(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def opened(text):
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def png(color="red", size=(64, 48), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png(size=(64, 48)):
    """The left half transparent."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------------- a real server


def test_a_picture_is_the_one_that_the_library_draws(real, server):
    drawn = real.images.generate(prompt="a cat", size="128x128", extra_body={"seed": 3})
    job = server.draw(prompt="a cat", width=128, height=128, seed=3)
    expected = server.http.get(job["images"][0]["url"]).content
    assert opened(drawn.data[0].b64_json).tobytes() == Image.open(io.BytesIO(expected)).tobytes()
    assert (drawn.size, drawn.output_format, drawn.quality, drawn.background) == ("128x128", "png", "high", "opaque")
    assert drawn.usage.output_tokens == 64
    assert drawn.usage.total_tokens == drawn.usage.input_tokens + 64 > 64
    assert drawn.data[0].seed == 3


def test_a_stream_shows_the_picture_while_it_is_drawn(real):
    events = list(
        real.images.generate(prompt="a cat", stream=True, partial_images=2, size="128x128", extra_body={"seed": 3})
    )
    assert [event.type for event in events][-1] == "image_generation.completed"
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert 1 <= len(partial) <= 2, "a slow reader misses some, but not all"
    assert all(opened(event.b64_json).format == "PNG" for event in partial)
    assert opened(events[-1].b64_json).size == (128, 128)
    assert events[-1].usage.output_tokens == 64


def test_an_edit_repaints_what_is_transparent(real, server):
    """Our own form has the opposite convention: there white is repainted."""
    start, white = png("blue", (128, 128)), Image.new("L", (128, 128), 0)
    white.paste(255, (0, 0, 64, 128))
    buffer = io.BytesIO()
    white.save(buffer, "PNG")
    edited = real.images.edit(
        image=("a.png", start), mask=("m.png", mask_png((128, 128))), prompt="a cat", extra_body={"seed": 1, "steps": 4}
    )
    values = ("request", (None, json.dumps({"prompt": "a cat", "seed": 1, "steps": 4}), "application/json"))
    files = [values, ("image", ("a.png", start)), ("mask", ("m.png", buffer.getvalue()))]
    job = server.wait(server.http.post("/api/jobs", files=files).json()["id"])
    expected = server.http.get(job["images"][0]["url"]).content
    assert opened(edited.data[0].b64_json).tobytes() == Image.open(io.BytesIO(expected)).tobytes()
    assert edited.usage.input_tokens_details.image_tokens == 64


def test_links_lead_to_the_picture(real, server):
    url = real.images.generate(prompt="a cat", response_format="url", extra_body={"steps": 1}).data[0].url
    assert url.startswith(f"{server.url}/api/images/")
    assert server.http.get(url).headers["content-type"] == "image/png"


def test_the_model_is_listed(real):
    (model,) = real.models.list().data
    assert real.models.retrieve(model.id).id == model.id == "demo"
    with pytest.raises(openai.NotFoundError) as caught:
        real.models.retrieve("other")
    assert caught.value.code == "model_not_found"


# ---------------------------------------------------------------------- what is asked for


def test_own_names_stand_beside_the_standard_ones(client, service):
    client.images.generate(
        prompt="a cat",
        n=2,
        size="128x64",
        extra_body={"seed": 7, "steps": 3, "guidance": 2, "negative": "dogs", "lora": ["style:0.5"], "template": None},
    )
    (asked,) = service.asked
    ours = {"prompt": "a cat", "images": 2, "width": 128, "height": 64, "seed": 7, "steps": 3}
    assert asked.values == {**ours, "guidance": 2, "negative": "dogs"}
    assert (list(asked.lora), asked.form) == (["style:0.5"], "openai")


def test_n_pictures_have_seeds_of_their_own(client):
    drawn = client.images.generate(prompt="a cat", n=3, extra_body={"seed": 5})
    assert [datum.seed for datum in drawn.data] == [5, 6, 7]
    assert drawn.usage.output_tokens == 3 * 64 * 48 // 256
    assert drawn.usage.input_tokens == 2


@pytest.mark.parametrize(("quality", "steps"), [("low", 4), ("high", None), ("auto", None), ("hd", None)])
def test_low_quality_is_half_of_the_steps(client, service, quality, steps):
    drawn = client.images.generate(prompt="a cat", quality=quality)
    assert service.asked[0].values.get("steps") == steps
    assert drawn.quality == ("low" if quality == "low" else "high")
    client.images.generate(prompt="a cat", quality=quality, extra_body={"steps": 6})
    assert service.asked[1].values["steps"] == 6
    exact = {"prompt": "a cat", "sigmas": "1,0.5,0"}  # are as many as they are
    assert translated({**exact, "quality": quality}, 8)[1] == exact


def test_fields_that_change_nothing_here_are_accepted(client, service):
    client.images.generate(
        prompt="a cat", moderation="low", style="vivid", user="u", background="opaque", size="auto", model="gpt-image-2"
    )
    assert service.asked[0].values == {"prompt": "a cat"}


@pytest.mark.parametrize("kind", ["webp", "jpeg", "avif"])
def test_other_formats_keep_the_settings(client, tmp_path, kind):
    drawn = client.images.generate(prompt="a cat", output_format=kind, output_compression=80, extra_body={"seed": 9})
    file = tmp_path / f"drawn.{kind}"
    file.write_bytes(base64.b64decode(drawn.data[0].b64_json))
    assert Image.open(file).format == kind.upper()
    assert read_metadata(file)["request"]["seed"] == 9
    assert drawn.output_format == kind


def test_compression_makes_smaller_files(client):
    sizes = []
    for compression in (100, 10):
        drawn = client.images.generate(prompt="a", output_format="jpeg", output_compression=compression)
        sizes.append(len(drawn.data[0].b64_json))
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("name", ["", "zimage", "fake", "gpt-image-1", "gpt-image-2.5-flare-2026-09-08", "dall-e-3"])
def test_names_that_mean_the_loaded_model(name):
    assert is_known(name, "fake")


@pytest.mark.parametrize("name", ["flux", "gpt-4o", "other", "dall-e-", "gpt-image-1/../x"])
def test_another_model_is_not_found(client, name):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a cat", model=name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


WRONG = {
    "n": {"n": 11},
    "size": {"size": "1000x1024"},
    "size of no number": {"size": "large"},
    "size beside width": {"size": "64x64", "extra_body": {"width": 64}},
    "quality": {"quality": "best"},
    "output_format": {"output_format": "gif"},
    "output_compression": {"output_compression": 101},
    "background": {"background": "transparent"},
    "response_format": {"response_format": "file"},
    "output_format of links": {"response_format": "url", "output_format": "webp"},
    "response_format of a stream": {"response_format": "url", "stream": True},
    "output_format of long sides": {"size": "16x16384", "output_format": "webp"},
    "partial_images": {"stream": True, "partial_images": 4},
    "partial_images without a stream": {"partial_images": 1},
    "prompt": {"prompt": ["a", "b"]},
    "steps": {"extra_body": {"steps": 0}},
    "frame_count": {"extra_body": {"frame_count": 4}},
    "rewriter_url": {"extra_body": {"rewriter_url": "http://elsewhere.example"}},
    "image": {"extra_body": {"image": "/etc/passwd"}},
    "lora": {"extra_body": {"lora": ["../style"]}},
    "width": {"extra_body": {"width": 1000}},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_at_fault_is_named_as_the_client_calls_it(client, service, case):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": "a cat", **WRONG[case]})
    assert caught.value.param == case.split()[0]
    assert caught.value.type == "invalid_request_error"
    assert not service.asked


def test_a_long_name_is_not_repeated_as_a_whole(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a cat", extra_body={"n" * 100_000: 1})
    assert len(caught.value.response.content) < 2000


def test_a_prompt_is_needed(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/images/generations", body={}, cast_to=object)
    assert caught.value.param == "prompt"


REFUSALS = {
    "full": (TooMany("the queue is full", retry_after=7), openai.RateLimitError, 429),
    "stopping": (Unavailable("the server is stopping", retry_after=2), openai.InternalServerError, 503),
    "no room": (NoRoom("the disk is full"), openai.InternalServerError, 507),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_the_package_s_own_errors(client, service, case):
    service.refusal, kind, status = REFUSALS[case]
    with pytest.raises(kind) as caught:
        client.images.generate(prompt="a cat")
    assert caught.value.status_code == status
    if service.refusal.retry_after:
        assert caught.value.response.headers["retry-after"] == str(service.refusal.retry_after)


def test_a_failed_job_is_an_error_and_not_tried_again(service):
    service.error = {"message": "the device ran out of memory", "fields": []}
    http = TestClient(app_of(form, service))
    patient = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, max_retries=2)
    with pytest.raises(openai.InternalServerError, match="out of memory"):
        patient.images.generate(prompt="a cat")
    assert len(service.asked) == 1


def test_pictures_that_were_deleted_are_not_found(client, service):
    """The same key gives the same job, whose pictures may be gone."""
    service.deleted = True
    with pytest.raises(openai.NotFoundError, match="deleted"):
        client.images.generate(prompt="a cat", extra_headers={"Idempotency-Key": "k"})
    with pytest.raises(openai.APIError, match="deleted"):
        list(client.images.generate(prompt="a cat", stream=True))


def test_a_fault_that_shows_late_is_the_client_s(client, service):
    service.error = {"message": "width 64 does not fit in memory", "fields": ["width", "height"]}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a cat", size="64x64")
    assert caught.value.param == "size"


# ---------------------------------------------------------------------- edits


def test_an_edit_carries_its_files(client, service):
    image, mask = png(), mask_png()
    client.images.edit(image=("a.png", image), mask=("m.png", mask), prompt="a dog", n=2, extra_body={"strength": 0.5})
    (asked,) = service.asked
    assert asked.values == {"prompt": "a dog", "images": 2, "strength": 0.5}
    assert asked.attachments["image"] == image
    white = Image.open(io.BytesIO(asked.attachments["mask"])).convert("L")
    assert (white.getpixel((8, 8)), white.getpixel((56, 8))) == (255, 0)


def test_values_of_parts_have_their_types():
    parts = {"n": ["2"], "steps": ["4"], "guidance": ["1.5"], "strip_quotes": ["true"], "prompt": ["7"]}
    expected = {"n": 2, "steps": 4, "guidance": 1.5, "strip_quotes": True, "prompt": "7"}
    assert from_parts({**parts, "lora[]": ["a", "b:0.5"], "layer_weights[-2]": ["0.7"]}) == {
        **expected,
        "lora": ["a", "b:0.5"],
        "layer_weights": {"-2": 0.7},
    }
    assert from_parts({"n": ["many"]}) == {"n": "many"}
    with pytest.raises(RequestError, match="2 times"):
        from_parts({"prompt": ["a", "b"]})


def test_several_pictures_are_refused_by_name(client):
    with pytest.raises(openai.BadRequestError, match="only one") as caught:
        client.images.edit(image=[("a.png", png()), ("b.png", png())], prompt="a dog")
    assert caught.value.param == "image"


def seeing(service):
    service.about = replace(service.about, vision={"model": "vl", "mode": "full"})


def test_several_pictures_are_looked_at(client, service):
    seeing(service)
    client.images.edit(image=[("a.png", png("red")), ("b.png", png("blue"))], prompt="both")
    (asked,) = service.asked
    assert asked.attachments == {}
    assert [one.picture for one in asked.conditions["reference"]] == [png("red"), png("blue")]


@pytest.mark.parametrize("how", [{"mask": mask_png()}, {"extra_body": {"strength": 0.5}}], ids=["mask", "strength"])
def test_of_several_pictures_the_first_is_redrawn(client, service, how):
    seeing(service)
    client.images.edit(image=[("a.png", png("red")), ("b.png", png("blue"))], prompt="both", **how)
    (asked,) = service.asked
    assert asked.attachments["image"] == png("red")
    assert [one.picture for one in asked.conditions["reference"]] == [png("blue")]


def test_references_and_controls_stand_beside(client, service):
    entry = {"model": "union", "picture": base64.b64encode(png()).decode(), "scale": 1}
    client.images.generate(prompt="a", extra_body={"control": [entry]})
    assert service.asked[0].conditions["control"] == (Piece(png(), {"model": "union", "scale": 1}),)
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", extra_body={"reference": [{"picture": "/etc/passwd"}]})
    assert caught.value.param == "reference"


def test_a_list_and_a_table_of_one_name_are_a_contradiction():
    with pytest.raises(RequestError, match="lora: it is a list and a table"):
        from_parts({"lora[]": ["a"], "lora[b]": ["1"]})


def test_one_picture_in_a_list_is_one(client, service):
    client.images.edit(image=[("a.png", png())], prompt="a dog")
    assert service.asked[0].attachments["image"] == png()


def test_an_edit_needs_a_picture(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=[], mask=mask_png(), prompt="a dog")
    assert caught.value.param == "image"


MASKS = {
    "nothing is transparent": png("white", mode="RGBA"),
    "it has no transparency": png("white"),
    "another size": mask_png((32, 48)),
    "not a picture": b"GIF89a",
    "cut short": mask_png()[:60],
}


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_that_says_nothing_is_refused(client, case):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("a.png", png()), mask=("m.png", MASKS[case]), prompt="a dog")
    assert caught.value.param == "mask"


def test_a_huge_mask_is_not_decoded():
    huge = png(0, (5000, 5000), "LA")
    assert len(huge) < 200_000
    with pytest.raises(TooLarge, match="mask"):
        opaque_mask(huge, huge, 1_000_000)


def test_a_palette_s_transparency_counts():
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8)).quantize().save(buffer, "PNG")
    assert Image.open(buffer).mode == "P"
    assert Image.open(io.BytesIO(opaque_mask(buffer.getvalue(), png(size=(8, 8)), 100))).getpixel((0, 0)) == 255


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("wanted", [0, 1, 2, 3])
def test_previews_are_spread_over_the_steps(client, wanted):
    events = list(client.images.generate(prompt="a cat", n=2, stream=True, partial_images=wanted))
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image"] * wanted * 2 + ["completed"] * 2
    numbers = [event.partial_image_index for event in events[: 2 * wanted]]
    assert numbers == [*range(wanted)] * 2
    greens = [round(opened(event.b64_json).getpixel((8, 6))[1] / 20) for event in events[:wanted]]
    assert greens == {0: [], 1: [4], 2: [3, 6], 3: [2, 4, 6]}[wanted]
    assert all(event.size == "64x48" for event in events)
    assert events[-1].usage.output_tokens == 12


def test_few_steps_give_few_previews():
    partials = Partials(3)
    partials.advance(0, 1, 1)
    assert [partials.due(0), partials.due(0)] == [0, None]
    partials.advance(1, 1, 2)
    assert partials.due(1) == 0
    partials.advance(1, 2, 2)
    assert partials.due(1) == 1


def test_an_edit_s_events_have_its_name(client):
    events = client.images.edit(image=("a.png", png()), prompt="a dog", stream=True, partial_images=1)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_a_stream_of_another_format(client):
    events = client.images.generate(prompt="a", stream=True, partial_images=1, output_format="webp")
    assert [opened(event.b64_json).format for event in events] == ["WEBP", "WEBP"]


def test_a_stream_that_fails_raises(client, service):
    service.error = {"message": "width 64 does not fit in memory", "fields": ["width"]}
    with pytest.raises(openai.APIError, match="does not fit") as caught:
        list(client.images.generate(prompt="a cat", size="64x64", stream=True))
    assert caught.value.body["param"] == "size"


# ---------------------------------------------------------------------- clients that go


def disconnected(service, values):
    """An ASGI call whose client goes away once the job runs."""

    async def call():
        body = json.dumps(values).encode()
        first = [{"type": "http.request", "body": body, "more_body": False}]
        headers = [(b"content-type", b"application/json"), (b"host", b"testserver")]
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "path": "/v1/images/generations"}
        scope |= {"query_string": b"", "headers": headers, "scheme": "http", "root_path": "", "client": None}

        async def receive():
            if first:
                return first.pop()
            while not service.asked:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        await asyncio.wait_for(app_of(form, service)({**scope, "server": ("testserver", 80)}, receive, send), 5)
        await asyncio.sleep(0.1)

    asyncio.run(call())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_job_nobody_waits_for_is_cancelled(service, streamed):
    service.hold = True
    disconnected(service, {"prompt": "a cat", "stream": streamed})
    assert service.cancelled == ["job1"]


SLOW = {"prompt": "a cat", "size": "512x512", "extra_body": {"steps": 150, "seed": 1}}


def cancelled(server):
    return {job["id"] for job in server.http.get("/api/jobs?state=cancelled&limit=1000").json()["jobs"]}


def one_more_is_cancelled(server, before):
    end = time.monotonic() + 30
    while len(cancelled(server) - before) < 1 and time.monotonic() < end:
        time.sleep(0.05)
    (id,) = cancelled(server) - before
    return server.http.get(f"/api/jobs/{id}").json()["kind"] == "openai"


def test_a_client_that_loses_patience_frees_the_worker(real, server):
    before = cancelled(server)
    with pytest.raises(openai.APITimeoutError):
        real.with_options(timeout=1.0).images.generate(**SLOW)
    assert one_more_is_cancelled(server, before)


def test_a_reader_that_closes_a_stream_frees_the_worker(real, server):
    before = cancelled(server)
    with real.images.generate(stream=True, **SLOW):
        pass
    assert one_more_is_cancelled(server, before)


def test_a_stream_read_to_its_end_cancels_nothing(client, service):
    list(client.images.generate(prompt="a cat", stream=True))
    client.images.generate(prompt="a cat")
    assert service.cancelled == []


def test_links_follow_the_host_that_was_asked(service):
    http = TestClient(app_of(form, service), base_url="https://pictures.example:8443")
    body = {"prompt": "a", "response_format": "url"}
    found = http.post("/v1/images/generations", json=body).json()
    assert found["data"][0]["url"] == "https://pictures.example:8443/api/images/job1-1"


def test_a_wrong_token_is_the_package_s_own_error(new_server, tmp_path):
    token = tmp_path / "token"
    token.write_text("a-secret-of-some-length-0123456789")
    server = new_server("--token-file", token).start()
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"
    assert openai.OpenAI(base_url=f"{server.url}/v1", api_key=token.read_text(), max_retries=0).models.list().data


def test_what_is_not_spoken_is_not_found(server):
    answer = httpx.post(f"{server.url}/v1/images/variations")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
