"""Texts that are refused by their length alone would have been refused by their tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.token_bound import TokenBound

from .openai_app import chat, check_error, completion, post_chat, post_completion
from .scripted_backend import MAX_MODEL_LEN, byte_level_tokenizer

DEMO = Path(__file__).parents[1] / "demo" / "model"
# "ΐ" in the longest of its spellings, 7 bytes that NFC makes 2
LONG_SPELLING = "\u1fbe\u0308\u0341"


def _trained(normalizer: Any = None, splitter: Any = None, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
    trainer = trainers.BpeTrainer(
        vocab_size=700 if special else 400,
        special_tokens=[],
        initial_alphabet=[] if special else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["water water        water ΐΐΐΐΐΐΐΐ ÅÅÅÅ ===================="] * 20, trainer)
    if special:
        vocabulary = {token: i for i, token in enumerate([*special, *tokenizer.get_vocab(with_added_tokens=False)])}
        pairs = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
        tokenizer.model = models.BPE(vocabulary, pairs, **model)
    return tokenizer


def _nfc() -> Tokenizer:
    """Return a tokenizer in the way of Qwen's."""
    pieces = [
        pre_tokenizers.Split(Regex(r"\p{L}+|\s+|[^\s\p{L}]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    tokenizer = _trained(normalizers.NFC(), pre_tokenizers.Sequence(pieces))
    tokenizer.add_special_tokens([AddedToken("<|a special token, and a long one|>", special=True)])
    return tokenizer


def _byte_fallback() -> Tokenizer:
    """Return a tokenizer in the way of Llama 2's and Mixtral's."""
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _trained(spaces, pre_tokenizers.Metaspace(split=False), byte_fallback=True, fuse_unk=True)


BOUNDED = {
    "byte level": byte_level_tokenizer(),
    "demo": Tokenizer.from_file(str(DEMO / "tokenizer.json")),
    "NFC": _nfc(),
    "byte fallback": _byte_fallback(),
}
_PIECES = st.sampled_from(
    [
        "water ",
        " " * 40,
        "=" * 50,
        LONG_SPELLING * 30,
        "\u212b" * 30,
        "水車",
        "\u0958",
        "<|a special token, and a long one|>",
    ]
)


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=60, deadline=None)
@given(text=st.lists(_PIECES | st.text(max_size=20), max_size=12).map("".join))
@example(text=LONG_SPELLING * 500)
@example(text="=" * 5000)
@example(text=" " * 5000)
@example(text="\u212a" * 5000)
def test_no_text_has_fewer_tokens_than_the_bound_says(name: str, text: str) -> None:
    tokenizer = BOUNDED[name]
    bound = TokenBound.of(tokenizer)
    assert bound is not None
    assert bound.fewest_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_longest_token_decides(name: str) -> None:
    tokenizer = BOUNDED[name]
    bound = TokenBound.of(tokenizer)
    assert bound is not None
    vocabulary = [
        *tokenizer.get_vocab(with_added_tokens=False),
        *(t.content for t in tokenizer.get_added_tokens_decoder().values()),
    ]
    assert bound.longest == max(map(len, vocabulary))
    assert bound.fewest_tokens("a" * bound.longest * 7) == 7
    assert bound.fewest_tokens("a" * bound.longest * 7 + "a") == 8


_DROPS_SPACES = pre_tokenizers.Split(" ", "removed")


def _with(change: Callable[[Tokenizer], Any]) -> Tokenizer:
    tokenizer = byte_level_tokenizer()
    change(tokenizer)
    return tokenizer


def _set(**parts: Any) -> Callable[[Tokenizer], None]:
    def change(tokenizer: Tokenizer) -> None:
        for name, part in parts.items():
            setattr(tokenizer, name, part)

    return change


@pytest.mark.parametrize(
    "tokenizer",
    [
        _with(lambda t: t.add_special_tokens([AddedToken("<|greedy|>", rstrip=True)])),
        _with(lambda t: t.add_tokens([AddedToken("<|greedy|>", lstrip=True)])),
        _with(_set(normalizer=normalizers.Strip())),
        _with(_set(normalizer=normalizers.Replace(Regex("a+"), "a"))),
        _with(_set(normalizer=normalizers.Replace("aa", "a"))),
        _with(_set(normalizer=normalizers.Replace("é", "e"))),
        _with(_set(normalizer=normalizers.Sequence([normalizers.Replace("a", "\u0301"), normalizers.NFC()]))),
        _with(_set(normalizer=normalizers.NFKC())),
        _with(_set(pre_tokenizer=pre_tokenizers.Whitespace())),
        _with(_set(pre_tokenizer=pre_tokenizers.Sequence([_DROPS_SPACES, pre_tokenizers.ByteLevel()]))),
        _with(_set(pre_tokenizer=pre_tokenizers.Digits())),
        _with(_set(model=models.BPE({"a": 0}, []))),
        _with(_set(model=models.WordLevel({"a": 0, "?": 1}, unk_token="?"))),
        Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True, byte_fallback=True)),
        Tokenizer(models.Unigram([("a", -1.0)], unk_id=0)),
    ],
)
def test_where_a_token_may_stand_for_any_text_there_is_no_bound(tokenizer: Tokenizer) -> None:
    assert TokenBound.of(tokenizer) is None


async def test_a_text_far_too_long_is_refused_untokenized(http: httpx.AsyncClient, tokenizer: ChatTokenizer) -> None:
    token = max(tokenizer.backend.get_vocab(), key=len)
    far = token * (2 * MAX_MODEL_LEN)
    for field, response in (
        ("prompt", await post_completion(http, prompt=far)),
        ("prompt[1]", await post_completion(http, prompt=["a", far])),
        ("messages", await post_chat(http, messages=[{"role": "user", "content": far}])),
        ("prediction.content", await post_chat(http, prediction={"type": "content", "content": far})),
    ):
        check_error(response, 400, field)
        error = response.json()["error"]
        # "at least": nobody has counted
        assert re.fullmatch(rf".*: at least \d+ tokens are more than max_model_len, {MAX_MODEL_LEN}", error["message"])
        assert error["code"] == "context_length_exceeded"
    # as long as a text can be that fits
    whole = await completion(http, prompt=token * MAX_MODEL_LEN, max_tokens=0, echo=True)
    assert whole["usage"]["prompt_tokens"] == MAX_MODEL_LEN
    # what is cut may be of any length
    kept = await completion(http, prompt=far, truncate_prompt_tokens=7)
    assert kept["usage"]["prompt_tokens"] == 7
    kept = await chat(http, messages=[{"role": "user", "content": far}], truncate_prompt_tokens=7)
    assert kept["usage"]["prompt_tokens"] == 7
