"""The text encoder on another machine, instead of the local one.

    text, hash of its ids, layers, dtype ─ POST /api/captions ─→ safetensors ─ checked ─→ caption (L, C)

Prompts go to the configured server and nowhere else. Each call ends within its time-out, whatever the server does, and
each fault is one line that names it. Captions of another model, layer, dtype, width or length are refused: they would
draw another picture without a word.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from zimage.errors import CheckpointError, RequestError
from zimage.formats.json_text import json_object
from zimage.loading.devices import Place, choose_dtype
from zimage.loading.files import ModelFiles
from zimage.loading.plan import MemoryPlan
from zimage.loading.registry import DIT, TEXT_ENCODER
from zimage.render.conditioning import Text
from zimage.settings.captions import LONGEST_TEXT
from zimage.settings.environment import ENCODER_TOKEN, encoder_token
from zimage.settings.fields import Plain, as_plain, check_text
from zimage.settings.loading import LoadSettings
from zimage.settings.rewriting import RewriteSettings
from zimage.text.remote import MAX_ANSWER, Call, checked_url, endpoint
from zimage.text.wire import ROOM, Wanted, dtype_name, hidden_states, ids_hash, unpacked

CAPTIONS, HIDDEN_STATES, REWRITE = "/api/captions", "/v1/hidden_states", "/api/rewrite"
LOCAL = ("rewriter_url", "rewriter_model", "rewriter_timeout")  # settings of rewriting that are not the server's


class RemoteEncoder:
    """The text encoder behind `encoder_url`; `dtype` is what it has to compute in.

    `fingerprint` is that of the model's own text encoder, "" where its weights are not here: then it is the server's,
    once that has answered, and another one later on is refused. Raises RequestError for settings that cannot be used.
    """

    component = ""

    def __init__(self, model: ModelFiles, dtype: torch.dtype, settings: LoadSettings):
        self._settings, self._dtype, self._width = settings, dtype, model.config(DIT).cap_feat_dim
        self._own = own = model.components.get(TEXT_ENCODER)
        self.fingerprint = own.checkpoint.fingerprint() if own else ""
        self._plain = settings.encoder_form == "hidden_states"
        self._url = _checked(settings.encoder_url)

    @classmethod
    def of(cls, model: ModelFiles, place: Place, settings: LoadSettings) -> "RemoteEncoder | None":
        """The one that the settings ask for, if they do; `place` is the DiT's."""
        if not settings.encoder_url:
            return None
        return cls(model, choose_dtype(settings.encoder_dtype or place.dtype, place.device), settings)

    @property
    def is_verified(self) -> bool:
        """Whether it is sure beforehand that captions are of a known text encoder, so that a disk may keep them."""
        return self._own is not None and not self._plain

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """What tells its captions from local ones, and from those of other servers."""
        known = self.fingerprint if self.is_verified else ""
        form, name = self._settings.encoder_form, self._settings.encoder_model
        return {"encoder": known, "dtype": str(self._dtype), "server": self._url, "form": form, "model": name}

    def known(self, text: Text) -> Tensor | None:
        return None

    def encode(self, text: Text, plan: MemoryPlan) -> Tensor:
        """Raises RemoteError, and RequestError for a blend of layers where the server sends one."""
        wanted = Wanted((len(text.ids),), self._width, text.layers, self._dtype, self.fingerprint)
        return self._hidden_states(text, wanted) if self._plain else self._captions(text, wanted)

    def rewrite(self, prompt: str, settings: RewriteSettings, seed: int, rewriter: str) -> tuple[str, str]:
        """A prompt rewritten there, and the thoughts. Raises RemoteError, and RequestError where only encoding is."""
        if self._plain:
            error = "rewriter: a server of hidden_states does not rewrite; pass a rewriter_url"
            raise RequestError(error, fields=("rewriter", "rewriter_url"))
        own = {name: value for name, value in settings.to_mapping().items() if name not in LOCAL}
        call = self._call(REWRITE, settings.rewriter_timeout, MAX_ANSWER)
        body = call.accepted({**own, "prompt": prompt, "rewriter": rewriter, "rewrite_seed": seed}).body
        try:
            answer = json_object("the answer", body, MAX_ANSWER)
            written, thinking = (_text(name, answer.get(name)) for name in ("prompt", "thinking"))
        except (CheckpointError, RequestError):
            written = ""
        if not written:
            raise call.error("answered with something other than a rewritten prompt")
        return written, thinking

    def _captions(self, text: Text, wanted: Wanted) -> Tensor:
        call = self._call(CAPTIONS, self._settings.encoder_timeout, wanted.values * wanted.dtype.itemsize + ROOM)
        asked: dict[str, Plain] = {"texts": [{"text": text.formatted, "ids": ids_hash(text.ids)}]}
        answer = call.accepted({**asked, "layers": as_plain(text.layers), "dtype": dtype_name(wanted.dtype)})
        try:
            (caption,), self.fingerprint = unpacked(answer.body, wanted)
        except CheckpointError as error:
            raise call.error(str(error)) from None
        return caption

    def _hidden_states(self, text: Text, wanted: Wanted) -> Tensor:
        """`max_length` has room for one token more, so that a longer text shows."""
        if len(text.layers) > 1:
            error = "layer_weights: a server of hidden_states sends one layer; pass a hidden_layer"
            raise RequestError(error, fields=("layer_weights", "encoder_form"))
        limit = 6 * wanted.values + ROOM  # base64 of four bytes each
        call = self._call(HIDDEN_STATES, self._settings.encoder_timeout, limit)
        (layer,), length = wanted.layers, len(text.ids) + 1
        asked = {"input": text.formatted, "model": self._settings.encoder_model, "layer": layer, "max_length": length}
        answer = call.accepted({**asked, "encoding_format": "base64"})
        try:
            return hidden_states(answer.body, wanted, limit)
        except CheckpointError as error:
            raise call.error(str(error)) from None

    def _call(self, path: str, timeout: float, limit: int) -> Call:
        return Call(endpoint(self._url, path), encoder_token(), timeout, limit, ENCODER_TOKEN)


def _text(name: str, value: Plain) -> str:
    """Raises RequestError for what is not text, or endless."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is not text", fields=(name,))
    check_text(name, value, LONGEST_TEXT)
    return value


def _checked(url: str | None) -> str:
    try:
        return checked_url(url or "")
    except RequestError as error:
        raise RequestError(f"encoder_url: {error}", fields=("encoder_url",)) from None
