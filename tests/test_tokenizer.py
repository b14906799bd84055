"""The tokenizer from either form of file, and the chat string."""

import json
import unicodedata
from pathlib import Path

import pytest
import tiny
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers, trainers

from zimage.errors import CheckpointError
from zimage.text.chat import format_chat
from zimage.text.tokenizer import Tokenizer

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
