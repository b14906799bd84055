"""Write tests/goldens/*.safetensors from diffusers and transformers: `python tests/make_goldens.py`.

One file per model with its weights (`weights.…`, stored as bfloat16, in which they are exact), inputs and outputs.
"""

from pathlib import Path

import references
import torch
from safetensors.torch import save_file
from test_goldens import RUNS, SIGMAS
from tiny import DIT, QWEN, VOCAB
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
CAPTION_LENGTHS = (5, 41)  # padded to 32 and 64: learned pads in both, and masked batch padding in the first
LATENT_SIZE = (6, 10)  # 15 patches: 17 learned image pads


def write(name: str, model, tensors: dict[str, Tensor]) -> None:
    weights = {
        f"weights.{key}": value.bfloat16() for key, value in model.state_dict().items() if key != "lm_head.weight"
    }
    everything = {key: value.detach().contiguous() for key, value in {**weights, **tensors}.items()}
    versions = {"diffusers": references.diffusers.__version__, "transformers": references.transformers.__version__}
    save_file(everything, GOLDENS / f"{name}.safetensors", {**versions, "torch": torch.__version__})


def write_text_encoder() -> None:
    model = references.text_encoder(seed=1)
    ids = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(2))
    states = references.hidden_states(model, ids)
    assert len(states) == QWEN["num_hidden_layers"] + 1
    write("text_encoder", model, {"ids": ids, **{f"hidden.{i}": state for i, state in enumerate(states)}})


def write_dit() -> None:
    model = references.dit(seed=3)
    generator = torch.Generator().manual_seed(4)

    def captions() -> list[Tensor]:
        return [3 * torch.randn(length, DIT["cap_feat_dim"], generator=generator) for length in CAPTION_LENGTHS]

    latents = torch.randn(2, 16, *LATENT_SIZE, generator=generator)
    positive, negative = captions(), captions()[::-1]
    tensors = {"latents": latents}
    for i in range(2):
        tensors |= {f"caption.{i}": positive[i], f"negative.{i}": negative[i]}
    for sigma in SIGMAS:
        tensors[f"velocity.{sigma}"] = references.velocity(model, latents, torch.full((2,), sigma), positive)
    for name, settings in RUNS.items():
        against = negative if settings["guidance"] > 0 else None
        tensors[f"denoised.{name}"] = references.denoise(model, latents, positive, against, **settings)
    write("dit", model, tensors)


def write_vae(name: str, model) -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    latents = torch.randn(2, 16, 4, 6, generator=generator)
    outputs = {"encoded": references.encode(model, images), "decoded": references.decode(model, latents)}
    write(name, model, {"images": images, "latents": latents, **outputs})


if __name__ == "__main__":
    GOLDENS.mkdir(exist_ok=True)
    write_text_encoder()
    write_dit()
    write_vae("kl", references.kl(seed=6))
    write_vae("wan", references.wan(seed=7))
    print(f"{sum(file.stat().st_size for file in GOLDENS.iterdir()) / 1e6:.2f} MB in {GOLDENS}")
