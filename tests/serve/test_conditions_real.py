"""References and controls on a real server with tiny models: the library's own bits, kept jobs, `gen --server`."""

import base64
import io
import json
import os
import shutil

import pytest
import torch
from hostile import BOMBS, picture, tensors
from PIL import Image
from running import Server
from safetensors.torch import load

import zimage
from zimage.cli import main
from zimage.errors import RequestError
from zimage.serve.drawing import Studio

SIZE = {"width": 64, "height": 48}
PNG = base64.b64encode(picture()).decode()
DRAWN = {"prompt": "a cat", "seed": 7, "steps": 3, **SIZE}


@pytest.fixture(scope="module")
def server(tmp_path_factory, model, controls):
    running = Server(
        tmp_path_factory.mktemp("server") / "data",
        *("--model", str(model), "--control-folder", str(controls), "--dtype", "fp32", "--max-conditions", "3"),
    ).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.said()


@pytest.fixture(scope="module")
def pipe(model):
    return zimage.ZImage.load(model, dtype="fp32")


def pixels(content):
    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def test_a_control_by_name_draws_what_the_library_draws(server, pipe, controls):
    assert server.http.get("/api/controls").json() == {"controls": ["lite", "lite-damaged"]}
    entry = {"model": "lite", "picture": PNG, "scale": 0.9}
    job = server.draw(**DRAWN, control=[entry])
    given = (str(controls / "lite"), Image.open(io.BytesIO(picture())), 0.9)
    expected = pipe.generate(**DRAWN, control=[given]).images[0]
    assert server.pixels(job) == [expected.tobytes()]
    assert expected.tobytes() != pipe.generate(**DRAWN).images[0].tobytes()
    (told,) = job["request"]["control"]
    assert (told["model_name"], told["scale"]) == ("lite", 0.9)
    assert "/" not in json.dumps(job["request"])


def test_files_in_parts_are_the_same_as_base64(server):
    request = json.dumps({**DRAWN, "control": [{"model": "lite", "scale": 0.9}, {"model": "lite", "scale": 0.1}]})
    other = picture(size=(9, 9))
    parts = [("request", (None, request)), ("control", ("a.png", picture())), ("control", ("b.png", other))]
    answer = server.http.post("/api/generate", files=parts)
    assert answer.status_code == 200, answer.text
    inline = [base64.b64encode(one).decode() for one in (picture(), other)]
    entries = [{"model": "lite", "picture": one, "scale": s} for one, s in zip(inline, (0.9, 0.1), strict=True)]
    assert server.pixels(server.draw(**DRAWN, control=entries)) == [pixels(answer.content)]


@pytest.mark.full
def test_a_job_with_controls_outlives_its_server(server, new_server, model, controls):
    options = ("--model", str(model), "--control-folder", str(controls), "--dtype", "fp32")
    entry = {"model": "lite", "picture": PNG}
    other = new_server(*options).start()
    ids = [other.submit(**{**DRAWN, "steps": 60}, control=[entry])["id"] for _ in range(2)]
    other.kill()
    assert len(os.listdir(other.folder / "uploads")) == 1
    other.start()
    whole = server.draw(**{**DRAWN, "steps": 60}, control=[entry])
    for id in ids:
        assert other.pixels(other.wait(id)) == server.pixels(whole)
    assert other.stop() == 0


HOSTILE = {
    "101 references": ({"reference": [{"picture": "AAAA"}] * 101}, "reference"),
    "four": ({"control": [{"model": "lite", "picture": "AAAA"}] * 4}, "control"),
    "another place": ({"control": [{"model": "../../lite", "picture": "AAAA"}]}, "control"),
    "a path": ({"control": [{"model": "/etc/passwd", "picture": "AAAA"}]}, "control"),
    "a model that is not here": (
        {"control": [{"model": "lit", "picture": PNG}]},
        "control",
    ),
    "a damaged model": ({"control": [{"model": "lite-damaged", "picture": PNG}]}, "control"),
    "no picture": ({"control": [{"model": "lite", "picture": "AAAA"}]}, "control"),
    "a text": ({"reference": "/etc/passwd"}, "reference"),
    "a text in a list": ({"control": ["lite:/etc/passwd"]}, "control"),
    "a path as a picture": ({"reference": [{"picture": "/etc/passwd"}]}, "reference"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_hostile_is_one_line_that_names_the_field(server, controls, case):
    asked, field = HOSTILE[case]
    answer = server.http.post("/api/jobs", json={"prompt": "a", **asked})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["fields"] == [field]
    assert "\n" not in error["message"]
    for folder in (server.folder, controls):
        assert str(folder) not in error["message"]


@pytest.mark.parametrize("name", ["reference", "control"])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused(server, name, kind):
    entry = {"picture": base64.b64encode(BOMBS[kind]).decode(), **({"model": "lite"} if name == "control" else {})}
    answer = server.http.post("/api/jobs", json={"prompt": "a", name: [entry]})
    assert answer.status_code in (413, 422)
    assert answer.json()["error"]["fields"] == [name]


def test_gen_draws_there_what_it_draws_here(server, model, controls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "pose.png").write_bytes(picture())
    asked = ["gen", "a cat", "--seed", "7", "--steps", "3", "--width", "64", "--height", "48", "-q"]
    assert main([*asked, "--control", "lite:pose.png:0.9", "--server", server.url, "-o", "there.png"]) == 0
    here = ["--control", f"{controls / 'lite'}:pose.png:0.9", "--model", str(model), "--dtype", "fp32"]
    assert main([*asked, *here, "-o", "here.png"]) == 0
    assert pixels((tmp_path / "there.png").read_bytes()) == pixels((tmp_path / "here.png").read_bytes())
    again = ["gen", "--from", "there.png", "--server", server.url, "-q", "-o", "again.png"]
    assert main(again) == 2, "its files are needed"
    assert main([*again, "--control", "lite:pose.png:0.9"]) == 0
    assert pixels((tmp_path / "again.png").read_bytes()) == pixels((tmp_path / "here.png").read_bytes())


def test_a_job_that_fails_names_no_folder(model, controls, tmp_path):
    """A control file, or an upload, may be gone when a job's turn comes, perhaps after a restart."""
    loading = {"model": str(model), "dtype": "fp32"}
    studio = Studio({"loading": loading, "encoder_only": False, "previews": False, "data": str(tmp_path)}, print)
    for gone, words in (("lite", "control"), ("upload", "control"), ("image", "image")):
        shutil.copytree(controls / "lite", tmp_path / "lite", dirs_exist_ok=True)
        for name in ("upload", "image"):
            (tmp_path / name).write_bytes(picture())
        entry = {"model": str(tmp_path / "lite"), "picture": str(tmp_path / "upload")}
        values = {**DRAWN, "control": [entry], "image": str(tmp_path / "image")}
        told = studio.answer({"op": "prepare", "id": "1", "values": values, "lora": None, "rewrite": None}, idle=False)
        os.rename(tmp_path / gone, tmp_path / "elsewhere")
        with pytest.raises(RequestError, match=rf"^{words}:? ") as caught:
            studio.render({"id": "1", "job": told["job"], "rewrite": None, "rewritten": []}, lambda: None)
        assert str(tmp_path) not in str(caught.value)
        assert caught.value.fields == (words,)
        os.rename(tmp_path / "elsewhere", tmp_path / gone)


# ---------------------------------------------------------------------- masks


def see_through(size=(64, 48)):
    """A picture whose left half is transparent."""
    image = Image.linear_gradient("L").resize(size).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return image


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_a_mask_that_lies_in_the_image_and_a_wider_canvas(server, pipe):
    common = {"prompt": "a cat", "seed": 7, "steps": 3, "mask": "alpha", "mask_blur": 2.0, "extend": "16,0,0,16"}
    job = server.draw(**common, image=encoded(see_through()))
    expected = pipe.generate(**common, image=see_through()).images[0]
    assert expected.size == (80, 64)
    assert server.pixels(job) == [expected.tobytes()]


def test_a_canvas_of_more_pixels_than_an_upload_is_refused(server):
    """However little of it is rendered."""
    small = {"mask_crop": 0, "width": 64, "height": 48, "image": encoded(see_through())}
    answer = server.http.post("/api/generate", json={"prompt": "a cat", **small, "extend": "0,0,9000,9000"})
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["fields"] == ["extend"]
    assert "9064 × 9048 px; at most 64,000,000 pixels" in answer.json()["error"]["message"]


def test_masks_of_the_web_ui_are_ours(server, pipe):
    image, mask = see_through().convert("RGB"), Image.new("L", (64, 48))
    mask.paste(255, (8, 8, 24, 24))
    asked = {"prompt": "a cat", "seed": 7, "steps": 3, "width": 64, "height": 48, "denoising_strength": 0.7}
    masked = {"init_images": [encoded(image)], "mask": encoded(mask), "mask_blur": 2, "inpainting_mask_invert": 0}
    region = {"inpaint_full_res": True, "inpaint_full_res_padding": 8}
    answer = server.http.post("/sdapi/v1/img2img", json={**asked, **masked, **region})
    assert answer.status_code == 200, answer.text
    ours = {"image": image, "mask": mask, "mask_blur": 2.0, "mask_crop": 8, "strength": 0.7}
    expected = pipe.generate(**DRAWN, **ours).images[0]
    (drawn,) = answer.json()["images"]
    assert pixels(base64.b64decode(drawn)) == expected.tobytes()
    inverted = server.http.post("/sdapi/v1/img2img", json={**asked, **masked, "inpainting_mask_invert": 1}).json()
    expected = pipe.generate(**DRAWN, **{**ours, "mask_crop": None}, mask_invert=True).images[0]
    assert pixels(base64.b64decode(inverted["images"][0])) == expected.tobytes()


def test_a_unit_of_the_web_ui_is_a_control(server, pipe, controls):
    assert server.http.get("/controlnet/model_list").json() == {"model_list": ["lite", "lite-damaged"]}
    unit = {"image": encoded(see_through()), "model": "lite [0badcafe]", "weight": 0.9, "guidance_end": 0.7}
    asked = {**DRAWN, "alwayson_scripts": {"controlnet": {"args": [unit]}}}
    answer = server.http.post("/sdapi/v1/txt2img", json=asked)
    assert answer.status_code == 200, answer.text
    given = (str(controls / "lite"), see_through(), 0.9)
    expected = pipe.generate(**DRAWN, control=[given], control_end=0.7).images[0]
    assert pixels(base64.b64decode(answer.json()["images"][0])) == expected.tobytes()


# ---------------------------------------------------------------------- references


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, seeing_folder):
    options = ("--model", str(seeing_folder), "--vision-model", str(seeing_folder / "vision"), "--dtype", "fp32")
    running = Server(tmp_path_factory.mktemp("seeing") / "data", *options).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.said()


@pytest.fixture(scope="module")
def eyes(seeing_folder):
    return zimage.ZImage.load(seeing_folder, vision_model=str(seeing_folder / "vision"), dtype="fp32")


def test_references_draw_what_the_library_draws(seeing, eyes):
    pictures = [picture(), picture(size=(32, 64))]
    entries = [
        {"picture": base64.b64encode(one).decode(), "alpha": a} for one, a in zip(pictures, (0.5, 0.25), strict=True)
    ]
    job = seeing.draw(**DRAWN, reference=entries)
    given = [(Image.open(io.BytesIO(one)), a) for one, a in zip(pictures, (0.5, 0.25), strict=True)]
    expected = eyes.generate(**DRAWN, reference=given).images[0]
    assert seeing.pixels(job) == [expected.tobytes()]
    assert expected.tobytes() != eyes.generate(**DRAWN).images[0].tobytes()
    parts = [("request", (None, json.dumps({**DRAWN, "reference": [{"alpha": 0.5}, {"alpha": 0.25}]})))]
    parts += [("reference", ("a.png", one)) for one in pictures]
    answer = seeing.http.post("/api/vl/generate", files=parts)
    assert answer.status_code == 200, answer.text
    assert pixels(answer.content) == expected.tobytes()


def test_what_is_seen_is_a_reference_and_a_caption_of_its_own(seeing, eyes):
    seeing.http.delete("/api/vl/cache").raise_for_status()
    answer = seeing.http.post("/api/vl/extract", files={"picture": ("a.png", picture())})
    assert answer.status_code == 200, answer.text
    caption = load(answer.content)["embeddings"]
    assert torch.equal(caption, eyes.see(Image.open(io.BytesIO(picture()))).cpu())
    told = seeing.http.get("/api/vl/cache").json()
    assert (told["size"], told["hits"]) == (1, 0)
    seen = [("request", (None, json.dumps({**DRAWN, "reference": [{"alpha": 0.5}]})))]
    drawn = seeing.http.post("/api/generate", files=[*seen, ("reference", ("x", answer.content))])
    assert drawn.status_code == 200, drawn.text
    looked = seeing.http.post("/api/generate", files=[*seen, ("reference", ("x", picture()))])
    assert pixels(drawn.content) == pixels(looked.content)
    assert seeing.http.delete("/api/vl/cache").json()["size"] == 0


def test_several_pictures_of_an_edit_are_looked_at(seeing, eyes):
    parts = [("image[]", ("a.png", picture())), ("image[]", ("b.png", picture(size=(32, 64))))]
    fields = {"prompt": "a cat", "size": "64x48", "seed": "7", "steps": "3"}
    answer = seeing.http.post("/v1/images/edits", files=parts, data=fields)
    assert answer.status_code == 200, answer.text
    given = [Image.open(io.BytesIO(one)) for one in (picture(), picture(size=(32, 64)))]
    expected = eyes.generate(**DRAWN, reference=given).images[0]
    assert pixels(base64.b64decode(answer.json()["data"][0]["b64_json"])) == expected.tobytes()


def test_it_says_what_it_looks_with(seeing, server):
    told = seeing.http.get("/api/vl/status").json()
    assert (told["available"], told["model"], told["mode"]) == (True, "vision", "full")
    assert seeing.http.get("/api/schema").json()["vision"]["available"]
    assert not server.http.get("/api/schema").json()["vision"]["available"]
    entry = {"picture": PNG}
    answer = server.http.post("/api/jobs", json={"prompt": "a", "reference": [entry]})
    assert answer.status_code == 422
    assert answer.json()["error"]["fields"][0] == "reference"
    assert "vision" in answer.json()["error"]["message"]


def test_a_sight_that_is_asked_for_wrongly(seeing):
    parts = {"request": (None, '{"vision_layer": -500}'), "picture": ("a.png", picture())}
    answer = seeing.http.post("/api/vl/extract", files=parts)
    assert (answer.status_code, answer.json()["error"]["fields"]) == (422, ["vision_layer"])
    parts = {"picture": ("a.png", tensors())}
    answer = seeing.http.post("/api/vl/extract", files=parts)
    assert (answer.status_code, answer.json()["error"]["fields"]) == (422, ["picture"])
