"""The DiT with ControlNets in the publisher's flow, in float64 and from the equations of its blocks; one image.

a  = x + tanh(g_a) · norm(W_o · attention(norm(x) · (1 + s_a)))        with g and s from the time embedding
x' = a + tanh(g_f) · norm(W_2 · (silu(W_1·f) · W_3·f)),  f = norm(a) · (1 + s_f)

along the noise refiner (refined blocks R_k, image tokens alone):
    form 1.0:       c ← R_1(R_0(c))
    the others:     c ← before(c) + x;   c ← R_k(c);   x ← layer_k(x) + scale · after_k(c)   (k = 0, 1)
along the joint layers:
    c ← before([c, caption]) + [x, caption];   at place p_k:   c ← B_k(c);   x ← layer(x) + scale · after_k(c)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Given(NamedTuple):
    """A ControlNet: its config, weights, control latents (C, h, w), and the scale of its hints."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    latents: Tensor
    scale: float


class Formula:
    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor]):
        self.config, self.weights = config, {key: value.double() for key, value in weights.items()}

    def velocity(self, latents: Tensor, sigma: float, caption: Tensor, controls: Sequence[Given] = ()) -> Tensor:
        """Of latents (C, h, w) and a caption (L, width): −model, (C, h, w)."""
        w, (_, rows, columns) = self.weights, latents.shape
        time = self._time(sigma)
        text, text_turn, place = self._text(caption)
        grid = [(place, y, x) for y in range(rows // 2) for x in range(columns // 2)]
        x = self._padded(_linear(w, "all_x_embedder.2-1", _patches(latents.double())), w["x_pad_token"])
        turn = self._turn(grid + [(0, 0, 0)] * (len(x) - len(grid)))

        streams = [_Stream(self, given) for given in controls]
        for stream in streams:
            stream.begin_refining(x, turn, time)
        for i in range(self.config["n_refiner_layers"]):
            x = self._block(w, f"noise_refiner.{i}", x, turn, time)
            x = x + sum(stream.refiner_hints.get(i, 0) for stream in streams)
        x, turn = torch.cat((x, text)), torch.cat((turn, text_turn))
        for stream in streams:
            stream.begin_joint(x, text, turn, time)
        for i in range(self.config["n_layers"]):
            x = self._block(w, f"layers.{i}", x, turn, time)
            x = x + sum(stream.hints.get(i, 0) for stream in streams)

        scale = 1 + _linear(w, "all_final_layer.2-1.adaLN_modulation.1", F.silu(time))
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale
        patches = _linear(w, "all_final_layer.2-1.linear", x)[: len(grid)]
        return -patches.view(rows // 2, columns // 2, 2, 2, -1).permute(4, 0, 2, 1, 3).reshape(latents.shape)

    def _text(self, caption: Tensor) -> tuple[Tensor, Tensor, int]:
        """Refined tokens of a caption, their rotations, and the place of the image behind them."""
        text = self._padded(self._caption(caption), self.weights["cap_pad_token"])
        turn = self._turn([(1 + i, 0, 0) for i in range(len(text))])
        for i in range(self.config["n_refiner_layers"]):
            text = self._block(self.weights, f"context_refiner.{i}", text, turn, None)
        return text, turn, len(text) + 1

    def _time(self, sigma: float) -> Tensor:
        angle = (1 - sigma) * self.config["t_scale"] * 10_000.0 ** (-torch.arange(128).double() / 128)
        wave = torch.cat((angle.cos(), angle.sin()))
        return _linear(self.weights, "t_embedder.mlp.2", F.silu(_linear(self.weights, "t_embedder.mlp.0", wave)))

    def _caption(self, caption: Tensor) -> Tensor:
        normed = self._norm(caption.double(), self.weights["cap_embedder.0.weight"])
        return _linear(self.weights, "cap_embedder.1", normed)

    def _padded(self, tokens: Tensor, pad: Tensor) -> Tensor:
        return torch.cat((tokens, pad.expand(-len(tokens) % 32, -1)))

    def _turn(self, positions: Sequence[tuple[int, ...]]) -> Tensor:
        """Complex rotations (L, 1, D/2)."""
        angles = []
        for axis, size in zip(zip(*positions, strict=True), self.config["axes_dims"], strict=True):
            frequencies = self.config["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
            angles.append(torch.tensor(axis).double()[:, None] * frequencies)
        angle = torch.cat(angles, dim=-1)[:, None]
        return torch.polar(torch.ones_like(angle), angle)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config["norm_eps"]).sqrt() * weight

    def _block(self, w: Mapping[str, Tensor], name: str, x: Tensor, turn: Tensor, time: Tensor | None) -> Tensor:
        scale_a = gate_a = scale_f = gate_f = torch.ones((), dtype=torch.float64)
        if time is not None:
            scale_a, gate_a, scale_f, gate_f = _linear(w, f"{name}.adaLN_modulation.0", time).chunk(4)
            scale_a, gate_a, scale_f, gate_f = 1 + scale_a, gate_a.tanh(), 1 + scale_f, gate_f.tanh()
        attended = self._attention(
            w, f"{name}.attention", self._norm(x, w[f"{name}.attention_norm1.weight"]) * scale_a, turn
        )
        x = x + gate_a * self._norm(attended, w[f"{name}.attention_norm2.weight"])
        f = self._norm(x, w[f"{name}.ffn_norm1.weight"]) * scale_f
        w1, w2, w3 = (w[f"{name}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
        return x + gate_f * self._norm((F.silu(f @ w1.T) * (f @ w3.T)) @ w2.T, w[f"{name}.ffn_norm2.weight"])

    def _attention(self, w: Mapping[str, Tensor], name: str, x: Tensor, turn: Tensor) -> Tensor:
        heads = self.config["n_heads"]
        q, k, v = ((x @ w[f"{name}.to_{part}.weight"].T).unflatten(-1, (heads, -1)) for part in "qkv")
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(self._norm(y, w[f"{name}.norm_{part}.weight"]).unflatten(-1, (-1, 2))) * turn
            ).flatten(-2)
            for y, part in ((q, "q"), (k, "k"))
        )
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1) @ w[f"{name}.to_out.0.weight"].T


class _Stream:
    """A control's c, and all of its hints by their places."""

    def __init__(self, formula: Formula, given: Given):
        self.formula, self.given = formula, given
        self.w = {key: value.double() for key, value in given.weights.items()}

    def begin_refining(self, x: Tensor, turn: Tensor, time: Tensor) -> None:
        tokens = _linear(self.w, "control_all_x_embedder.2-1", _patches(self.given.latents.double()))
        self.c = self.formula._padded(tokens, self.formula.weights["x_pad_token"])
        config = self.given.config
        form = config["add_control_noise_refiner"]
        if form is None:
            self.refiner_hints = {}
            for i in range(config["n_refiner_layers"]):
                self.c = self.formula._block(self.w, f"control_noise_refiner.{i}", self.c, turn, time)
        else:
            count = len(config["control_layers_places"]) if form == "control_layers" else config["n_refiner_layers"]
            hints = self._hints(form, count, x, turn, time)
            self.refiner_hints = dict(zip(config["control_refiner_layers_places"], hints, strict=False))

    def begin_joint(self, x: Tensor, text: Tensor, turn: Tensor, time: Tensor) -> None:
        places, self.c = self.given.config["control_layers_places"], torch.cat((self.c, text))
        self.hints = dict(zip(places, self._hints("control_layers", len(places), x, turn, time), strict=True))

    def _hints(self, group: str, count: int, x: Tensor, turn: Tensor, time: Tensor) -> list[Tensor]:
        self.c, hints = _linear(self.w, f"{group}.0.before_proj", self.c) + x, []
        for i in range(count):
            self.c = self.formula._block(self.w, f"{group}.{i}", self.c, turn, time)
            hints.append(self.given.scale * _linear(self.w, f"{group}.{i}.after_proj", self.c))
        return hints


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _patches(latents: Tensor) -> Tensor:
    """(C, h, w) → (h/2 · w/2, 4·C), channels fastest."""
    C, h, w = latents.shape
    return latents.view(C, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).reshape(-1, 4 * C)
