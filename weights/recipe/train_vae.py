"""Train the autoencoder on crops of scenes. Its latents' mean and deviation become `shift_factor`, `scaling_factor`."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage.vae import AutoencoderKL
from zimage.weights.recipe.muon import optimisers
from zimage.weights.recipe.scenes import SIDE, Scene, draw, random_pair, sheet, single_scenes
from zimage.weights.recipe.training import Average, Run, set_learning_rates, update, warmup_then_linear

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.36.0",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": SIDE,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
CROP = 64  # px; whole pictures cost four times as much and are needed only for the global norms and attention
WHOLE_SHARE = 0.2
BATCH = 8
KL_WEIGHT = 5e-4
RATES = (4e-3, 2e-3)  # of Muon and AdamW


def random_scene(rng: random.Random, singles: list[Scene]) -> Scene:
    return rng.choice(singles) if rng.random() < 0.5 else random_pair(rng)


def batch(rng: random.Random, singles: list[Scene]) -> Tensor:
    """Whole pictures or crops on the token grid, (2, 3, 128, 128) or (8, 3, 64, 64)."""
    if rng.random() < WHOLE_SHARE:
        return torch.stack([draw(random_scene(rng, singles)) for _ in range(BATCH // 4)])
    return torch.stack([random_crop(rng, draw(random_scene(rng, singles))) for _ in range(BATCH)])


def random_crop(rng: random.Random, picture: Tensor) -> Tensor:
    y, x = (16 * rng.randint(0, (SIDE - CROP) // 16) for _ in range(2))
    return picture[:, y : y + CROP, x : x + CROP]


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences: keeps edges sharp."""
    d = a - b
    return d.diff(dim=2).abs().mean() + d.diff(dim=3).abs().mean()


def loss_of(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """The training loss and the plain mean squared error."""
    mean, logvar = vae.moments(images)
    logvar = logvar.clamp(-20, 10)
    sample = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    out = vae.decoder(sample)
    mse = F.mse_loss(out, images)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(out, images) + 0.5 * gradient_l1(out, images) + mse + KL_WEIGHT * kl, mse.detach()


def train_vae(work: Path, minutes: float, seed: int = 0) -> None:
    """Train for `minutes` of work and leave `vae.pt`; a second call goes on where the first stopped."""
    torch.manual_seed(seed)
    run = Run(work, "vae", minutes)
    vae = AutoencoderKL.from_config(VAE_CONFIG)
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch declares only its other forms
    opts = optimisers(vae)
    average = Average(vae, 0.998)
    if states := run.resume():
        vae.load_state_dict(states["model"])
        average.weights = states["average"]
        for opt, state in zip(opts, states["optimisers"], strict=True):
            opt.load_state_dict(state)
    rng, singles = random.Random(seed + run.step), single_scenes()
    while run.progress < 1:
        set_learning_rates(opts, RATES, warmup_then_linear(run.progress, run.step))
        loss, mse = loss_of(vae, batch(rng, singles))
        update(vae, loss, opts)
        average.update(vae, run.step)
        run.tick()
        if run.step % 100 == 0:
            run.log(f"loss {loss.item():.4f}  psnr {psnr(mse).item():.2f} dB")
        if run.step % 500 == 0:
            save(run, vae, average, opts)
    save(run, vae, average, opts)
    finish(work, average.weights)


def save(run: Run, vae: AutoencoderKL, average: Average, opts: list[torch.optim.Optimizer]) -> None:
    run.save(model=vae.state_dict(), average=average.weights, optimisers=[opt.state_dict() for opt in opts])


def psnr(mse: Tensor) -> Tensor:
    """Of pictures in [−1, 1]."""
    return 10 * torch.log10(4 / mse)


@torch.no_grad()
def finish(work: Path, weights: dict[str, Tensor], count: int = 256) -> None:
    """Measure the averaged weights on unseen draws, write the latents' statistics and a sheet of reconstructions."""
    vae = AutoencoderKL.from_config(VAE_CONFIG)
    vae.load_state_dict(weights)
    rng, singles = random.Random(1), single_scenes()
    images = torch.stack([draw(random_scene(rng, singles)) for _ in range(count)])
    latents = torch.cat([vae.encode(part) for part in images.split(16)])
    out = torch.cat([vae.decode(part) for part in latents.split(16)])
    quality = psnr((out - images).square().mean(dim=(1, 2, 3)))
    config = VAE_CONFIG | {"scaling_factor": 1 / latents.std().item(), "shift_factor": latents.mean().item()}
    figures = f"PSNR {quality.mean():.1f} dB on average, {quality.min():.1f} dB at worst, over {count} scenes"
    torch.save({"config": config, "weights": weights, "psnr": figures}, work / "vae_final.pt")
    pairs = [p for i in range(24) for p in (images[i], out[i])]
    sheet(pairs).save(work / "vae.png")
    print(f"{figures}; scaling {config['scaling_factor']:.4f}")
