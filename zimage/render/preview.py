"""Previews of a picture while it is denoised, from its latents alone: sixteen channels to three colours by a matrix.

    factors = prefitted(pipe, folder)  # fitted on the loaded VAE, once; then read from the folder
    with Previews(factors, show) as previews:
        for event in pipe.run(request, hooks=[previews.hook]):
            previews.take(event)

`show` is called with each Preview, in a thread that the render never waits for.

**Factors.** A VAE's latents are close to colours in another basis, so that 16 → 3 factors and a bias show most of a
picture. They are fitted by least squares on the VAE itself, on two kinds of pairs: smooth random latents, decoded, and
smooth random pictures, encoded. Latents of the first kind go in all directions, those of the second lie where pictures
do. On eight renders of the demo the mean error to the decoded picture is 12.5 of 255 levels with both kinds, 14.0 and
12.9 with one alone, 11.2 with factors that are fitted on these renders themselves, and 63 for grey
(`pytest --full tests/test_preview.py`).

**The clean picture.** At noise level σ the latents are x = (1 − σ)·x₀ + σ·ε, and their velocity is v = ε − x₀, so that
x₀ = x − σ·v. That is what a preview shows, with x and v of the last evaluation in a step: whatever a sampler makes of v
and whatever noise it adds, the model's own estimate is clean. Cells that a mask keeps so far show the picture that a
render starts from. After the last step the latents are the picture.

Shapes: B images, C latent channels, h × w latents; previews are 2h × 2w pixels.
"""

import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from zimage import interrupts
from zimage.errors import CheckpointError, NonFiniteError
from zimage.events import Event
from zimage.flow import Start
from zimage.formats.atomic import beside
from zimage.formats.json_text import read_json
from zimage.loading.files import ModelFiles
from zimage.loading.memory import out_of_memory_in
from zimage.loading.registry import ROWS, VAE
from zimage.loading.residency import Residency
from zimage.pictures.image import to_pil
from zimage.render.denoising import Evaluate, Evaluation
from zimage.settings.plain import mistake

log = logging.getLogger("zimage")

SAMPLES, SIDE = 8, 16  # of each kind; latents of a side
LATENT_FALL, PICTURE_FALL = 1.5, 2.0  # how fast a random field's spectrum falls; pictures are about 2
SPREAD = 0.7  # of the pictures' mean colours, before they are bent into [−1, 1]
ENLARGED = 2
PAUSE = 0.05  # seconds
JPEG = {"quality": 90, "subsampling": 0}  # few pixels, each of which counts: coarser colours would double the error
FORMAT = "zimage-preview-1"  # factors that are fitted otherwise have another


@dataclass(frozen=True)
class Factors:
    """What turns latents into colours in [−1, 1]: a matrix of C rows of three, and a bias of three."""

    matrix: list[list[float]]
    bias: list[float]

    def draw(self, latents: Tensor | NDArray[np.float32]) -> Image.Image:
        """A picture of 2h × 2w pixels from latents (1, C, h, w) on the CPU."""
        values = np.asarray(latents, dtype=np.float32)[0]
        # Without BLAS, whose threads would get in the way of a render's.
        colours = np.einsum("chw,co->ohw", values, np.asarray(self.matrix, dtype=np.float32))
        colours += np.asarray(self.bias, dtype=np.float32)[:, None, None]
        (small,) = to_pil(torch.from_numpy(colours[None]))
        return small.resize((ENLARGED * small.width, ENLARGED * small.height), Image.Resampling.BILINEAR)


# ------------------------------------------------------------------ fitting


def fit(vae: Any, device: torch.device) -> Factors:
    """The factors of an autoencoder, AutoencoderKL or AutoencoderKLWan, on the device that it is on.

    The same ones each time, up to the device's rounding. Raises NonFiniteError for a damaged one.
    """
    return least_squares(*pairs(vae, device))


@torch.no_grad()
def pairs(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) and the mean colours of their cells (B, 3, h, w): SAMPLES decoded, then as many encoded."""
    generator, factor = torch.Generator("cpu").manual_seed(0), vae.spatial_factor
    latents = list(smooth(vae.config.latent_channels, SIDE, LATENT_FALL, generator).split(1))
    colours = SPREAD * torch.randn((SAMPLES, 3, 1, 1), generator=generator)
    pictures = torch.tanh(smooth(3, SIDE * factor, PICTURE_FALL, generator) + colours).split(1)
    drawn = [vae.decode(one.to(device)).cpu() for one in latents]
    latents += [vae.encode(one.to(device)).cpu() for one in pictures]
    return torch.cat(latents), F.avg_pool2d(torch.cat([*drawn, *pictures]), factor)


def least_squares(latents: Tensor, colours: Tensor) -> Factors:
    """The factors that come nearest to the colours (B, 3, h, w) of latents (B, C, h, w). Raises NonFiniteError."""
    x, y = _columns(latents), _columns(colours)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise NonFiniteError("the VAE makes NaN or infinity of smooth latents or pictures; it allows no previews")
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], dim=1).double(), y.double()).solution
    *matrix, bias = [[round(value, 6) for value in row] for row in solution.tolist()]
    return Factors(matrix, bias)


def smooth(channels: int, side: int, fall: float, generator: torch.Generator) -> Tensor:
    """Random fields (SAMPLES, channels, side, side) of unit variance, whose spectrum falls as 1 / frequency^fall."""
    rows, columns = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=1 / side)
    shape = (SAMPLES, channels, *frequency.shape)
    spectrum = torch.randn(shape, dtype=torch.complex64, generator=generator) / frequency**fall
    field = torch.fft.irfft2(spectrum, s=(side, side))
    return field / field.std((2, 3), keepdim=True)


def _columns(maps: Tensor) -> Tensor:
    """(B, C, h, w) → (B·h·w, C)."""
    return maps.float().permute(0, 2, 3, 1).flatten(0, 2)


# ------------------------------------------------------------------ factors that are kept


class Pipeline(Protocol):
    """What of a ZImage is needed here."""

    model: ModelFiles
    residency: Residency

    @property
    def vae(self) -> Any: ...


def prefitted(pipe: Pipeline, folder: Path) -> Factors:
    """The factors of a pipeline's VAE: read from `folder` if they are there, else fitted and kept there.

    To fit them, the VAE is loaded as for a render. A damaged file counts as none. Raises NonFiniteError or OutOfMemory.
    """
    checkpoint = pipe.model.components[VAE].checkpoint
    path = folder / f"preview-{checkpoint.fingerprint()}.json"
    known = _read(path, pipe.model.config(VAE).latent_channels)
    if known:
        return known
    with out_of_memory_in(ROWS[VAE].title):
        vae = pipe.vae
        with pipe.residency.hold(VAE):
            factors = fit(vae, pipe.residency.places[VAE].device)
    _keep(factors, path)
    return factors


def _read(path: Path, channels: int) -> Factors | None:
    if not path.exists():
        return None
    colour = tuple[float, float, float]
    kinds = {"format": str, "matrix": list[colour], "bias": colour}
    try:
        plain = read_json(path)
    except CheckpointError as error:
        log.warning("previews are fitted anew: %s", error)
        return None
    if mistake(plain, kinds, "factors") or plain["format"] != FORMAT or len(plain["matrix"]) != channels:
        log.warning("previews are fitted anew: %s holds no factors of this VAE", path)
        return None
    return Factors(plain["matrix"], plain["bias"])


def _keep(factors: Factors, path: Path) -> None:
    text = json.dumps({"format": FORMAT, "matrix": factors.matrix, "bias": factors.bias})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
    except OSError as error:
        log.warning("the factors of previews cannot be kept in %s: %s", path, error.strerror)


# ------------------------------------------------------------------ while a render runs


@dataclass(frozen=True)
class Preview:
    """A picture in the making: image `index` after `step` of `total` steps, as a JPEG of width × height pixels."""

    index: int
    step: int
    total: int
    jpeg: bytes
    width: int
    height: int


class _Seen(NamedTuple):
    """An evaluation of a render that began at `start`: x and v (1, C, h, w) of its first image, at noise level σ."""

    latents: Tensor
    velocity: Tensor
    sigma: float
    start: Start


class _Step(NamedTuple):
    """A step that is done, as its event tells, and its last evaluation; `ready`: a GPU's, when all of it is there."""

    event: Event
    seen: _Seen
    ready: torch.cuda.Event | None


class Previews:
    """The hook and the consumer of one render, whose events `take` gets; give the hook last.

    Of images that are denoised together the first is shown. Both passes of a render with `hires` are, and renders that
    start from a picture or go on from a state. If steps come faster than they are drawn, older ones are left out, and
    so are those that come within `pause` seconds of the one before: nobody sees them, and each takes the render a
    millisecond. The last is always drawn, before the block ends.
    """

    def __init__(self, factors: Factors, show: Callable[[Preview], None], pause: float = PAUSE):
        self._factors, self._show, self._pause, self._due = factors, show, pause, 0.0
        self._seen: _Seen | None = None
        self._waiting: _Step | None = None
        self._over = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._draw_all, name="previews", daemon=True)
        self._stream: torch.cuda.Stream | None = None

    def __enter__(self) -> "Previews":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with interrupts.held(), self._change:
            self._over = True
            self._change.notify()
        self._thread.join()

    def hook(self, evaluate: Evaluate) -> Evaluate:
        """Notes what a step evaluates, for the event that follows it."""

        def noted(e: Evaluation) -> Tensor:
            velocity = evaluate(e)
            self._seen = _Seen(e.latents[:1], velocity[:1], float(e.sigmas[e.step]), e.start)
            return velocity

        return noted

    def take(self, event: Event) -> None:
        """Have a step drawn, if this is the event of one."""
        if event.stage != "denoise" or event.latents is None or self._seen is None:
            return
        seen, self._seen, now = self._seen, None, time.monotonic()
        if event.step < event.total and now < self._due:
            return
        self._due = now + self._pause
        ready = _marked(event.latents.device)
        with self._change:
            self._waiting = _Step(event, seen, ready)
            self._change.notify()

    # ------------------------------------------------------------------ in the thread

    def _draw_all(self) -> None:
        try:
            while step := self._next():
                self._show(self._drawn(step))
        except Exception as error:  # whatever it is, the render goes on without previews
            log.warning("there are no further previews of this render: %s: %s", type(error).__name__, error)

    def _next(self) -> _Step | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._over)
            step, self._waiting = self._waiting, None
            return step

    def _drawn(self, step: _Step) -> Preview:
        picture = self._factors.draw(self._clean(step))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", **JPEG)
        event = step.event
        return Preview(event.index, event.step, event.total, stream.getvalue(), *picture.size)

    def _clean(self, step: _Step) -> NDArray[np.float32]:
        """The latents to show after a step (1, C, h, w)."""
        event, (latents, velocity, sigma, start), ready = step
        assert event.latents is not None, "a step that is done has latents"
        if event.step == event.total:
            return self._on_cpu(event.latents[:1], ready)
        estimate = self._on_cpu(latents, ready) - sigma * self._on_cpu(velocity, ready)
        if start.clean is None or start.begins is None:
            return estimate
        begun = self._on_cpu(start.begins, ready) < start.step + event.step
        return np.where(begun, estimate, self._on_cpu(start.clean[:1], ready))

    def _on_cpu(self, latents: Tensor, ready: torch.cuda.Event | None) -> NDArray[np.float32]:
        """A copy, on a stream of its own where there are streams: it neither waits for the next step nor stops it."""
        if ready is None:
            return latents.float().cpu().numpy()
        self._stream = self._stream or torch.cuda.Stream(latents.device)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return latents.float().cpu().numpy()


def _marked(device: torch.device) -> torch.cuda.Event | None:
    """On a GPU, what tells when all that it has been told so far is done."""
    if device.type != "cuda":
        return None
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(device))
    return ready
