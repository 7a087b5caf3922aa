"""Token ids to text, as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Detokenizer:
    """The text of one request's output.

    The pieces that `feed` returns add up to ``tokenizer.decode(all ids)``, cut where the first stop string begins, or
    with ``include_stop`` where it ends. First is the one that is complete first, and of those that end together the
    longest: so the text depends on the ids alone, not on how many of them came at a time. A stop string that is
    complete within the first ``min_tokens`` tokens is text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._include_stop, self._min_tokens = include_stop, min_tokens
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._stops = [_StopString(stop_string) for stop_string in stop]
        self._ids: list[int] = []
        self._safe: list[str] = []
        self._held = ""
        """Decoded, but perhaps the beginning of a stop string."""
        self._num_decoded = 0
        """Characters of ``_safe`` and ``_held``."""
        self.stopped = False
        """A stop string was found; whatever is fed from now on is ignored."""

    @property
    def text(self) -> str:
        """All the text returned so far."""
        return "".join(self._safe)

    @property
    def num_tokens(self) -> int:
        """Tokens fed, up to and including the one that completed the stop string."""
        return len(self._ids)

    def feed(self, token_ids: Sequence[int], *, finished: bool) -> str:
        """Return the text that ``token_ids`` make safe to show; with ``finished``, all that was held back too.

        A token that ended the request without being text (EOS, a stop token) must not be among them unless it is a
        special token, which has no text.
        """
        start = len(self._safe)
        for token_id in token_ids:
            if self.stopped:
                break
            self._ids.append(token_id)
            self._take(self._step(token_id))
        if finished and not self.stopped:
            self._take(self._rest())
            if not self.stopped:
                self._safe.append(self._held)
                self._held = ""
        return "".join(self._safe[start:])

    def _step(self, token_id: int) -> str:
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception as error:  # the bindings have no narrower type
            if "prefix" not in str(error):
                raise
            return self._resume()

    def _resume(self) -> str:
        """Go on where a later token changed the text of an earlier one: a decoder with byte fallback may do that."""
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
        return self._rest()

    def _rest(self) -> str:
        """Return the text still inside the stream, half characters as U+FFFD."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)
        return text[self._num_decoded :]

    def _take(self, text: str) -> None:
        """Append decoded ``text``: move what is safe out of ``_held``, or stop."""
        self._num_decoded += len(text)
        if not self._stops:
            self._safe.append(text)
            return
        pending = self._held + text
        num_held = 0
        for end, char in enumerate(text, start=len(self._held) + 1):
            for stop in self._stops:
                stop.advance(char)
            complete = max((len(stop.text) for stop in self._stops if stop.is_complete), default=0)
            if complete and len(self._ids) > self._min_tokens:
                self._safe.append(pending[: end if self._include_stop else end - complete])
                self._held = ""
                self.stopped = True
                return
            num_held = max(stop.num_begun for stop in self._stops)
        if text:
            safe_end = len(pending) - num_held
            self._safe.append(pending[:safe_end])
            self._held = pending[safe_end:]


class _StopString:
    """How much of one stop string the text ends with (Knuth, Morris, Pratt: constant time per character)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._matched = 0
        self._border = [0]
        """Length of the longest proper prefix of ``text`` that also ends at each place, as far as it has matched."""

    @property
    def is_complete(self) -> bool:
        """The text ends with all of it."""
        return self._matched == len(self.text)

    @property
    def num_begun(self) -> int:
        """Characters at the end of the text that may yet become it; not those of one that is complete."""
        return self._border[-1] if self.is_complete else self._matched

    def advance(self, char: str) -> None:
        """Append ``char`` to the text."""
        self._matched = self._extend(self.num_begun, char)
        if self._matched > len(self._border):
            self._border.append(self._extend(self._border[-1], char))

    def _extend(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched - 1]
        return matched + 1 if self.text[matched] == char else 0
