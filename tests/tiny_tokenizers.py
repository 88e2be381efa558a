"""Tiny tokenizers, one per kind, trained on a few lines of text with the pre-tokenizer structure of a family.

Each carries a chat template.
"""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 600  # learned tokens; special tokens come on top

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog, and then the dog sleeps in the sun for 12345 seconds.",
    "def add(first: int, second: int) -> int:\n    return first + second\n\n\nprint(add(1, 22), add(333, 4444))\n",
    "I'll say it's what they've done; we'd rather you're there. DON'T SHOUT, she's not here!",
    "Größe, naïve café, façade, Übermut: 42 % off — «bon marché» … 3,14159 and 2.71828",
    "Привет, мир! Это небольшой текст на русском языке, чтобы обучить токенизатор.",
    "你好，世界。我们想在这里训练一个很小的分词器。 日本語のテキストもあります。",  # noqa: RUF001
    "Emoji: 🚀 🦙 😶‍🌫️ ✅ and spaces:  two,   three,    four\ttab\r\nnext line\r\n\r\nlast line.",
    "for i in range(10):\n\tif i % 2 == 0:\n\t\tcontinue\n\telse:\n\t\tprint(f'{i:>4}')\n",
    "Question: what is the capital of France? Answer: the capital of France is Paris, of course.",
]

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def smollm_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits, ChatML, no beginning-of-text token added."""
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    raw = _byte_level(pre_tokenizers.Sequence(steps), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(
        raw, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>"
    )


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's split pattern; adds <|begin_of_text|>."""
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    raw = _byte_level(_split_then_bytes(LLAMA3_REGEX), names, ignore_merges=True)
    bos = raw.token_to_id("<|begin_of_text|>")
    raw.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", bos)],
    )
    return _wrap(raw, LLAMA3_CHAT, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|end_of_text|>")


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen2's split pattern and NFC, ChatML, no beginning-of-text token at all."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw = _byte_level(_split_then_bytes(QWEN2_REGEX), names)
    raw.normalizer = normalizers.NFC()
    raw.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return _wrap(raw, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE without a leading space, byte fallback; adds <bos>."""
    raw = _sentencepiece_like(["<pad>", "<eos>", "<bos>", "<unk>"], unknown="<unk>", leading_space=False)
    raw.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    _add_bos(raw, "<bos>")
    return _wrap(raw, GEMMA_CHAT, bos_token="<bos>", eos_token="<end_of_turn>", pad_token="<pad>", unk_token="<unk>")


def phi3_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE with a leading space, byte fallback; adds nothing."""
    raw = _sentencepiece_like(["<unk>", "<s>", "</s>"], unknown="<unk>", leading_space=True)
    names = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False, rstrip=True) for name in names])
    return _wrap(raw, PHI3_CHAT, bos_token="<s>", eos_token="<|end|>", pad_token="<|endoftext|>", unk_token="<unk>")


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """Sentencepiece-like BPE with a leading space, byte fallback; adds <s>."""
    raw = _sentencepiece_like(["<unk>", "<s>", "</s>"], unknown="<unk>", leading_space=True)
    _add_bos(raw, "<s>")
    return _wrap(raw, MISTRAL_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )


def _byte_level(pre_tokenizer: Any, special: list[str], *, ignore_merges: bool = False) -> Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learner.train_from_iterator(TRAINING_TEXT, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    raw = Tokenizer(models.BPE(learned["vocab"], merges, ignore_merges=ignore_merges))
    raw.pre_tokenizer = pre_tokenizer
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    return raw


def _sentencepiece_like(control: list[str], *, unknown: str, leading_space: bool) -> Tokenizer:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if leading_space else "never")
    room = VOCABULARY_SIZE - len(control) - 256
    learner.train_from_iterator(TRAINING_TEXT, trainers.BpeTrainer(vocab_size=room, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    joined = [left + right for left, right in merges]
    letters = [token for token in learned["vocab"] if token not in set(joined)]
    names = control + [f"<0x{value:02X}>" for value in range(256)] + joined + letters
    vocabulary = {name: index for index, name in enumerate(names)}
    raw = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if leading_space else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if leading_space else steps)
    raw.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return raw


def _add_bos(raw: Tokenizer, name: str) -> None:
    raw.post_processor = processors.TemplateProcessing(
        single=f"{name} $A",
        pair=f"{name} $A {name}:1 $B:1",
        special_tokens=[(name, raw.token_to_id(name))],
    )


def _wrap(raw: Tokenizer, chat_template: str, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = chat_template
    return tokenizer
