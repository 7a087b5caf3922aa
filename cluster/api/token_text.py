"""What each token of a vocabulary stands for: its bytes, which need not be whole characters."""

from __future__ import annotations

import codecs
import json
import re
from typing import TYPE_CHECKING, Any

from ...workers.plan import Logprobs
from .generation import TokenLogprob

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""Stands for a space in SentencePiece vocabularies."""


class TokenTexts:
    """The bytes and the text of single tokens. Decoding a lone token would lose half characters and leading spaces."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self.special_ids = {token_id for token_id, token in self._added.items() if token.special}
        kinds = _decoder_kinds(tokenizer)
        self._char_bytes = byte_level_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self._has_spaces = bool({"Replace", "Metaspace"} & kinds)
        self._known: dict[int, bytes] = {}

    def to_bytes(self, token_id: int) -> bytes:
        """Return the token's bytes, special tokens written out; none for an id that the tokenizer does not have."""
        if token_id not in self._known:
            self._known[token_id] = self._find(token_id)
        return self._known[token_id]

    def to_text(self, token_id: int) -> str:
        r"""Return the token as text; as ``bytes:\xe6\xb0``, like OpenAI, where that is not whole characters."""
        return readable(self.to_bytes(token_id))

    def _find(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].content.encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._char_bytes is not None and all(char in self._char_bytes for char in token):
            return bytes(self._char_bytes[char] for char in token)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        if self._has_spaces:
            return token.replace(_SPACE, " ").encode()
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def readable(token: bytes) -> str:
    r"""Return ``token`` as text; as ``bytes:\xe6\xb0``, like OpenAI, where it is not whole characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class LogprobReader:
    """Turns one text's log-probabilities into words, in order: it counts the characters before each token."""

    def __init__(self, texts: TokenTexts, *, skip_special_tokens: bool) -> None:
        self._texts, self._skip_special_tokens = texts, skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def read(self, logprobs: Logprobs) -> list[TokenLogprob]:
        """Return what the next tokens of the text are."""
        tokens = []
        for ids, values, rank in zip(logprobs.token_ids, logprobs.values, logprobs.ranks, strict=True):
            likeliest = enumerate(zip(ids[1:], values[1:], strict=True), start=1)
            top = [self._entry(token_id, value, place) for place, (token_id, value) in likeliest]
            tokens.append(self.token(ids[0], values[0], rank, top))
        return tokens

    def token(self, token_id: int, logprob: float | None, rank: int | None, top: list[TokenLogprob]) -> TokenLogprob:
        """Return what the next token of the text is; a prompt's first has no log-probability."""
        offset = self._num_chars
        token = self._texts.to_bytes(token_id)
        if not (self._skip_special_tokens and token_id in self._texts.special_ids):
            self._num_chars += len(self._decoder.decode(token))
        return TokenLogprob(readable(token), list(token), logprob, token_id, rank, offset, top)

    def _entry(self, token_id: int, logprob: float, rank: int) -> TokenLogprob:
        token = self._texts.to_bytes(token_id)
        return TokenLogprob(readable(token), list(token), logprob, token_id, rank)


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    """Return the types of the steps of the tokenizer's decoder."""
    if tokenizer.decoder is None:
        return set()
    # a sequence shows its parts nowhere else
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    return {part["type"] for part in state.get("decoders", [state])}


def byte_level_alphabet() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # takes seconds

    return {char: byte for byte, char in bytes_to_unicode().items()}
