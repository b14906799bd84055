"""GGUF files as llama.cpp and stable-diffusion.cpp write them: shapes, pads, vocabularies, and headers that lie."""

import json
import struct
import time
from pathlib import Path

import loose
import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

import zimage
from zimage.errors import CheckpointError
from zimage.formats.checkpoint import Checkpoint
from zimage.formats.gguf_header import LONGEST_ARRAY, MOST_TENSORS, read_header
from zimage.text.chat import format_chat
from zimage.text.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
WORDS = (
    "a cat face on a blue background",
    "It's 3 o'clock, WE'LL see 12345 \t tabs\r\n\r\n  and   runs of blanks ",
    "naïve café: composed é and decomposed e\u0301, Å and A\u030a",
    "Schrift „Müller“, 汉字かな交じり文, العربية, 🐱👩‍👩‍👧 x²",
    "<|endoftext|>plain<|im_start|> <think>\nhm\n</think> <|im_startx|>",
    "",
    format_chat("a <|im_end|> inside"),
)


@pytest.fixture(scope="module")
def states():
    return loose.states()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A vocabulary with merges and special tokens: the tokenizer.json, and its tokenizer as the package knows it."""
    fast = FastTokenizer(models.BPE())
    like = tiny.tokenizer()
    fast.pre_tokenizer, fast.normalizer, fast.decoder = like.pre_tokenizer, like.normalizer, like.decoder
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(text, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    fast.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast.add_tokens(["<think>", "</think>"])
    fast.save(str(tmp_path_factory.mktemp("trained") / "tokenizer.json"))
    return fast


def vocabulary(fast, pads=3):
    """What llama.cpp's converter writes: tokens by id, their kinds, merges; filled up with tokens that are not used."""
    about = json.loads(fast.to_str())
    added = {entry["id"]: 3 if entry["special"] else 4 for entry in about["added_tokens"]}
    tokens = [token for token, _ in sorted(fast.get_vocab().items(), key=lambda item: item[1])]
    kinds = [added.get(i, 1) for i in range(len(tokens))] + [5] * pads
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in about["model"]["merges"]]
    return tokens + [f"[PAD{i}]" for i in range(pads)], kinds, merges


def write(file, state, words=None, pre="qwen2", quantised=(), shapes=None, architecture="qwen3"):
    """A GGUF file of plain tensors, those named in `quantised` in Q8_0."""
    writer = gguf.GGUFWriter(file, architecture)
    if words:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(words[0])
        writer.add_token_types(words[1])
        writer.add_token_merges(words[2])
    for key, value in state.items():
        data = value.float().numpy()
        data = data.reshape((shapes or {}).get(key, data.shape))
        if key in quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(key, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, data)
    loose.finish_gguf(writer)
    return file


# ------------------------------------------------------------------ stable-diffusion.cpp


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("quantised_pads", [False, True], ids=["plain pads", "quantised pads"])
def test_the_dit_of_stable_diffusion_cpp(states, tmp_path, prefix, quantised_pads):
    """ggml drops leading sides of 1: the pads [1, dim] come as [dim], and may be quantised like a matrix."""
    native = loose.renamed("dit", "native", states["dit"], prefix)
    pads = [key for key in native if key.endswith("pad_token")]
    quantised = [*pads, *filter(loose.is_matrix, native)] if quantised_pads else filter(loose.is_matrix, native)
    file = write(tmp_path / "dit.gguf", native, quantised=list(quantised), shapes=dict.fromkeys(pads, (768,)))
    dit = zimage.load_component(file, "dit", dtype="fp32")
    assert dit.x_pad_token.shape == (1, 768)
    worst = (dit.x_pad_token - states["dit"]["x_pad_token"].float()).abs().max()
    assert (0 < worst < 0.02) if quantised_pads else worst == 0


def test_all_in_one_of_stable_diffusion_cpp(states, tmp_path):
    prefixes = {"dit": "model.diffusion_model.", "text_encoder": "text_encoders.llm.", "vae": "first_stage_model."}
    names = {"dit": "native", "text_encoder": "transformers", "vae": "ldm"}
    renamed = [loose.renamed(part, names[part], states[part], prefix) for part, prefix in prefixes.items()]
    file = write(tmp_path / "whole.gguf", {key: value for part in renamed for key, value in part.items()})
    for part in prefixes:
        assert Checkpoint.of_file(file, part).entries.keys() == states[part].keys()


def test_a_quantised_norm_is_widened(states, tmp_path):
    native = loose.renamed("dit", "native", states["dit"])
    file = write(tmp_path / "dit.gguf", native, quantised=["layers.0.ffn_norm1.weight"])
    norm = zimage.load_component(file, "dit", dtype="fp32").layers[0].ffn_norm1.weight
    assert 0 < (norm - states["dit"]["layers.0.ffn_norm1.weight"].float()).abs().max() < 0.02


def test_common_kinds_need_no_package(states, tmp_path, monkeypatch):
    native = loose.renamed("dit", "native", states["dit"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    file = write(tmp_path / "dit.gguf", native, quantised=["layers.0.attention.qkv.weight"])
    assert Checkpoint.of_file(file, "dit").entries["layers.0.attention.to_q.weight"].dtype == "GGUF Q8_0"
    loose.write_gguf(file, "lumina2", native, "TQ2_0", loose.is_matrix)
    with pytest.raises(CheckpointError, match=r"ggml's type 35, which needs the extra `gguf`"):
        Checkpoint.of_file(file, "dit")


# ------------------------------------------------------------------ vocabularies


def test_a_vocabulary_of_qwens_size_is_stepped_over(tmp_path):
    """The package made 303,000 arrays of it, nine seconds at every start."""
    words = [f"token{i}" for i in range(151_936)], [1] * 151_936, [f"token{i} token{i + 1}" for i in range(151_387)]
    bare = write(tmp_path / "bare.gguf", {"a": torch.ones(2)})
    full = write(tmp_path / "full.gguf", {"a": torch.ones(2)}, words)

    def seconds(file):
        return min(_timed(lambda: Checkpoint.of_file(file, "dit")) for _ in range(3))

    assert seconds(full) - seconds(bare) < 0.1
    header = read_header(full)
    assert header.strings("tokenizer.ggml.tokens") == words[0]
    assert header.integers("tokenizer.ggml.token_type") == words[1]


def _timed(call):
    began = time.process_time()
    with pytest.raises(CheckpointError, match="holds no dit"):
        call()
    return time.process_time() - began


def test_the_tokenizer_in_the_file_is_the_one_it_came_from(trained, tmp_path):
    ours = Tokenizer.load(write(tmp_path / "text.gguf", {"a": torch.ones(2)}, vocabulary(trained)))
    assert ours.vocab_size == trained.get_vocab_size()
    for text in WORDS:
        ids = trained.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == trained.decode(ids, skip_special_tokens=False)


def test_an_encoder_with_its_tokenizer_needs_no_other(states, tmp_path):
    names = loose.renamed("text_encoder", "gguf", states["text_encoder"])
    tokens, kinds, _ = vocabulary(tiny.tokenizer(), pads=0)
    write(tmp_path / "text.gguf", names, ([*tokens[:-1], "Ġa"], [*kinds[:-1], 1], ["Ġ a"]))
    (tmp_path / "elsewhere").mkdir()
    for name in ("dit", "vae"):
        loose.save(states[name], tmp_path / "elsewhere" / f"{name}.safetensors")
    parts = {name: tmp_path / "elsewhere" / f"{name}.safetensors" for name in ("dit", "vae")}
    pipe = zimage.ZImage.load(text_encoder=tmp_path / "text.gguf", **parts, device="cpu")
    assert pipe.model.tokenizer.encode("x a") == [tokens.index("x"), len(tokens) - 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: (w[0], w[1][:-1], w[2]), "should be distinct, each with a kind"),
        (lambda w: ([*w[0][:-1], w[0][0]], *w[1:]), "should be distinct, each with a kind"),
        (lambda w: (*w[:2], [*w[2], "nowhere else"]), "the merge 'nowhere else' does not join"),
        (lambda w: (*w[:2], [*w[2], "one"]), "the merge 'one ' does not join"),
    ],
)
def test_a_vocabulary_that_contradicts_itself(trained, tmp_path, change, says):
    file = write(tmp_path / "text.gguf", {"a": torch.ones(2)}, change(vocabulary(trained)))
    with pytest.raises(CheckpointError, match=says):
        Tokenizer.load(file)


def test_a_tokenizer_of_another_model_is_not_used(trained, tmp_path):
    file = write(tmp_path / "text.gguf", {"a": torch.ones(2)}, vocabulary(trained), pre="llama-bpe")
    with pytest.raises(CheckpointError, match=r"a tokenizer of the kind .*llama-bpe.*use --tokenizer"):
        Tokenizer.load(file)


# ------------------------------------------------------------------ headers


def header(version=3, tensors=0, values=b"", count=0, rest=b"", magic=b"GGUF"):
    return magic + struct.pack("<IQQ", version, tensors, count) + values + rest


def text(value: bytes, length=None):
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(name=b"a", axes=(2,), kind=0, offset=0, count=None):
    sides = struct.pack(f"<I{len(axes)}Q", len(axes) if count is None else count, *axes)
    return text(name) + sides + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (header(version=1), "its version is 1"),
        (header(version=3 << 24), "it is big-endian"),
        (header(tensors=2**60), f"at most {MOST_TENSORS:,} are read"),
        (header(tensors=1), r"it ends at byte 24, 8 bytes too early"),
        (header(count=2**63), f"at most {MOST_TENSORS:,} are read"),
        (header(count=1, values=text(b"k", 2**62)), "a text in its header has"),
        (header(count=1, values=text(b"k") + struct.pack("<I", 99)), "the unknown type 99"),
        (header(count=2, values=2 * (text(b"k") + struct.pack("<IB", 0, 1))), "the key 'k' appears twice"),
        (header(count=1, values=text(b"k") + struct.pack("<IIQ", 9, 9, 1)), "items of type 9, which is not read"),
        (header(count=1, values=text(b"k") + struct.pack("<IIQ", 9, 8, LONGEST_ARRAY + 1)), "which is not read"),
        (header(count=1, values=text(b"k") + struct.pack("<IIQ", 9, 8, 9)), "too early"),
        (header(count=1, values=text(b"k") + struct.pack("<IIQQ", 9, 8, 2, 2**64 - 1)), "too early"),
        (header(count=1, values=text(b"k") + struct.pack("<IIQ", 9, 12, 9)), "too early"),
        (header(count=1, values=text(b"general.alignment") + struct.pack("<II", 4, 3)), "its alignment is 3"),
        (header(tensors=2, rest=2 * tensor()), "the tensor 'a' appears twice"),
        (header(tensors=1, rest=tensor(count=2**31)), "has 2,147,483,648 axes"),
        (header(tensors=1, rest=tensor(offset=2**62)), "a lies past its end"),
        (header(tensors=1, rest=tensor(axes=(2**62, 2**62))), "a lies past its end"),
        (header(tensors=1, rest=tensor(kind=8, axes=(33,))), r"a \[33\] is Q8_0, whose rows are of 32 numbers"),
        (header(tensors=1, rest=tensor(kind=12345)), "ggml's type 12345, which cannot be unpacked"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path, content, says):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        Checkpoint.of_file(tmp_path / "x.gguf", "dit")
    assert "\n" not in str(error.value)


def test_every_kind_that_the_package_unpacks_is_read(tmp_path):
    for kind in ("Q5_0", "Q2_K", "IQ4_NL", "TQ1_0"):
        target = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[target]
        codes = np.random.default_rng(0).integers(0, 60, (3, size), dtype=np.uint8)
        writer = gguf.GGUFWriter(tmp_path / kind, "x")
        writer.add_tensor("layers.0.attention.to_q.weight", codes, raw_dtype=target)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        packed = Checkpoint.of_file(tmp_path / kind, "dit").reader()("layers.0.attention.to_q.weight")
        assert packed.shape == (3, block)
        want = torch.from_numpy(gguf.quants.dequantize(codes, target)).float()
        assert torch.equal(packed.decode().nan_to_num(), want.nan_to_num())
