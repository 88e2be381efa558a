"""Rows for the audits: texts whose trained parts are marked, and the findings in them by name."""

import dataclasses
import json

from qlora_kit.data.audit.audit import audit
from tests.tiny_tokenizers import llama3_tokenizer, mistral_tokenizer, smollm_tokenizer

SMOLLM, LLAMA3, MISTRAL = smollm_tokenizer(), llama3_tokenizer(), mistral_tokenizer()


def row(text, tokenizer=SMOLLM):
    """Ids and mask of a text whose trained parts stand between ⟦ and ⟧."""
    ids, trained = [], []
    for index, part in enumerate(text.replace("⟧", "⟦").split("⟦")):
        some = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += some
        trained += [index % 2 == 1] * len(some)
    return ids, trained


def chat(number, answer="the answer is", end="<|im_end|>"):
    prompt = f"<|im_start|>user\nquestion {number} {number * 7919}<|im_end|>\n<|im_start|>assistant\n"
    return row(f"{prompt}⟦{answer} {number * 104729}{end}⟧\n")


def llama(number, begin="<|begin_of_text|>", answer="fine"):
    head = "<|start_header_id|>user<|end_header_id|>\n\n"
    return row(
        f"{begin}{head}hello {number * 7919}<|eot_id|>{head.replace('user', 'assistant')}⟦{answer} {number}<|eot_id|>⟧",
        LLAMA3,
    )


def found(data, tokenizer=SMOLLM, stop_ids=frozenset(), **settings):
    """Findings by name."""
    result = audit(data, tokenizer, 100, stop_ids, **settings)
    json.dumps(dataclasses.asdict(result))
    return {finding.name: finding for finding in result.findings}


def good(count=30):
    return [chat(number) for number in range(count)]
