"""How many tokens a text has at least, told from its length alone: a long one need not be tokenized to be refused."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .token_text import byte_level_alphabet

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NFC_SHRINKS = 4
"""Most bytes of text that NFC makes one of; 3.5 in Unicode 14, and ASCII it leaves alone."""


@dataclass(frozen=True, slots=True)
class TokenBound:
    """The longest token of a tokenizer under which no text gets lost before or between tokens."""

    longest: int
    """In bytes of UTF-8 or in characters."""
    counts_bytes: bool
    is_nfc: bool
    """Whether text is composed first."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenBound | None:
        """Return the bound; None where one token can stand for text of any length, or nobody here knows better."""
        from tokenizers.models import BPE

        normalizers = list(_parts(tokenizer.normalizer, "normalizers"))
        splitters = list(_parts(tokenizer.pre_tokenizer, "pretokenizers"))
        added = tokenizer.get_added_tokens_decoder().values()
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        is_nfc = any(part["type"] == "NFC" for part in normalizers)
        counts_bytes = any(part["type"] == "ByteLevel" for part in splitters)
        if not (
            isinstance(tokenizer.model, BPE)
            and all(map(_keeps_text, normalizers))
            and not (is_nfc and len(normalizers) > 1)  # what it composes would be the others' doing
            and all(map(_keeps_all, splitters))
            # these take the white space around them along
            and not any(token.lstrip or token.rstrip for token in added)
            # an unknown character would be lost, or many of them one token
            and (
                byte_level_alphabet().keys() <= vocabulary.keys()
                if counts_bytes
                else tokenizer.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
            )
        ):
            return None
        contents = [form for token in added for form in (token.content, unicodedata.normalize("NFC", token.content))]
        sizes = [len(content.encode()) if counts_bytes else len(content) for content in contents]
        return cls(max([*sizes, *map(len, vocabulary)]), counts_bytes, is_nfc)

    def fewest_tokens(self, text: str) -> int:
        """Return a number of tokens that ``text`` has, or more."""
        size = len(text.encode(errors="surrogatepass")) if self.counts_bytes else len(text)
        shrinks = _NFC_SHRINKS if self.is_nfc and not text.isascii() else 1
        return -(-size // (self.longest * shrinks))


def _parts(step: Any, name: str) -> Iterator[dict[str, Any]]:
    """Yield what a normalizer or pre-tokenizer is made of; a sequence shows its parts nowhere else."""
    if step is None:
        return
    state: dict[str, Any] = json.loads(step.__getstate__())
    pending = [state]
    while pending:
        part = pending.pop()
        if part["type"] == "Sequence":
            pending += part[name]
        else:
            yield part


def _keeps_text(normalizer: dict[str, Any]) -> bool:
    """Tell whether it makes no text shorter, NFC apart."""
    if normalizer["type"] == "Replace":
        pattern = normalizer["pattern"].get("String")
        return (
            pattern is not None
            and len(normalizer["content"]) >= len(pattern)
            and len(normalizer["content"].encode()) >= len(pattern.encode())
        )
    return normalizer["type"] in ("NFC", "Prepend")


def _keeps_all(splitter: dict[str, Any]) -> bool:
    """Tell whether it drops nothing between the pieces that it makes."""
    if splitter["type"] == "Split":
        return splitter["behavior"] != "Removed"
    return splitter["type"] in ("ByteLevel", "Digits", "Metaspace")
