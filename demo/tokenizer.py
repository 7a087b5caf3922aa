"""The demo model's tokenizer: byte-level BPE with 1024 tokens, every digit a token of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import code
from .records import generate

VOCAB_SIZE = 1024
END, USER, ASSISTANT, CODE = SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>", "<|code|>")

# Mirrors `records.render`. System messages and tool results have no token of their own: the first are put before
# the next user message, the second are read as user messages. Content may be text or a list of text parts.
CHAT_TEMPLATE = """\
{%- set pending = namespace(text='') -%}
{%- for message in messages -%}
{%- set body = namespace(text='') -%}
{%- if message.content is string -%}{%- set body.text = message.content -%}
{%- else -%}{%- for part in message.content or [] -%}{%- set body.text = body.text + part.text -%}{%- endfor -%}
{%- endif -%}
{%- if message.role in ['system', 'developer'] -%}{%- set pending.text = pending.text + body.text + '\\n' -%}
{%- elif message.role == 'assistant' -%}{{- '<|assistant|>' + body.text + '<|end|>' -}}
{%- else -%}{{- '<|user|>' + pending.text + body.text -}}{%- set pending.text = '' -%}
{%- endif -%}
{%- endfor -%}
{%- if pending.text -%}{{- '<|user|>' + pending.text -}}{%- endif -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Learn the merges from training text of all families and wrap them for transformers."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT, CODE],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        padding_side="left",
    )


def _sample() -> Iterator[str]:
    """About 5 MB, mostly code and chat: the generated families have few distinct words, all frequent."""
    yield from itertools.islice(code.excerpts("train"), 0, None, 4)
    yield from (_plain(record.text) for record in generate("code", "train"))
    yield from (_plain(record.text) for record in generate("chat", "train"))
    yield from (_plain(record.text) for record in itertools.islice(generate("extraction", "train"), 5000))
    yield from (_plain(record.text) for record in itertools.islice(generate("math", "train"), 1000))


def _plain(text: str) -> str:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\n")
    return text
