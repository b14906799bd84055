"""What a worker does with texts to be encoded: a file in the form that was asked for, which the server sends as it is.

captions       for zimage on another machine: texts as they are formatted there, and the ids that they have there
hidden_states  for programs that speak POST /v1/hidden_states: JSON with float32
embeddings     for people: a prompt and settings of its text, as a file for `gen --embeddings`
sight          the same of a picture: what the vision model sees in it
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from zimage.captioner import Captioner
from zimage.errors import RequestError
from zimage.loading.registry import TEXT_ENCODER
from zimage.render.attached import open_picture
from zimage.render.conditioning import Text
from zimage.settings.captions import MAX_TEXT_TOKENS, TextSettings
from zimage.settings.fields import Plain, Weights
from zimage.text.embeddings import caption_hash, save_embeddings
from zimage.text.wire import dtype_name, ids_hash, packed, to_base64

Answer = dict[str, Plain]


def encode(pipe: Captioner, asked: Mapping[str, Plain], path: Path) -> Answer:
    """Write what `asked["form"]` names, embeddings by default, to `path` (.safetensors); the rest of `asked`:

    captions       texts: [{"text", "ids"}], layers, dtype
    hidden_states  input: [text, …], single, model, layer, max_length, encoding_format
    embeddings     prompt, text: fields of TextSettings
    sight          picture: path, settings: vision_text, vision_layer, vision_tokens

    Returns its path, and the tokens, shapes, dtype and hashes of the captions: of these two one each, else lists.
    Raises RequestError.
    """
    return FORMS[asked.get("form", "embeddings")](pipe, asked, path)


def _embeddings(pipe: Captioner, asked: Mapping[str, Plain], path: Path) -> Answer:
    settings = TextSettings.from_mapping(asked["text"])
    (caption,) = pipe.encode(asked["prompt"], **asked["text"])
    request = {"prompt": asked["prompt"], **pipe.texts.filled(settings).to_mapping()}
    save_embeddings(path, caption, request, pipe.captions_from.fingerprint)
    return _told_of_one(path, caption)


def _sight(pipe: Captioner, asked: Mapping[str, Plain], path: Path) -> Answer:
    picture, settings = open_picture(asked["picture"]), asked["settings"]
    caption = pipe.see(picture, **{name.removeprefix("vision_"): value for name, value in settings.items()})
    assert pipe.vision is not None
    save_embeddings(path, caption, {"reference": picture.hash, **settings}, pipe.vision.fingerprint)
    return _told_of_one(path, caption)


def _captions(pipe: Captioner, asked: Mapping[str, Plain], path: Path) -> Answer:
    """The bits that were computed, of texts that both sides read as the same tokens."""
    layers: Weights = TextSettings.check_one("layer_weights", asked["layers"])
    texts = _read(pipe, [one["text"] for one in asked["texts"]], layers, ("texts", "layers"))
    if (here := dtype_name(pipe.places[TEXT_ENCODER].dtype)) != asked["dtype"]:
        told = f"dtype: the text encoder here computes in {here}, not {asked['dtype']}"
        raise RequestError(f"{told}; set encoder_dtype there, or dtype here", fields=("dtype",))
    for text, one in zip(texts, asked["texts"], strict=True):
        if ids_hash(text.ids) != one["ids"]:
            told = f"the tokenizer here makes {len(text.ids)} other tokens of it; open the same model on both machines"
            raise RequestError(f"ids: {told}", fields=("ids",))
    captions = [pipe.caption(text) for text in texts]
    path.write_bytes(packed(captions, layers, pipe.captions_from.fingerprint))
    return _told(path, captions)


def _hidden_states(pipe: Captioner, asked: Mapping[str, Plain], path: Path) -> Answer:
    """Of a single text, or of several in lists. No token looks ahead, so the first ones stay as they are."""
    texts = _read(pipe, asked["input"], {asked["layer"]: 1.0}, ("input", "layer"))
    captions = [pipe.caption(text)[: asked["max_length"]] for text in texts]
    states = [to_base64(c) if asked["encoding_format"] == "base64" else c.float().tolist() for c in captions]
    told = _told(path, captions)
    answer = {"hidden_states": states, "shape": told["shape"]}
    if asked["single"]:
        answer = {name: value[0] for name, value in answer.items()}
    answer |= {"dtype": "float32", "layer": asked["layer"], "model": pipe.model.name}
    answer |= {"encoding_format": asked["encoding_format"], "fingerprint": pipe.captions_from.fingerprint}
    path.write_text(json.dumps(answer))
    return told


def _read(pipe: Captioner, formatted: Sequence[str], layers: Weights, fields: tuple[str, str]) -> list[Text]:
    """Texts as the text encoder here reads them; `fields` name texts and layers. Raises RequestError."""
    if TEXT_ENCODER not in pipe.places:
        raise RequestError("the text encoder of this server is on another machine; ask that one")
    for_texts, for_layers = fields
    with _naming(for_layers):
        pipe.texts.check_layers(layers)
    with _naming(for_texts):
        texts = [Text(one, pipe.texts.tokenize(one), layers) for one in formatted]
        if (tokens := sum(len(text.ids) for text in texts)) > MAX_TEXT_TOKENS:
            raise RequestError(f"they have {tokens:,} tokens together; they may have {MAX_TEXT_TOKENS:,}")
    return texts


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """Errors name the field as it is called here."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{field}: {error}", fields=(field,)) from None


def _told_of_one(path: Path, caption: Tensor) -> Answer:
    told = _told(path, [caption])
    return {**told, **{name: told[name][0] for name in ("tokens", "shape", "hash")}}


def _told(path: Path, captions: Sequence[Tensor]) -> Answer:
    return {
        "path": str(path),
        "tokens": [len(caption) for caption in captions],
        "shape": [list(caption.shape) for caption in captions],
        "dtype": dtype_name(captions[0].dtype),
        "hash": [caption_hash(caption) for caption in captions],
    }


FORMS: Mapping[str, Callable[[Captioner, Mapping[str, Plain], Path], Answer]] = {
    "captions": _captions,
    "hidden_states": _hidden_states,
    "embeddings": _embeddings,
    "sight": _sight,
}
