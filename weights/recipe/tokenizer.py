"""Byte-level BPE over the recipe's own captions, in Qwen3's form: NFC, Qwen2's split pattern, its special tokens."""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from zimage.text.chat import format_chat
from zimage.text.tokenizer_file import QWEN_SPLIT
from zimage.weights.recipe.captions import caption, known_words
from zimage.weights.recipe.scenes import Scene, random_pair, single_scenes

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
NOT_SPECIAL = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
VOCABULARY = 1000
MAX_TOKENS = 32  # one multiple of the DiT's padding, so every caption costs the same
CHAT_TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}"
    "{%- endif %}{%- endif %}"
)


def train_tokenizer(seed: int = 0, captions: int = 60_000) -> Tokenizer:
    """Learn the merges; ids 0…n are the learned pieces, the added tokens follow them, as in Qwen's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(NOT_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, captions), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(NOT_SPECIAL))
    return tokenizer


def _texts(seed: int, captions: int) -> list[str]:
    rng, singles = random.Random(seed), single_scenes()
    scenes: list[Scene] = [rng.choice(singles) if i % 2 else random_pair(rng) for i in range(captions)]
    words = [f" {word}" for word in known_words()]
    return [caption(scene, rng).text for scene in scenes] + words * 100 + ["user\n", "assistant\n"] * 3000


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "padding_side": "right",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of the prompt in Qwen's chat form."""
    return tokenizer.encode(format_chat(prompt)).ids
