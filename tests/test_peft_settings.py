"""PEFT's settings beside or in a LoRA file: every value is checked, and patterns are matched in bounded time."""

import random
import re
import time

import pytest

from zimage.errors import CheckpointError
from zimage.formats.patterns import Pattern
from zimage.formats.peft import PeftConfig

PLAIN = {"r": 4, "lora_alpha": 4}
NAMES = ["layers.0.attention.to_q", "layers.12.feed_forward.w1", "cap_embedder.1", "to_out.0", "ab.b", "a", ""]
PIECES = [
    *("a", "b", ".", r"\.", r"\d", r"\w", r"\W", "*", "+", "?", "|", "(", ")", "(?:", "[ab]", "[^a]", "[a-c]", "^"),
    *("{2}", "{1,2}", "{0,}", "{,2}", "{", "}", "]", "to_q", "layers", "0", "_", "*?", "+?", "$"),
]  # fmt: skip


def reference(pattern: str) -> re.Pattern | None:
    """As PEFT looks a module up."""
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return None


def test_patterns_match_what_pefts_own_rule_matches():
    """Thousands of small expressions: nothing is accepted that is none, and every answer is Python's."""
    chance, compared = random.Random(13), 0
    for _ in range(12_000):
        text = "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 7)))
        wanted = reference(text)
        try:
            pattern = Pattern(text)
        except CheckpointError:
            continue
        assert wanted is not None, text
        for name in NAMES:
            assert pattern.matches(name) == (wanted.match(name) is not None), (text, name)
        compared += wanted.match(NAMES[0]) is not None
    assert compared > 100


@pytest.mark.parametrize(
    "text",
    [
        r"(\w+\.?)+x",
        "((((a*)*)*)*)*b",
        "(.*.*.*.*.*.*.*.*.*.*)+x",
        r"(?:(?:\w*|\w+)+)+\d\d\d",
        "(" + "a*b*" * 60 + ")+",
        r"(\w|\.|_|\d){1,100}x",
    ],
)
def test_no_pattern_takes_long(text):
    began, pattern = time.perf_counter(), Pattern(text)
    for _ in range(5):
        assert not pattern.matches("noise_refiner.0.feed_forward.w1" + 3 * "_a")
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(?i)to_q", "(?i is not supported"),
        ("(?P<a>b)", "(?P is not supported"),
        ("a(?=b)", "(?= is not supported"),
        ("(?<!b)a", "(?< is not supported"),
        (r"(a)\1", r"\1 is not supported"),
        (r"\bq", r"\b is not supported"),
        ("a++", "follows another repetition"),
        ("a**", "follows another repetition"),
        ("*a", "there is nothing to repeat before"),
        ("(a", "a group is not closed"),
        ("a)", "closes a group that was not opened"),
        ("[a", "the set '[a' is not supported"),
        ("[z-a]", "bad character range"),
        ("a{2,1}", "{2,1} is not a repetition"),
        ("a{999}", "is not a repetition of at most 100 times"),
        ("a{9999}", "{9999} is not a repetition of at most 100 times"),
        ("a{," + "9" * 290 + "}", "is not a repetition of at most 100 times"),
        ("\\", "is not supported"),
        ("(" * 7 + "a" + ")" * 7, "its groups lie more than 6 deep"),
        ("x" * 301, "it has 301 characters; at most 300"),
    ],
)
def test_patterns_that_are_not_matched_are_refused_with_their_reason(pattern, words):
    with pytest.raises(CheckpointError) as error:
        PeftConfig.read("adapter_config.json", PLAIN | {"rank_pattern": {pattern: 8}})
    assert words in str(error.value)
    assert "adapter_config.json: rank_pattern has " in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_alpha": "4"}, "lora_alpha = '4' should be a number other than 0, at most 1e+06"),
        ({"lora_alpha": 0}, "lora_alpha = 0 should be"),
        ({"lora_alpha": True}, "lora_alpha = True should be"),
        ({"lora_alpha": 1e7}, "lora_alpha = 10000000.0 should be"),
        ({"lora_alpha": 10**400}, "should be a number other than 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha = inf"),
        ({"lora_alpha": [4]}, "lora_alpha = [4]"),
        ({"r": 4.0}, "r = 4.0 should be a whole number above 0, at most 1e+06"),
        ({"r": 10**400}, "should be a whole number above 0"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes' should be true or false"),
        ({"use_rslora": None}, "use_rslora = None should be true or false"),
        ({"alpha_pattern": "to_q"}, "alpha_pattern should be an object, not str"),
        ({"rank_pattern": {"to_q": 0}}, "to_q = 0 should be a whole number above 0"),
        ({"alpha_pattern": {"to_q": None}}, "to_q = None should be a number"),
        ({"alpha_pattern": {str(i): 4 for i in range(2001)}}, "alpha_pattern has 2,001 entries; at most 2,000"),
        ({"alpha_pattern": {f"a*{i}": 4 for i in range(101)}}, "more than 100 regular expressions with operators"),
        ({"peft_type": "BOFT"}, "peft_type 'BOFT' is not implemented; adapters may be LORA, LOKR, LOHA, OFT"),
        ({"peft_type": ["LORA"]}, "is not implemented"),
        ({"peft_type": "OFT", "coft": 1}, "coft = 1 should be true or false"),
        ({"peft_type": "OFT", "eps": -1}, "eps = -1 should be a number from 0"),
        ({"peft_type": "OFT", "eps": "x"}, "eps = 'x' should be a number"),
        ({"peft_type": "OFT", "use_cayley_neumann": 0}, "use_cayley_neumann = 0 should be true or false"),
        ({"peft_type": "OFT", "num_cayley_neumann_terms": 10**9}, "should be a whole number from 1 to 50"),
    ],
)
def test_every_value_is_checked(values, words):
    with pytest.raises(CheckpointError) as error:
        PeftConfig.read("adapter_config.json", PLAIN | values)
    assert words in str(error.value)
    assert str(error.value).startswith("adapter_config.json: ")
    assert len(str(error.value)) < 400


def test_settings_of_an_oft_have_no_scale():
    config = PeftConfig.read("x", {"peft_type": "OFT", "r": 0, "oft_block_size": 32, "num_cayley_neumann_terms": 7})
    assert (config.scaling, config.rotating.terms, config.rotating.neumann) == (None, 7, True)
    with pytest.raises(CheckpointError, match="to_q is not an OFT, but x says that it is"):
        config.scale("to_q", 4)


def test_a_pattern_for_every_layer_is_read_quickly():
    names = {f"layers.{i}.attention.to_{part}": 4 for i in range(500) for part in "qkvx"}
    began = time.perf_counter()
    config = PeftConfig.read("x", PLAIN | {"alpha_pattern": names})
    for name in list(names)[::10]:
        assert config.scale(name, 4) == 1.0
    assert time.perf_counter() - began < 2
