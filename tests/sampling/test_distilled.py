"""Adapters that ask for other defaults: recognised or not, where they rank, what is said; TwinFlow is refused."""

import json
import shutil
from pathlib import Path

import lora_files
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zimage
from zimage.cli import main
from zimage.errors import CheckpointError
from zimage.formats.lora_known import known_adapter
from zimage.render.defaults import adapters_told
from zimage.settings.presets import BASE, TURBO

DISTILL = "Z-Image-Fun-Lora-Distill-8-Steps-2603.safetensors"


def written(file: Path, **metadata: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    lora_files.write(file, lora_files.NAMINGS["kohya"](lora_files.factors([lora_files.ONE])))
    if metadata:
        save_file(load_file(file), file, metadata=metadata)
    return file


@pytest.fixture
def of_kind(tiny_folder, monkeypatch):
    def call(kind, *loras):
        pipe = zimage.ZImage.load(tiny_folder, device="cpu", dtype="fp32", lora=list(map(str, loras)) or None)
        monkeypatch.setattr(pipe.model, "shift", {TURBO: 3.0, BASE: 6.0}[kind])
        return pipe

    return call


def told(pipe, **settings):
    job = pipe.prepare(zimage.Request("a cat", **settings))
    return job.request.steps, job.request.guidance, job.loras[0].scale, adapters_told(job.loras, pipe.model)


# ------------------------------------------------------------------ recognised


@pytest.mark.parametrize(
    ("name", "kind", "scale", "asks"),
    [
        (DISTILL, BASE, 0.8, {"steps": 8, "guidance": 0.0}),
        ("Z-Image-Fun-Lora-Distill-8-Steps_ComfyUI.safetensors", BASE, 0.8, {"steps": 8, "guidance": 0.0}),
        ("Z-Image-Fun-Lora-Distill-4-Steps-2602-ComfyUI.safetensors", BASE, 0.8, {"steps": 4, "guidance": 0.0}),
        ("z_image_fun_lora_distill_2_steps.safetensors", BASE, 0.8, {"steps": 2, "guidance": 0.0}),
        ("z_image_turbo_distill_patch_lora_bf16.safetensors", TURBO, 1.0, {"steps": 8, "guidance": 0.0}),
        ("Z-Image-Turbo-DistillPatch/model.safetensors", TURBO, 1.0, {"steps": 8, "guidance": 0.0}),
        (
            "models--DiffSynth-Studio--Z-Image-Turbo-DistillPatch/snapshots/0a1b/model.safetensors",
            *(TURBO, 1.0, {"steps": 8, "guidance": 0.0}),
        ),
        ("zit_sda_v1.safetensors", TURBO, 0.6, {}),
        ("z-image-turbo-sda.safetensors", TURBO, 0.6, {}),
    ],
)
def test_published_files_are_recognised(name, kind, scale, asks):
    known = known_adapter(Path(name), {})
    assert (known.kind, known.scale, known.asks) == (kind, scale, asks)


@pytest.mark.parametrize(
    "name",
    [
        "style.safetensors",
        "model.safetensors",
        "Z-Image-Turbo-DistillPatch/style.safetensors",
        "zimage_turbo_training_adapter_v2.safetensors",
        "Z-Image-Fun-Lora-Distill.safetensors",
        "zit_sdance.safetensors",
        "position_sda.safetensors",
    ],
)
def test_others_are_not(name):
    assert known_adapter(Path(name), {"format": "pt", "ss_base_model_name": "z-image-turbo-sda"}) is None


def test_a_renamed_file_is_recognised_by_its_titles():
    assert (
        known_adapter(Path("fast.safetensors"), {"modelspec.title": "Z-Image Fun Lora Distill 4 Steps"}).asks["steps"]
        == 4
    )
    assert known_adapter(Path("more.safetensors"), {"ss_output_name": "zit_sda_v1"}).scale == 0.6


# ------------------------------------------------------------------ what they ask for


def test_a_distilled_adapter_gives_defaults(of_kind, tmp_path):
    pipe = of_kind(BASE, written(tmp_path / DISTILL))
    line = f"lora {DISTILL} is Z-Image-Fun-Lora-Distill: 8 steps, guidance 0, scale 0.8, unless set otherwise"
    assert told(pipe) == (8, 0.0, 0.8, [line])
    assert told(pipe, steps=5, guidance=1.0)[:3] == (5, 1.0, 0.8)
    assert told(pipe, preset="diffusers")[:3] == (50, 4.0, 0.8)
    pipe.lora.set(pipe.lora.list()[0].handle, 0.0)
    assert told(pipe) == (30, 4.0, 0.0, [])


def test_a_scale_that_is_given_stays(of_kind, tmp_path):
    pipe = of_kind(BASE, f"{written(tmp_path / DISTILL)}:0.7")
    assert told(pipe)[:3] == (8, 0.0, 0.7)
    assert pipe.lora.adapter(tmp_path / DISTILL, 1.0).scale == 1.0
    assert pipe.lora.adapter(tmp_path / DISTILL).scale == 0.8
    assert pipe.lora.adapter(written(tmp_path / "style.safetensors")).scale == 1.0


def test_on_another_kind_of_checkpoint_it_changes_nothing_but_its_scale(of_kind, tmp_path):
    pipe = of_kind(BASE, written(tmp_path / "zit_sda_v1.safetensors"))
    line = "lora zit_sda_v1.safetensors is Z-Image-Turbo-SDA, made for Turbo, and this checkpoint is Base"
    assert told(pipe) == (30, 4.0, 0.6, [line])
    turbo = of_kind(TURBO, tmp_path / "zit_sda_v1.safetensors")
    assert told(turbo)[:3] == (8, 0.0, 0.6)


def test_a_job_on_its_way_keeps_what_was_decided(of_kind, tmp_path):
    pipe = of_kind(BASE, written(tmp_path / DISTILL))
    job = pipe.prepare(zimage.Request("a cat", seed=1))
    again = pipe.checked(zimage.Job.from_dict(json.loads(json.dumps(job.to_dict()))))
    assert (again.request.steps, again.loras[0].scale, again.sigmas) == (8, 0.8, job.sigmas)


def test_gen_says_so_and_the_picture_knows(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "Z-Image-Turbo-DistillPatch" / "model.safetensors")
    model = ["--model", str(tiny_folder), "--device", "cpu", "--dtype", "fp32", "--width", "64", "--height", "48"]
    lora = ["--lora", "Z-Image-Turbo-DistillPatch"]
    assert main(["gen", "a cat", "--seed", "1", "-o", "one.png", *model, *lora]) == 0
    said = capsys.readouterr().err
    assert "lora model.safetensors is Z-Image-Turbo-DistillPatch: 8 steps, guidance 0, scale 1, unless" in said
    with Image.open("one.png") as picture:
        assert json.loads(picture.info["zimage"])["lora"][0]["scale"] == 1.0
    assert main(["info", *model[1:6], *lora]) == 0
    assert "recognised    lora model.safetensors is Z-Image-Turbo-DistillPatch" in capsys.readouterr().out


def test_a_server_notes_it(tiny_folder, tmp_path):
    from zimage.serve.drawing import Studio

    path = written(tmp_path / "zit_sda_v1.safetensors")
    loading = {"model": str(tiny_folder), "device": "cpu", "dtype": "fp32"}
    studio = Studio({"loading": loading, "encoder_only": False, "previews": False, "data": str(tmp_path)}, print)
    asked = {"op": "prepare", "id": "x", "values": {"prompt": "a cat"}, "rewrite": None}
    lora = [{"name": path.name, "scale": None, "path": str(path)}]
    answer = studio.answer({**asked, "lora": lora}, idle=True)
    assert answer["request"]["lora"] == ["zit_sda_v1.safetensors:0.6"]
    assert answer["said"] == ["lora zit_sda_v1.safetensors is Z-Image-Turbo-SDA: scale 0.6, unless set otherwise"]
    assert studio.answer({**asked, "lora": [{**lora[0], "scale": 0.5}]}, idle=True)["request"]["lora"] == [
        "zit_sda_v1.safetensors:0.5"
    ]


# ------------------------------------------------------------------ TwinFlow


@pytest.mark.parametrize("name", ["t_embedder_2.mlp.0", "lora_unet_t_embedder_2_mlp_0"])
def test_an_adapter_of_twinflow_is_refused_by_name(pipe, tmp_path, name):
    down, up = (".lora_down.weight", ".lora_up.weight") if "unet" in name else (".lora_A.weight", ".lora_B.weight")
    tensors = lora_files.NAMINGS["kohya"](lora_files.factors([lora_files.ONE]))
    lora_files.write(
        tmp_path / "twin.safetensors", tensors | {name + down: torch.ones(1, 2), name + up: torch.ones(2, 1)}
    )
    with pytest.raises(CheckpointError, match="it is TwinFlow, which has a second time embedder") as caught:
        pipe.lora.add(tmp_path / "twin.safetensors")
    assert "not implemented" in str(caught.value)


def test_a_checkpoint_of_twinflow_is_refused_by_name(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "twin")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    second = {
        f"t_embedder_2{key.removeprefix('t_embedder')}": x.clone() for key, x in tensors.items() if "t_embedder" in key
    }
    assert second
    save_file(tensors | second, weights)
    with pytest.raises(CheckpointError, match=r"it is TwinFlow's, which has a second time embedder \(t_embedder_2"):
        zimage.ZImage.load(folder, device="cpu", dtype="fp32")
