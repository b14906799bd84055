"""The form of A1111's web UI, asked as its clients ask: a real server for what it draws, a fake one for the rest."""

import base64
import dataclasses
import io
import json
import threading
import time
from pathlib import Path

import pytest
from fake import FakeService, app_of, preview
from fastapi.testclient import TestClient
from PIL import Image

from zimage.errors import RequestError
from zimage.pictures.parameters import parse_parameters
from zimage.serve.forms import a1111 as form
from zimage.serve.forms.a1111_request import translated
from zimage.settings.profiles import Config
from zimage.settings.toml_file import TomlFile

USUAL = {"width": 64, "height": 48, "steps": 8, "guidance": 0.0, "shift": 3.0}
# What SillyTavern and similar pages send with every request, whatever is set on them.
ALL_FIELDS = {
    "prompt": "a cat",
    "negative_prompt": "lowres, bad anatomy",
    "sampler_name": "Euler",
    "scheduler": "Automatic",
    "steps": 6,
    "cfg_scale": 1,
    "width": 128,
    "height": 64,
    "seed": -1,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "hr_additional_steps": 0,
    "denoising_strength": 0.7,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
    "subseed": -1,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True,
}


@pytest.fixture
def service(tmp_path):
    return FakeService(tmp_path)


@pytest.fixture
def client(service):
    return TestClient(app_of(form, service), base_url="http://testserver/sdapi/v1/")


def png(color="red", size=(64, 48), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def opened(text):
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def values(service):
    return service.asked[-1].values


# ---------------------------------------------------------------------- a real server


def test_a_picture_is_the_one_that_the_library_draws(server):
    body = {"prompt": "a cat", "seed": 3, "cfg_scale": 3, "negative_prompt": "dogs", "n_iter": 2, "steps": 4}
    answer = server.http.post("/sdapi/v1/txt2img", json=body).json()
    job = server.draw(prompt="a cat", seed=3, guidance=2, negative="dogs", images=2, steps=4)
    for text, image in zip(answer["images"], job["images"], strict=True):
        assert opened(text).tobytes() == Image.open(io.BytesIO(server.http.get(image["url"]).content)).tobytes()
    info = json.loads(answer["info"])
    assert (info["seed"], info["all_seeds"], info["cfg_scale"], info["steps"]) == (3, [3, 4], 3, 4)
    found = parse_parameters(info["infotexts"][1])
    assert (found.values["prompt"], found.values["negative"], found.values["seed"]) == ("a cat", "dogs", 4)
    assert opened(answer["images"][1]).info["parameters"] == info["infotexts"][1]


def test_names_of_any_kind_fit_into_a_warning(server):
    """A header that ends with a blank would break the answer."""
    answer = server.http.post("/sdapi/v1/options", json={"\x7f\n": 1, "größe ": 1, "ÿ ": 1})
    assert answer.status_code == 200
    assert answer.headers["X-Warning"] == "ignored: gr\\xf6\\xdfe ; \\x7f; \\xff"


def test_the_settings_of_a_picture_are_read_back(server):
    drawn = server.http.post("/sdapi/v1/txt2img", json={"prompt": "a cat", "seed": 3, "steps": 1}).json()
    read = server.http.post("/sdapi/v1/png-info", json={"image": drawn["images"][0]}).json()
    assert read["info"] == json.loads(drawn["info"])["infotexts"][0]
    assert json.loads(read["items"]["zimage"])["request"]["seed"] == 3


def test_progress_and_interrupt_of_a_render(server):
    body = {"prompt": "a cat", "steps": 100, "width": 512, "height": 512, "seed": 1}
    answers = []
    drawing = threading.Thread(target=lambda: answers.append(server.http.post("/sdapi/v1/txt2img", json=body)))
    drawing.start()
    seen = []
    end = time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < end:
        told = server.http.get("/sdapi/v1/progress").json()
        if told["state"]["sampling_step"] > 0:
            seen.append(told)
        time.sleep(0.02)
    assert seen[0]["state"]["sampling_steps"] == 100
    assert 0 < seen[0]["progress"] <= seen[1]["progress"] < 1
    assert server.http.post("/sdapi/v1/interrupt").status_code == 200
    drawing.join(30)
    assert answers[0].status_code == 409, "nothing was finished"
    assert server.http.get("/sdapi/v1/progress").json()["state"]["job_count"] == 0


# ---------------------------------------------------------------------- what is asked for


def test_what_pages_send_is_drawn(client, service):
    answer = client.post("txt2img", json=ALL_FIELDS)
    assert answer.status_code == 200
    assert values(service) == {
        "prompt": "a cat",
        "steps": 6,
        "guidance": 0.0,
        "width": 128,
        "height": 64,
        "sampler": "euler",
    }
    warned = answer.headers["X-Warning"]
    assert "negative_prompt" in warned
    assert "clip_skip" in warned
    assert not {"seed", "scheduler", "enable_hr", "override_settings", "restore_faces"} & set(warned.split())


def test_fields_at_their_defaults_warn_of_nothing(client):
    quiet = {"prompt": "a cat", "subseed": -1, "s_noise": 1.0, "eta": 0, "styles": [], "alwayson_scripts": {}}
    assert "X-Warning" not in client.post("txt2img", json={**quiet, "tiling": False, "mask_blur": 4}).headers


@pytest.mark.parametrize(("cfg", "guidance"), [(1, 0.0), (7.5, 6.5), (0, 0.0), (1.5, 0.5)])
def test_cfg_counts_from_one(client, service, cfg, guidance):
    answer = client.post("txt2img", json={"prompt": "a", "cfg_scale": cfg}).json()
    assert values(service)["guidance"] == guidance
    assert json.loads(answer["info"])["cfg_scale"] == guidance + 1


def test_a_negative_prompt_counts_with_guidance(client, service):
    client.post("txt2img", json={"prompt": "a", "negative_prompt": "dogs", "cfg_scale": 4})
    assert values(service)["negative"] == "dogs"
    service.launch = service.launch.__class__({}, {"guidance": 4.0}, service.settings, service.folder)
    answer = client.post("txt2img", json={"prompt": "a", "negative_prompt": "dogs"})
    assert values(service)["negative"] == "dogs"
    assert "X-Warning" not in answer.headers
    service.launch = service.launch.__class__({}, {"guidance": 0.0, "nag": 2.0}, service.settings, service.folder)
    client.post("txt2img", json={"prompt": "a", "negative_prompt": "cats"})
    assert values(service)["negative"] == "cats"


@pytest.mark.parametrize("more", [{"nag": 3}, {"preset": "guided"}, {"preset": "steered"}])
def test_a_negative_prompt_counts_with_what_acts_on_it(client, service, more):
    text = "[presets.guided]\nguidance = 2.0\n[presets.steered]\nnag = 3.0"
    presets = Config(TomlFile(Path("zimage.toml"), text)).presets
    service.launch = dataclasses.replace(service.launch, presets=presets)
    client.post("txt2img", json={"prompt": "a", "negative_prompt": "dogs", **more})
    assert service.asked[0].values["negative"] == "dogs"


def test_a_preset_that_there_is_not_is_refused(client):
    answer = client.post("txt2img", json={"prompt": "a", "preset": "guidet"})
    assert answer.status_code == 400
    assert "there is no preset 'guidet'" in answer.text


@pytest.mark.parametrize("seed", [-1, -7, None])
def test_a_negative_seed_is_drawn(client, service, seed):
    client.post("txt2img", json={"prompt": "a", "seed": seed})
    assert "seed" not in values(service)


def test_pictures_are_the_product(client, service):
    answer = client.post("txt2img", json={"prompt": "a", "batch_size": 2, "n_iter": 3, "seed": 5}).json()
    assert values(service)["images"] == 6
    assert "batch_size" not in values(service), "ours is another thing, on which the bits depend"
    assert json.loads(answer["info"])["all_seeds"] == [5, 6, 7, 8, 9, 10]
    assert len(answer["images"]) == 6


def test_loras_stand_in_the_prompt(client, service):
    client.post("txt2img", json={"prompt": "a cat <lora:style:0.5> at night <lora:other>"})
    assert values(service)["prompt"] == "a cat at night"
    assert list(service.asked[-1].lora) == ["style:0.5", "other:1"]


@pytest.mark.parametrize("tag", ["<lora:style:much>", "<lora:../style:1>", "<lora:style:1000>"])
def test_a_lora_at_fault_is_in_the_prompt(client, tag):
    answer = client.post("txt2img", json={"prompt": f"a cat {tag}"})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("prompt: ")


def test_two_passes_reach_a_larger_size(client, service):
    body = {"prompt": "a", "width": 64, "height": 48, "enable_hr": True, "denoising_strength": 0.5}
    client.post("txt2img", json={**body, "hr_scale": 1.5})
    assert {name: values(service)[name] for name in ("width", "height", "hires", "strength")} == {
        "width": 96,
        "height": 64,  # 72 is no multiple of 16
        "hires": 1.5,
        "strength": 0.5,
    }
    client.post("txt2img", json={**body, "hr_resize_x": 128})
    assert (values(service)["width"], values(service)["height"], values(service)["hires"]) == (128, 96, 2.0)


def test_strength_without_a_second_pass_means_nothing(client, service):
    client.post("txt2img", json={"prompt": "a", "denoising_strength": 0.75})
    assert "strength" not in values(service)


def test_whole_numbers_may_come_as_floats(client, service):
    client.post("txt2img", json={"prompt": "a", "width": 64.0, "steps": 4.0, "batch_size": 1.0})
    assert (values(service)["width"], values(service)["steps"]) == (64, 4)


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        ({"sampler_name": "Euler a"}, {"sampler": "euler_ancestral"}),
        ({"sampler_index": "k_heun"}, {"sampler": "heun"}),
        ({"sampler_name": "DPM++ 2M Karras"}, {"sampler": "dpmpp_2m", "schedule": "karras"}),
        (
            {"sampler_name": "DPM++ 2M SDE", "scheduler": "Automatic"},
            {"sampler": "dpmpp_2m_sde", "schedule": "exponential"},
        ),
        (
            {"sampler_name": "res_multistep", "scheduler": "KL Optimal"},
            {"sampler": "res_multistep", "schedule": "kl_optimal"},
        ),
        ({"scheduler": "Automatic"}, {}),
        ({"sampler": "lcm"}, {"sampler": "lcm"}),
    ],
)
def test_samplers_by_the_names_of_that_program(client, service, sent, wanted):
    answer = client.post("txt2img", json={"prompt": "a", **sent})
    assert values(service) == {"prompt": "a", **wanted}
    assert "X-Warning" not in answer.headers


@pytest.mark.parametrize(
    ("field", "value"), [("sampler_name", "DPM++ SDE"), ("sampler_index", "PLMS"), ("scheduler", "Align Your Steps")]
)
def test_another_sampler_is_named_in_a_warning(client, service, field, value):
    answer = client.post("txt2img", json={"prompt": "a", field: value})
    assert answer.status_code == 200
    assert value in answer.headers["X-Warning"]
    assert values(service) == {"prompt": "a"}


def test_two_names_for_the_sampler_are_refused(client):
    answer = client.post("txt2img", json={"prompt": "a", "sampler": "lcm", "sampler_name": "Euler"})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "sampler_name: sampler is set too; pass only one of them"


def test_the_answer_names_the_sampler_as_that_program_does(client):
    sent = {"prompt": "a", "sampler_name": "dpmpp_2m", "scheduler": "beta"}  # which is shifted there
    info = json.loads(client.post("txt2img", json=sent).json()["info"])
    assert (info["sampler_name"], info["extra_generation_params"]) == ("DPM++ 2M", {"Schedule type": "Beta"})
    assert "Sampler: DPM++ 2M, Schedule type: Beta, " in info["infotexts"][0]


def test_our_own_fields_stand_beside(client, service):
    client.post("txt2img", json={"prompt": "a", "shift": 2.0, "template": "photo-overcast", "lora": ["style"]})
    assert values(service) == {"prompt": "a", "shift": 2, "template": "photo-overcast"}
    assert list(service.asked[-1].lora) == ["style"]


WRONG = {
    "width": {"width": 1000},
    "steps": {"steps": 0},
    "cfg_scale": {"cfg_scale": -1},
    "cfg_scale beside guidance": {"cfg_scale": 2, "guidance": 1},
    "n_iter": {"n_iter": 100},
    "batch_size": {"batch_size": 100},
    "prompt": {"prompt": ["a", "b"]},
    "sd_model_checkpoint": {"override_settings": {"sd_model_checkpoint": "other"}},
    "override_settings": {"override_settings": []},
    "hr_scale": {"enable_hr": True, "hr_scale": 1},
    "seed": {"seed": "many"},
    "negative_prompt beside negative": {"negative": "x", "negative_prompt": "y", "cfg_scale": 2},
    "lora": {"lora": 7},
    "lora beside a tag": {"lora": 7, "prompt": "a <lora:style:1>"},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_at_fault_is_named_as_the_client_calls_it(client, service, case):
    answer = client.post("txt2img", json={"prompt": "a", **WRONG[case]})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(case.split()[0])
    assert answer.json()["detail"].count(case.split()[0] + ":") <= 1
    assert not service.asked


def test_prompts_go_nowhere_else(client, service):
    """Unknown fields are ignored here, and this one is not known."""
    answer = client.post("txt2img", json={"prompt": "a", "rewriter_url": "http://elsewhere.example"})
    assert "rewriter_url" in answer.headers["X-Warning"]
    assert service.asked[-1].rewrite == {}


def test_a_warning_is_one_line_of_ascii(client):
    """Names of fields come from the client, and headers end with their line."""
    answer = client.post("txt2img", json={"prompt": "a", "x\r\nSet-Cookie: a=b": 1, "größe": 1, "n" * 5000: 1})
    warned = answer.headers["X-Warning"]
    assert "Set-Cookie" not in answer.headers
    assert "gr\\xf6\\xdfe" in warned
    assert len(warned) < 2100


# ---------------------------------------------------------------------- from a picture


def test_a_picture_to_start_from(client, service):
    body = {"prompt": "a", "init_images": [f"data:image/png;base64,{png()}"], "denoising_strength": 0.4}
    answer = client.post("img2img", json=body)
    assert values(service) == {"prompt": "a", "strength": 0.4}
    assert service.asked[-1].attachments["image"] == base64.b64decode(png())
    assert "init_images" not in answer.json()["parameters"]


MASKS = {
    "inverted": ({"inpainting_mask_invert": 1}, {"mask_invert": True}),
    "inverted as well": ({"inpainting_mask_invert": True}, {"mask_invert": True}),
    "as it is": ({"inpainting_mask_invert": 0, "inpaint_full_res": 0, "inpaint_full_res_padding": 32}, {}),
    "blurred": ({"mask_blur": 4}, {"mask_blur": 4}),
    "its region alone": ({"inpaint_full_res": True, "inpaint_full_res_padding": 32}, {"mask_crop": 32}),
    "without room": ({"inpaint_full_res": 1}, {"mask_crop": 0}),
    "begun with the picture": ({"inpainting_fill": 1, "denoising_strength": 0.5}, {"strength": 0.5}),
    "begun with noise": ({"inpainting_fill": 2, "denoising_strength": 1}, {"strength": 1}),
}


@pytest.mark.parametrize("case", MASKS)
def test_how_a_mask_is_used(client, service, case):
    sent, expected = MASKS[case]
    body = {"prompt": "a", "init_images": [png()], "mask": png(255, mode="L"), **sent}
    answer = client.post("img2img", json=body)
    assert answer.status_code == 200, answer.text
    assert "X-Warning" not in answer.headers
    assert values(service) == {"prompt": "a", **expected}
    assert service.asked[-1].attachments["mask"] == base64.b64decode(png(255, mode="L"))


@pytest.mark.parametrize("fill", [0, 2, 3])
def test_another_fill_is_named_in_a_warning(client, fill):
    body = {"prompt": "a", "init_images": [png()], "mask": png(255, mode="L"), "denoising_strength": 0.5}
    answer = client.post("img2img", json={**body, "inpainting_fill": fill})
    assert "inpainting_fill" in answer.headers["X-Warning"]


def test_what_a_mask_has_is_ignored_without_one(client, service):
    asked = {"mask_blur": 4, "inpaint_full_res": True, "inpaint_full_res_padding": 32, "inpainting_mask_invert": 1}
    answer = client.post("img2img", json={"prompt": "a", "init_images": [png()], **asked})
    assert answer.status_code == 200, answer.text
    assert values(service) == {"prompt": "a"}
    answer = client.post("txt2img", json={"prompt": "a", "mask": png(255, mode="L"), **asked})
    assert "mask (there is no picture to start from)" in answer.headers["X-Warning"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("mask_blur", -1), ("mask_blur", 10_000), ("inpaint_full_res_padding", -1), ("inpainting_fill", 9), ("mask", 7)],
)
def test_a_mask_at_fault_is_named_as_the_client_calls_it(client, service, name, value):
    body = {"prompt": "a", "init_images": [png()], "mask": png(255, mode="L"), "inpaint_full_res": 1, name: value}
    answer = client.post("img2img", json=body)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(name)
    assert not service.asked


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"init_images": []},
        {"init_images": [png(), png()]},
        {"init_images": ["/etc/passwd"]},
        {"init_images": ["https://elsewhere.example/a.png"]},
        {"init_images": "AAAA"},
    ],
)
def test_pictures_that_cannot_be_used(client, service, body):
    answer = client.post("img2img", json={"prompt": "a", **body})
    assert answer.status_code == 400
    assert "init_images" in answer.json()["detail"]
    assert not service.asked


def test_txt2img_starts_from_nothing(client, service):
    client.post("txt2img", json={"prompt": "a", "init_images": [png()]})
    assert service.asked[-1].attachments == {}


# ---------------------------------------------------------------------- how far it is


def held(client, service, body):
    service.hold = True
    thread = threading.Thread(target=lambda: service.answers.append(client.post("txt2img", json=body)))
    service.answers = []
    thread.start()
    while not service.asked:
        time.sleep(0.01)
    return thread


def test_progress_of_the_job_of_this_form(client, service):
    with client:
        thread = held(client, service, {"prompt": "a", "n_iter": 2, "steps": 8})
        view = service.views["job1"]
        service.views["job1"] = view.__class__(
            **{**vars(view), "stage": "denoise", "step": 4, "total": 8, "index": 1, "count": 2, "remaining": 3.5}
        )
        service.last_preview = preview(0, 4)
        told = client.get("progress").json()
        assert told["progress"] == pytest.approx(0.99 * 12 / 16, abs=1e-3)
        assert told["eta_relative"] == 3.5
        assert (told["state"]["sampling_step"], told["state"]["sampling_steps"]) == (4, 8)
        assert (told["state"]["job_count"], told["state"]["job_no"]) == (2, 1)
        assert opened(told["current_image"]).format == "JPEG"
        assert client.get("progress?skip_current_image=true").json()["current_image"] is None
        assert client.post("interrupt").status_code == 200
        thread.join(5)
    assert service.cancelled == ["job1"]
    assert service.answers[0].status_code == 409


def test_progress_of_nothing(client):
    told = client.get("progress").json()
    assert (told["progress"], told["state"]["job_count"], told["current_image"]) == (0, 0, None)


def test_other_clients_jobs_are_not_interrupted(client, service):
    service.hold = True
    with client:
        client.portal.call(service.submit, form.asked({"prompt": "a"}, {}, "own", service.settings))
        client.post("interrupt")
        client.post("skip")
    assert service.cancelled == []


def test_an_interrupted_job_answers_what_is_finished(client, service):
    with client:
        thread = held(client, service, {"prompt": "a", "n_iter": 3, "seed": 1})
        view = service.views["job1"]
        service.views["job1"] = view.__class__(**{**vars(view), "images": [service._drawn(view, 0)]})
        client.post("interrupt")
        thread.join(5)
    (answer,) = service.answers
    assert answer.status_code == 200
    assert len(answer.json()["images"]) == 1
    assert "1 of 3" in answer.headers["X-Warning"]


def test_a_failed_job_is_an_error(client, service):
    service.error = {"message": "the device ran out of memory", "fields": []}
    answer = client.post("txt2img", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["detail"]) == (500, "the device ran out of memory")


# ---------------------------------------------------------------------- what clients look up


def test_lists_have_what_clients_read(client):
    samplers, schedules = client.get("samplers").json(), client.get("schedulers").json()
    assert [entry["name"] for entry in samplers][:3] == ["Euler", "Euler a", "Heun"]
    assert [entry["name"] for entry in schedules][:3] == ["automatic", "simple", "normal"]
    for kind, entries in {"sampler_name": samplers, "scheduler": schedules[1:]}.items():
        for name in (name for entry in entries for name in (entry["name"], *entry["aliases"])):
            assert "X-Warning" not in client.post("txt2img", json={"prompt": "a", kind: name}).headers
    assert [entry["name"] for entry in client.get("loras").json()] == ["style"]
    (model,) = client.get("sd-models").json()
    assert model["model_name"] == "fake"
    assert client.get("options").json()["sd_model_checkpoint"] == model["title"] == "fake [f00d]"
    assert [entry["name"] for entry in client.get("upscalers").json()] == ["Lanczos"]
    for empty in ("latent-upscale-modes", "sd-vae", "hypernetworks", "prompt-styles"):
        assert client.get(empty).json() == []
    assert client.get("embeddings").json() == {"loaded": {}, "skipped": {}}
    assert client.get("cmd-flags").json() == {}


@pytest.mark.parametrize("name", ["fake", "fake [f00d]", "fake.safetensors [f00d]", ""])
def test_the_loaded_model_may_be_chosen(client, name):
    assert client.post("options", json={"sd_model_checkpoint": name}).status_code == 200


def test_another_model_is_refused_by_name(client):
    answer = client.post("options", json={"sd_model_checkpoint": "other"})
    assert answer.status_code == 400
    assert "other" in answer.json()["detail"]
    assert "samples_save" in client.post("options", json={"samples_save": True}).headers["X-Warning"]


@pytest.mark.parametrize("image", ["", "AAAA", None, 7, "/etc/passwd"])
def test_settings_of_what_is_no_picture(client, image):
    answer = client.post("png-info", json={"image": image})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("image")


def test_a_huge_picture_is_not_decoded(tmp_path):
    """A few kilobytes that stand for many megabytes of pixels."""
    client = TestClient(app_of(form, FakeService(tmp_path, max_decoded=10_000)), base_url="http://testserver/sdapi/v1/")
    answer = client.post("png-info", json={"image": png(0, (300, 300), "L")})
    assert answer.status_code == 413
    assert "10,000 pixels" in answer.json()["detail"]


def test_a_picture_without_settings_has_none(client):
    assert client.post("png-info", json={"image": png()}).json() == {"info": "", "items": {}}


def test_translation_leaves_what_it_was_given():
    sent = {"prompt": "a", "seed": -1, "override_settings": {}}
    translated(sent, USUAL, "fake")
    assert sent == {"prompt": "a", "seed": -1, "override_settings": {}}
    with pytest.raises(RequestError):
        translated({"init_images": [1]}, USUAL, "fake")
