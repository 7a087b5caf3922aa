from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer

from .scripted_backend import save_tokenizer


def test_text_survives_the_round_trip(tokenizer: ChatTokenizer) -> None:
    text = "the wheel ☕ 水車"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id or 0]) == text
    assert max(ids) < tokenizer.vocab_size


def test_a_chat_ends_where_the_assistant_begins(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}])
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == "<|system|>be<|user|>hi<|assistant|>"
    assert len(ids) <= 3 + 4, "roles are single tokens"


def test_a_tokenizers_own_truncation_is_off(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert len(ChatTokenizer(str(tmp_path)).encode("the water turns the wheel")) > 2


def test_lone_surrogates_are_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match=r"^prompt: expected text"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match=r"^messages: expected text"):
        tokenizer.encode_chat([{"role": "user", "content": "\ud800"}])


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer: .* is not a directory"):
        ChatTokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"^tokenizer: .* holds no tokenizer files"):
        ChatTokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^tokenizer: cannot load one from"):
        ChatTokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"^tokenizer: cannot load one from nobody/nothing"):
        ChatTokenizer("nobody/nothing")
