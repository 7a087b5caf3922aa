from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from penstock.cluster.api.token_text import LogprobReader, TokenTexts
from penstock.workers.plan import Logprobs

from .test_detokenizer import BYTE_FALLBACK, BYTE_LEVEL

TEXT = st.text(alphabet="abé水☕😀 \n", max_size=20)


@settings(max_examples=150, deadline=None)
@given(text=TEXT)
def test_the_bytes_of_tokens_are_the_text(text: str) -> None:
    for tokenizer, space in ((BYTE_LEVEL, " "), (BYTE_FALLBACK, "\u2581")):
        ids = tokenizer.encode(text.replace(" ", space)).ids
        assert b"".join(map(TokenTexts(tokenizer).to_bytes, ids)).decode() == text


def test_half_characters_are_shown_as_bytes() -> None:
    texts = TokenTexts(BYTE_FALLBACK)
    shown = [texts.to_text(token) for token in BYTE_FALLBACK.encode("水").ids]
    assert shown == ["bytes:\\xe6", "bytes:\\xb0", "bytes:\\xb4"]
    assert texts.to_text(BYTE_FALLBACK.token_to_id("<0x41>")) == "A"
    assert texts.to_text(BYTE_FALLBACK.token_to_id("\u2581a")) == " a"
    assert texts.to_text(10**6) == ""


def test_added_tokens_are_written_out() -> None:
    tokenizer = Tokenizer.from_str(BYTE_LEVEL.to_str())
    tokenizer.add_tokens([AddedToken("café now", special=False)])
    texts = TokenTexts(tokenizer)
    assert texts.to_text(tokenizer.token_to_id("café now")) == "café now"
    assert texts.to_text(tokenizer.token_to_id("<|user|>")) == "<|user|>"
    assert texts.special_ids == {
        tokenizer.token_to_id(f"<|{name}|>") for name in ("eos", "system", "user", "assistant")
    }


@settings(max_examples=150, deadline=None)
@given(text=TEXT, cuts=st.lists(st.integers(0, 4), max_size=6))
def test_offsets_count_the_characters_before(text: str, cuts: list[int]) -> None:
    ids = [BYTE_LEVEL.token_to_id("<|user|>"), *BYTE_LEVEL.encode(text).ids]
    reader = LogprobReader(TokenTexts(BYTE_LEVEL), skip_special_tokens=True)
    tokens = []
    for size in [*cuts, len(ids)]:
        now, ids = ids[:size], ids[size:]
        tokens += reader.read(Logprobs([[token, 5] for token in now], [[-1.0, -0.5] for _ in now], [2 for _ in now]))
    seen = b""
    for entry in tokens:
        assert entry.text_offset == len(seen.decode(errors="ignore"))
        assert [(top.logprob, top.rank) for top in entry.top_logprobs] == [(-0.5, 1)]
        seen += bytes(entry.bytes or []) if entry.token != "<|user|>" else b""
    assert seen.decode() == text
