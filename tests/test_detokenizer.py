from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from penstock.cluster.api.detokenizer import Detokenizer

from .scripted_backend import byte_level_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
TEXT = st.text(alphabet="abé水☕😀 \ufffd\n", max_size=24)
IDS = st.one_of(
    st.one_of(TEXT, st.text(alphabet="ab", max_size=24)).map(lambda text: BYTE_LEVEL.encode(text).ids),
    st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=24),  # half characters and special tokens too
)


def byte_fallback_tokenizer() -> Tokenizer:
    """Return one like Llama 2's: unknown characters as byte tokens, spaces as U+2581."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    tokenizer = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTE_FALLBACK = byte_fallback_tokenizer()


def cut(text: str, stops: list[str]) -> str | None:
    """Return the text before the stop string that is complete first, by looking at every prefix; None without one."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - len(max(complete, key=len))]
    return None


def feed_in_pieces(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(detokenizer.feed(ids[start : start + size], finished=False))
        start += size
    pieces.append(detokenizer.feed(ids[start:], finished=True))
    return pieces


@st.composite
def outputs_with_stops(draw: st.DrawFn) -> tuple[list[int], list[str]]:
    ids = draw(IDS)
    text = BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    parts = st.one_of(st.text(alphabet="ab水 ", min_size=1, max_size=4), st.text(alphabet="ab", min_size=2, max_size=6))
    if text:  # pieces of the text itself, so that stops are found, overlap and span tokens
        places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 5))
        parts = st.one_of(parts, places.map(lambda place: text[place[0] : sum(place)]))
    return ids, draw(st.lists(parts, max_size=4))


@settings(max_examples=400, deadline=None)
@given(case=outputs_with_stops(), sizes=st.lists(st.integers(0, 5), max_size=8))
def test_pieces_add_up_to_the_decoded_text_cut_at_the_first_stop(
    case: tuple[list[int], list[str]], sizes: list[int]
) -> None:
    ids, stops = case
    full = BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    expected = cut(full, stops)
    detokenizer = Detokenizer(BYTE_LEVEL, tuple(stops))

    pieces = feed_in_pieces(detokenizer, ids, sizes)

    assert "".join(pieces) == detokenizer.text == (full if expected is None else expected)
    assert detokenizer.stopped is (expected is not None)


@settings(max_examples=300, deadline=None)
@given(case=outputs_with_stops(), sizes=st.lists(st.integers(0, 5), max_size=8))
def test_tokens_count_up_to_the_one_that_completed_the_stop(
    case: tuple[list[int], list[str]], sizes: list[int]
) -> None:
    ids, stops = case
    detokenizer = Detokenizer(BYTE_LEVEL, tuple(stops))
    feed_in_pieces(detokenizer, ids, sizes)

    expected = len(ids)
    for count in range(1, len(ids) + 1):
        text = BYTE_LEVEL.decode(ids[:count], skip_special_tokens=True)
        # text that ends in half a character is not known yet
        if (count == len(ids) or not text.endswith("\ufffd")) and cut(text, stops) is not None:
            expected = count
            break
    assert detokenizer.num_tokens == expected


@settings(max_examples=200, deadline=None)
@given(case=outputs_with_stops())
def test_only_the_beginning_of_a_stop_string_is_held_back(case: tuple[list[int], list[str]]) -> None:
    ids, stops = case
    detokenizer = Detokenizer(BYTE_LEVEL, tuple(stops))
    for count in range(1, len(ids) + 1):
        detokenizer.feed(ids[count - 1 : count], finished=False)
        text = BYTE_LEVEL.decode(ids[:count], skip_special_tokens=True)
        if detokenizer.stopped:
            break
        if not text.endswith("\ufffd"):
            begun = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            assert detokenizer.text == text[: len(text) - max(begun, default=0)]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aé水😀 b", max_size=20), sizes=st.lists(st.integers(0, 5), max_size=8))
def test_byte_fallback_text_is_whole(text: str, sizes: list[int]) -> None:
    ids = BYTE_FALLBACK.encode(text.replace(" ", "▁")).ids
    pieces = feed_in_pieces(Detokenizer(BYTE_FALLBACK), ids, sizes)
    assert "".join(pieces) == BYTE_FALLBACK.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1), max_size=16))
def test_byte_fallback_survives_bytes_that_are_no_text(ids: list[int]) -> None:
    one_by_one, at_once = Detokenizer(BYTE_FALLBACK), Detokenizer(BYTE_FALLBACK)
    pieces = [one_by_one.feed([token_id], finished=False) for token_id in ids]
    pieces.append(one_by_one.feed([], finished=True))
    assert "".join(pieces) == at_once.feed(ids, finished=True)


def test_half_a_character_waits() -> None:
    first, *rest = BYTE_LEVEL.encode("😀").ids
    detokenizer = Detokenizer(BYTE_LEVEL)
    assert rest, "the tokenizer must split the character"
    assert detokenizer.feed([first], finished=False) == ""
    assert detokenizer.feed(rest, finished=False) == "😀"


def test_half_a_character_at_the_end_is_shown_as_replacement() -> None:
    first = BYTE_LEVEL.encode("😀").ids[0]
    assert Detokenizer(BYTE_LEVEL).feed([first], finished=True) == "\ufffd"


def test_what_looked_like_a_stop_is_shown_at_the_end() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, ("stop here",))
    ids = BYTE_LEVEL.encode("now stop").ids
    assert detokenizer.feed(ids, finished=False) == "now "
    assert detokenizer.feed([], finished=True) == "stop"
    assert not detokenizer.stopped


def test_tokens_after_the_stop_are_ignored() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, ("wheel",))
    ids = BYTE_LEVEL.encode("the wheel turns").ids
    detokenizer.feed(ids, finished=False)
    counted = detokenizer.num_tokens
    assert counted < len(ids)
    assert detokenizer.feed(ids, finished=True) == ""
    assert (detokenizer.text, detokenizer.num_tokens) == ("the ", counted)


@settings(max_examples=300, deadline=None)
@given(
    case=outputs_with_stops(),
    sizes=st.lists(st.integers(0, 5), max_size=8),
    min_tokens=st.integers(0, 12),
    include_stop=st.booleans(),
)
def test_early_stop_strings_are_text_and_the_one_that_counts_may_be_kept(
    case: tuple[list[int], list[str]], sizes: list[int], min_tokens: int, include_stop: bool
) -> None:
    ids, stops = case
    options = {"min_tokens": min_tokens, "include_stop": include_stop}
    detokenizer = Detokenizer(BYTE_LEVEL, tuple(stops), **options)
    feed_in_pieces(detokenizer, ids, sizes)

    full = BYTE_LEVEL.decode(ids, skip_special_tokens=True)
    expected, known = full, ""
    for count in range(1, len(ids) + 1):
        text = BYTE_LEVEL.decode(ids[:count], skip_special_tokens=True)
        if text.endswith("\ufffd") and count < len(ids):
            continue  # half a character is not known yet
        ends = range(len(known) + 1, len(text) + 1)
        known = text
        complete = [(end, stop) for end in ends for stop in stops if text[:end].endswith(stop)]
        if complete and count > min_tokens:
            end = complete[0][0]
            longest = max(len(stop) for at, stop in complete if at == end)
            expected = full[: end if include_stop else end - longest]
            break
    assert detokenizer.text == expected


def test_special_tokens_may_be_text() -> None:
    ids = [*BYTE_LEVEL.encode("the").ids, BYTE_LEVEL.token_to_id("<|user|>")]
    assert Detokenizer(BYTE_LEVEL).feed(ids, finished=True) == "the"
    assert Detokenizer(BYTE_LEVEL, skip_special_tokens=False).feed(ids, finished=True) == "the<|user|>"
