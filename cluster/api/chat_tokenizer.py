"""Text to token ids: prompts as they are, conversations through the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...workers.sampling_params import SamplingParams
from .detokenizer import Detokenizer
from .token_bound import TokenBound
from .token_text import TokenTexts

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ROLES = ("system", "user", "assistant")


class TooLongError(ValueError):
    """A text has more tokens than it may have: told from its length, before it was tokenized."""


class ChatTokenizer:
    """A model's tokenizer and chat template.

    ``source`` is a directory or a hub id; code that comes with a tokenizer is never run. Raises ``ValueError``, whose
    message starts with ``tokenizer:``, if there is none or it is not a fast one. Safe to use from several threads.
    """

    def __init__(self, source: str, revision: str | None = None) -> None:
        self.source = source
        self._transformers = _load(source, revision)
        self.backend: Tokenizer = self._transformers.backend_tokenizer
        # a tokenizer.json may ask for either, and both would silently change prompts
        self.backend.no_padding()
        self.backend.no_truncation()

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, or None if the tokenizer names none."""
        return self._transformers.eos_token_id

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added ones included; a model's own vocabulary may be padded beyond it."""
        return len(self._transformers)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return bool(self._transformers.chat_template)

    @cached_property
    def token_texts(self) -> TokenTexts:
        """What single tokens stand for."""
        return TokenTexts(self.backend)

    @cached_property
    def token_bound(self) -> TokenBound | None:
        """What tells how many tokens a text has at least; None if only tokenizing it can."""
        return TokenBound.of(self.backend)

    def encode(self, prompt: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Return the ids of ``prompt``, with the special tokens that the tokenizer itself puts around a text.

        Raises `TooLongError` for a text far beyond ``max_tokens``; what is little longer is returned.
        """
        return self._encode(prompt, "prompt", add_special_tokens=add_special_tokens, max_tokens=max_tokens)

    def encode_prediction(self, text: str, *, max_tokens: int | None = None) -> list[int]:
        """Return the ids of an output that a client expects: nothing is put around it. ``max_tokens`` as above."""
        return self._encode(text, "prediction.content", add_special_tokens=False, max_tokens=max_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_special_tokens: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's next turn, or to go on with its last message.

        ``messages`` are as in the OpenAI API: ``role`` (system, user or assistant) and ``content``, a string or a list
        of ``{"type": "text", "text": ...}``. Raises ``ValueError`` naming the offending part, such as
        ``messages[0].content[1].type``, or whatever the template itself refuses. ``max_tokens`` as in `encode`.
        """
        from jinja2 import TemplateError

        if not self.has_chat_template:
            raise ValueError(f"messages: the tokenizer of {self.source} has no chat template; send a prompt instead")
        conversation = _normalise(messages)
        try:
            text = self._transformers.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        # a template that rewrites the last message cannot be told to go on with it: a ValueError
        except (TemplateError, ValueError) as error:
            raise ValueError(f"messages: refused by the model's chat template: {error}") from error
        # the template writes the special tokens out
        return self._encode(text, "messages", add_special_tokens=add_special_tokens, max_tokens=max_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``, special tokens left out."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, sampling: SamplingParams) -> Detokenizer:
        """Return an incremental detokenizer for one request."""
        return Detokenizer(
            self.backend,
            sampling.stop,
            include_stop=sampling.include_stop_str_in_output,
            min_tokens=sampling.min_tokens,
            skip_special_tokens=sampling.skip_special_tokens,
        )

    def _encode(self, text: str, field: str, *, add_special_tokens: bool, max_tokens: int | None) -> list[int]:
        if max_tokens is not None and len(text) > max_tokens and (bound := self.token_bound) is not None:
            fewest = bound.fewest_tokens(text)
            if fewest > max_tokens:
                raise TooLongError(f"{field}: at least {fewest} tokens are more than max_model_len, {max_tokens}")
        try:
            # Only batches let other threads run meanwhile, and a long text may take seconds
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeError) as error:  # what the bindings raise for a lone surrogate
            raise ValueError(f"{field}: expected text that can be written as UTF-8") from error


def check_tokenizer_files(source: str) -> None:
    """Raise ``ValueError`` as `ChatTokenizer` does, if a look at the directory ``source`` shows that there is none."""
    path = Path(source)
    if path.is_dir() and not any(path.glob("*token*")):
        raise ValueError(f"tokenizer: {source} holds no tokenizer files (tokenizer.json is missing)")
    if not path.is_dir() and (path.is_absolute() or source.startswith((".", "~"))):
        raise ValueError(f"tokenizer: {source} is not a directory")


def _load(source: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer  # takes seconds

    check_tokenizer_files(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    # files that are damaged raise whatever the parser raises
    except Exception as error:
        lines = str(error).strip().splitlines()
        detail = lines[0] if lines else type(error).__name__
        raise ValueError(f"tokenizer: cannot load one from {source}: {detail}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer: {source} holds a slow tokenizer; a fast one (tokenizer.json) is needed")
    return tokenizer


def _normalise(messages: Any) -> list[dict[str, str]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: expected a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object with role and content, got {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role: {role!r} is not one of {', '.join(ROLES)}")
    for field in ("tool_calls", "function_call", "audio", "refusal"):
        if message.get(field):
            raise ValueError(f"{where}.{field}: not supported")
    return {"role": role, "content": text_content(f"{where}.content", message.get("content"))}


def text_content(where: str, content: Any) -> str:
    """Return the text of OpenAI's ``content``: a string or a list of text parts; ``ValueError`` names the part."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{where}: expected a string or a list of text parts, got {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping):
            raise ValueError(f"{where}[{i}]: expected an object with type and text, got {type(part).__name__}")
        if part.get("type") != "text":
            raise ValueError(f"{where}[{i}].type: {part.get('type')!r} is not supported; valid: 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}[{i}].text: expected a string, got {type(part.get('text')).__name__}")
        texts.append(part["text"])
    return "".join(texts)
