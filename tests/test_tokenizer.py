"""The tokenizer from either form of file, and the chat string."""

import json
import os
import re
import shutil
import time
import unicodedata
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

import zimage
from zimage.errors import CheckpointError
from zimage.text.chat import format_chat
from zimage.text.tokenizer import Tokenizer
from zimage.text.tokenizer_file import PATTERNS

TEXTS = (
    "a cat face on a blue background",
    "It's 3 o'clock, WE'LL see 12345 \t tabs\r\n\r\n  and   runs of blanks ",
    "naïve café: composed é and decomposed e\u0301, Å and A\u030a",
    "Schrift „Müller“, 汉字かな交じり文, العربية, 🐱👩‍👩‍👧 x²",
    "",
    format_chat("a <|im_end|> inside"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One trained vocabulary as tokenizer.json and as vocab.json + merges.txt + tokenizer_config.json."""
    base = tmp_path_factory.mktemp("tokenizers")
    fast = tiny.tokenizer()
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer, trained.normalizer, trained.decoder = fast.pre_tokenizer, fast.normalizer, fast.decoder
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet))
    (base / "split").mkdir()
    trained.model.save(str(base / "split"))
    first = trained.get_vocab_size()
    trained.add_special_tokens(list(tiny.SPECIAL_TOKENS))
    kinds = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(first + i): {"content": token, **kinds} for i, token in enumerate(tiny.SPECIAL_TOKENS)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>"}
    (base / "split" / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "json").mkdir()
    trained.save(str(base / "json" / "tokenizer.json"))
    (base / "json" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    return {"json": base / "json", "split": base / "split"}


@pytest.mark.parametrize("text", TEXTS)
def test_both_forms_give_the_same_ids(folders, text):
    ours = Tokenizer.load(folders["json"])
    assert ours.encode(text) == Tokenizer.load(folders["split"]).encode(text)
    assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parity
@pytest.mark.parametrize("form", ["json", "split"])
def test_ids_are_those_of_transformers(folders, form):
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer.load(folders[form]), transformers.AutoTokenizer.from_pretrained(folders[form])
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_special_tokens_are_single_ids_and_digits_stand_alone(folders):
    ours = Tokenizer.load(folders["split"])
    assert len(ours.encode("<|im_start|><|im_end|>")) == 2
    assert len(ours.encode("12345")) == 5


def test_nothing_is_cut(folders):
    assert len(Tokenizer.load(folders["json"]).encode("7" * 5000)) == 5000


def test_the_chat_string():
    assert format_chat("a cat") == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", None, "is missing: vocab.json and merges.txt do not contain"),
        ("tokenizer_config.json", "{}", "'added_tokens_decoder' is missing"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("merges.txt", None, "should hold tokenizer.json, or vocab.json and merges.txt"),
        ("vocab.json", "[", "the tokenizer cannot be read"),
    ],
)
def test_damage_is_named(folders, tmp_path, name, content, words):
    for file in folders["split"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        Tokenizer.load(tmp_path)


def edited(folder: Path, target: Path, **changes) -> Path:
    """A tokenizer.json with other parts, written to a folder of its own."""
    content = json.loads((folder / "tokenizer.json").read_text()) | changes
    (target / "tokenizer.json").write_text(json.dumps(content))
    return target


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def test_the_order_of_the_parts_does_not_matter(folders, tmp_path):
    content = json.loads((folders["json"] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, sort_keys=True, indent=1))  # the model in the middle
    assert sorted(content).index("model") < len(content) - 1
    ours, theirs = Tokenizer.load(tmp_path), FastTokenizer.from_file(str(folders["json"] / "tokenizer.json"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.vocab_size == theirs.get_vocab_size()


def test_what_another_model_would_do_to_the_parts_is_not_read(folders, tmp_path):
    """A second model after the first, which a reader of the first alone would miss."""
    text = (folders["json"] / "tokenizer.json").read_text().rstrip().removesuffix("}")
    for key in ("normalizer", r"normali\u007aer", "model"):
        (tmp_path / "tokenizer.json").write_text(f'{text}, "{key}": {json.dumps(UNSAFE["a Replace of nothing"][1])}}}')
        with pytest.raises(CheckpointError, match="a key appears twice"):
            Tokenizer.load(tmp_path)


REPLACE = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
UNSAFE = {
    "a Replace of nothing": ("normalizer", REPLACE, "normalizer 'Replace' is not implemented; known are NFC"),
    "in a sequence": ("normalizer", {"type": "Sequence", "normalizers": [REPLACE]}, "'Replace' is not implemented"),
    "without its type": ("normalizer", {"pattern": {"String": ""}, "content": "x"}, "should be an object with a type"),
    "a Prepend": ("normalizer", {"type": "Prepend", "prepend": "x" * 10**6}, "'Prepend' is not implemented"),
    "a map of characters": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "not implemented"),
    "a pattern that backtracks": (
        "pre_tokenizer",
        split({"Regex": "(a+)+b"}),
        "'Regex': '(a+)+b'} is not",
    ),
    "a split at nothing": ("pre_tokenizer", split({"String": ""}), "is not implemented"),
    "a pattern that is none": ("pre_tokenizer", split(5), "'pattern' = 5 is not implemented"),
    "thousands of steps": ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 5000}, "at most 16"),
    "a sequence of nothing": ("decoder", {"type": "Sequence", "decoders": 7}, "a sequence of at most 16 steps"),
    "a step that is none": ("decoder", ["ByteLevel"], "decoder = ['ByteLevel'] should be an object"),
    "chance": ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.5}, "BPE, without dropout"),
    "another model": ("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}, "it must be BPE"),
    "a model that is none": ("model", 7, "the tokenizer cannot be read"),
    "a vocabulary of lists": ("model", {"type": "BPE", "vocab": {"a": [0]}, "merges": []}, "cannot be read"),
    "a negative id": ("model", {"type": "BPE", "vocab": {"a": -1}, "merges": []}, "cannot be read"),
    "merges of nothing": ("model", {"type": "BPE", "vocab": {"a": 1}, "merges": [["x", "y"]]}, "out of vocabulary"),
    "added tokens of another kind": ("added_tokens", {"a": 1}, "added_tokens should be a list"),
    "an added token without text": ("added_tokens", [{"content": "", "id": 0}], "should have a short text"),
    "an added token of any length": ("added_tokens", [{"content": "x" * 10**6}], "should have a short text"),
    "flags of another kind": ("added_tokens", [{"content": "x", "special": "yes"}], "true or false for flags"),
}


@pytest.mark.parametrize("kind", UNSAFE)
def test_what_may_panic_or_never_return_is_refused_by_name(folders, tmp_path, capfd, kind):
    part, value, words = UNSAFE[kind]
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        Tokenizer.load(edited(folders["json"], tmp_path, **{part: value}))
    assert len(str(error.value)) < 500
    assert capfd.readouterr().err == ""  # a panic writes its stack there


@pytest.mark.parametrize("pattern", [{"Regex": pattern} for pattern in PATTERNS] + [{"String": " "}])
@pytest.mark.parametrize("text", [" " * 100_000 + "x", "a" * 100_000, "'" * 100_000, "\n \n" * 33_000])
def test_known_patterns_split_long_texts_at_once(folders, tmp_path, pattern, text):
    steps = [split(pattern), {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    pre = {"type": "Sequence", "pretokenizers": steps}
    ours = Tokenizer.load(edited(folders["json"], tmp_path, pre_tokenizer=pre))
    begun = time.perf_counter()
    assert ours.decode(ours.encode(text)) == text
    assert time.perf_counter() - begun < 5  # 0.1 s on an idle core


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"])
def test_no_file_is_waited_for_or_read_without_end(folders, tmp_path, file):
    for source in folders["split"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).unlink(missing_ok=True)
    (tmp_path / file).write_bytes(b"{")
    os.truncate(tmp_path / file, 1 << 40)
    with pytest.raises(CheckpointError, match="such a file has at most"):
        Tokenizer.load(tmp_path)
    (tmp_path / file).unlink()
    os.mkfifo(tmp_path / file)
    if file != "tokenizer.json":  # in whose place the others are read
        with pytest.raises(CheckpointError, match=r"should hold|is missing"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("entries", [[1], "x", {"x": {"content": "a"}}, {"1": "a"}, {"1": {"content": 5}}, {"-1": {}}])
def test_special_tokens_of_another_kind(folders, tmp_path, entries):
    for source in folders["split"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: "):
        Tokenizer.load(tmp_path)


def test_ids_past_the_embeddings_are_named(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 10**9
    path.write_text(json.dumps(content))
    pipe = zimage.ZImage.load(folder, dtype="fp32", device="cpu")
    with pytest.raises(CheckpointError, match="gives id 1000000000; the text encoder has only 261"):
        pipe.tokenize("a cat")
    with pytest.raises(CheckpointError, match="gives id 1000000000"):
        pipe.generate("a cat", steps=1, width=64, height=64)
