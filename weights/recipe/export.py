"""Write the trained weights in the published folder layout (diffusers' ZImagePipeline), and read them back."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from zimage.vae import AutoencoderKL
from zimage.weights.recipe.captions import ADJECTIVES, known_words
from zimage.weights.recipe.objects import COLOUR_SYNONYMS, OBJECTS, PALETTE, SYNONYMS
from zimage.weights.recipe.sample import SHIFT, Painter
from zimage.weights.recipe.scenes import SIZE_WORDS
from zimage.weights.recipe.train_dit import BATCH, DIT_CONFIG, TEXT_CONFIG

MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.36.0",
    "num_train_timesteps": 1000,
    "shift": SHIFT,
    "use_dynamic_shifting": False,
}
FILES = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def export(work: Path, folder: Path) -> None:
    """Averaged weights in bf16, configs, tokenizer and vocabulary; `folder` is replaced in one go, its README kept."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    vae = torch.load(work / "vae_final.pt", weights_only=True)
    trained = torch.load(work / "dit.pt", weights_only=True)
    average = trained["average"]
    write_json(new / "model_index.json", MODEL_INDEX)
    write_json(new / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_component(new / "vae", vae["config"], vae["weights"])
    write_component(new / "transformer", DIT_CONFIG, part_of(average, "dit."))
    write_component(new / "text_encoder", TEXT_CONFIG, part_of(average, "text_encoder.model."))
    shutil.copytree(work / "tokenizer", new / "tokenizer")
    write_json(new / "vocabulary.json", vocabulary())
    vae_seconds = torch.load(work / "vae.pt", weights_only=True)["spent"]
    training = {"vae_minutes": vae_seconds / 60, "psnr": vae["psnr"]}
    training |= {"dit_minutes": trained["spent"] / 60, "dit_steps": trained["step"], "batch": BATCH}
    training["compute"] = trained["compute"]
    write_json(new / "training.json", training)
    for kept in ("README.md", "scores.json"):
        if (folder / kept).exists():
            shutil.copy(folder / kept, new / kept)
    replace_folder(new, folder)


def part_of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def write_component(folder: Path, config: dict, weights: dict[str, Tensor]) -> None:
    write_json(folder / "config.json", config)
    rounded = {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items()}
    file = folder / FILES[folder.name]
    save_file(rounded, file, metadata={"format": "pt"})
    file.chmod(0o644)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def replace_folder(new: Path, folder: Path) -> None:
    """Replace a folder by two renames: it may be missing for a moment, but is never incomplete."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def vocabulary() -> dict:
    """What the model knows, for hints on prompts it cannot draw."""
    return {
        "objects": list(OBJECTS),
        "colours": list(PALETTE),
        "sizes": {SIZE_WORDS[size]: list(words) for size, words in ADJECTIVES.items()},
        "synonyms": {word: name for group in (SYNONYMS, COLOUR_SYNONYMS) for name, ws in group.items() for word in ws},
        "words": known_words(),
    }


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[Painter, AutoencoderKL, Tokenizer]:
    """The exported models, ready for `sample.render`."""
    painter = Painter(read_json(folder / "text_encoder"), read_json(folder / "transformer"))
    painter.text_encoder.load_state_dict(load_file(folder / "text_encoder" / FILES["text_encoder"]))
    painter.dit.load_state_dict(load_file(folder / "transformer" / FILES["transformer"]))
    vae = AutoencoderKL.from_config(read_json(folder / "vae"))
    vae.load_state_dict(load_file(folder / "vae" / FILES["vae"]))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    return painter.to(dtype).eval(), vae.to(dtype).eval(), tokenizer


def read_json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())
