"""The demo model's data, tokenizer and files: what benchmarks and other tests rely on."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shutil

import pytest
import torch

from penstock.demo import arithmetic, card, corpus, evaluate, prompts, stdlib, train
from penstock.demo.export import MODEL, write_model
from penstock.demo.net import CONFIG, GroupedLinear, Net
from penstock.demo.records import FAMILIES, Message, generate, held_out, render

SAMPLE = 1000


@pytest.fixture(scope="module")
def loaded():
    return evaluate.load()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_held_out_prompt_is_trained_on(family):
    trained = {record.messages for record in itertools.islice(generate(family, "train", 0), SAMPLE * 4)}
    held = [record.messages for record in itertools.islice(generate(family, "held_out", 0), SAMPLE // 4)]
    assert len(held) > 100
    assert len(set(held)) == len(held)
    assert trained.isdisjoint(held)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_records(family):
    first, again, other = (list(itertools.islice(generate(family, "held_out", seed), 50)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_splits_follow_their_rules():
    for split in ("train", "held_out"):
        for record in itertools.islice(generate("math", split, 1), SAMPLE):
            a, sign, b = record.messages[0].content.split()
            assert arithmetic.held_out_pair(int(a), int(b), sign == "-") == (split == "held_out")
        for record in itertools.islice(generate("extraction", split, 1), SAMPLE):
            assert held_out(record.messages[0].content.rpartition("\n")[0]) == (split == "held_out")
        for record in itertools.islice(generate("code", split, 1), SAMPLE):
            assert held_out(record.source, 16) == (split == "held_out")


def test_code_and_chat_do_not_share_held_out_names_with_training():
    trained = {d.name for f in stdlib.files() if f.split == "train" for d in stdlib.definitions(f)}
    asked = [r.messages[0].content for r in generate("chat", "held_out", 0) if r.source.endswith(".py")]
    assert asked
    for question in asked:
        name = re.sub(r"^(What does|Explain|What is|Describe) | do\?$|[?.]$", "", question)
        assert name not in trained


def test_no_foreign_copyright_line_is_used():
    assert len(stdlib.files()) > 300
    for file in stdlib.files():
        for line in file.text.splitlines():
            assert not re.search(r"copyright", line, re.I) or "Python Software Foundation" in line, file.path


def test_answers_are_right():
    for record in itertools.islice(generate("math", "train", 2), SAMPLE):
        a, sign, b = record.messages[0].content.split()
        expected = int(a) - int(b) if sign == "-" else int(a) + int(b)
        assert record.answer.endswith(f"\nAnswer: {expected}")
        written = re.findall(r"write (\d) carry (\d)", record.answer)
        carry = int(written[-1][1])
        assert int(str(carry) + "".join(digit for digit, _ in reversed(written))) == expected
    for record in itertools.islice(generate("extraction", "train", 2), SAMPLE):
        document = record.messages[0].content.splitlines()[:-1]
        keys = record.messages[-1].content.rpartition("get:")[2].split(",")
        assert [line.partition(":")[0] for line in record.answer.splitlines()] == keys
        assert set(record.answer.splitlines()) <= set(document)


@pytest.mark.parametrize(("family", "split"), [("fiction", "train"), ("math", "test")])
def test_unknown_names_are_refused_with_the_valid_ones(family, split):
    with pytest.raises(ValueError, match=r"code, math, extraction, chat|train, held_out"):
        generate(family, split)


def test_committed_prompts_are_held_out_and_small():
    assert prompts.PROMPTS.stat().st_size < 200_000
    for family in FAMILIES:
        records = prompts.load(family)
        assert len({record.messages for record in records}) == prompts.PER_FAMILY
        assert {record.family for record in records} == {family}
    # Endless families do not depend on the Python version, so the file must equal the generator.
    for family in ("math", "extraction"):
        assert prompts.load(family) == list(
            itertools.islice(generate(family, "held_out", prompts.SEED), prompts.PER_FAMILY)
        )


def test_tokenizer_round_trip_and_single_digits(loaded):
    _, tokenizer = loaded
    assert len(tokenizer) == CONFIG.vocab_size
    for text in ("def f(x):\n\treturn x  # é ü 中\n\n\n", "851 - 72", " leading", "a\r\nb", "\x00\x7f", "🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode("a2031-04-17b 99.5")
    assert sum(tokenizer.decode([token]).isdigit() for token in ids) == 11
    digits = [token for token in tokenizer.get_vocab() if re.search(r"[0-9]", token)]
    assert sorted(digits) == list("0123456789")
    assert tokenizer.eos_token == tokenizer.pad_token == "<|end|>"


def test_keys_are_the_same_tokens_in_record_question_and_answer(loaded):
    _, tokenizer = loaded
    for key in ("agent", "status", "order"):
        (first, *_), alone = tokenizer.encode(f"{key}: x"), tokenizer.encode(key)
        assert tokenizer.encode(f"<|user|>{key}: x\nget:city,{key}<|assistant|>{key}: x").count(first) >= 3
        assert alone[0] == first


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_template_is_the_training_format(family, loaded):
    _, tokenizer = loaded
    for record in itertools.islice(generate(family, "held_out", 0), 100):
        text = tokenizer.apply_chat_template(record.chat(), tokenize=False, add_generation_prompt=True)
        assert text == record.prompt
        assert record.text == f"{text}{record.answer}<|end|>"
        told = [*record.chat(), {"role": "assistant", "content": record.answer}]
        assert tokenizer.apply_chat_template(told, tokenize=False) == record.text


def test_chat_template_takes_what_the_api_takes(loaded):
    _, tokenizer = loaded

    def text(*messages):
        turns = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert text(("user", "a"), ("assistant", "b"), ("user", "c")) == render(turns) + "<|assistant|>"
    assert text(("system", "s"), ("user", "u")) == "<|user|>s\nu<|assistant|>"
    assert text(("system", "s")) == "<|user|>s\n<|assistant|>"
    parts = [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 2"}]
    assert text(("user", parts)) == "<|user|>1 + 2<|assistant|>"
    assert text(("user", "u"), ("assistant", None), ("tool", "t")) == (
        "<|user|>u<|assistant|><|end|><|user|>t<|assistant|>"
    )


def test_packed_documents_are_independent():
    torch.manual_seed(0)
    net = Net()
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 40))
    document = torch.tensor([[1] * 15 + [2] * 25])
    together, _ = net(tokens, document)
    alone, _ = net(tokens[:, 15:], document[:, 15:])
    torch.testing.assert_close(together[15:], alone)


def test_packing_keeps_every_document_and_its_targets():
    documents = [([at + 1] * length, [True] * length) for at, length in enumerate((200, 100, 50, 300, 6, 256))]
    rows = corpus.pack(documents)
    assert len(rows) == 3
    assert sorted(rows.tokens[rows.document > 0].tolist()) == sorted(
        token for ids, _ in documents if len(ids) <= corpus.ROW_TOKENS for token in ids
    )
    _, document, predicts = train.tensors(rows.tokens, rows.document, rows.is_target)
    assert int(predicts.sum()) == 200 + 100 + 50 + 6 + 256 - 5
    assert not predicts[document == 0].any()


def test_grouped_linear_has_the_right_gradients():
    x = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 4, 5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: GroupedLinear.apply(a, b, [2, 0, 4]), (x, weight))


def test_learning_rate_warms_up_stays_and_decays():
    rates = [train.learning_rate(step, progress) for step, progress in ((0, 0), (200, 0.1), (900, 0.5), (999, 1))]
    assert rates == pytest.approx([train.PEAK_LR / 200, train.PEAK_LR, train.PEAK_LR, 0.02 * train.PEAK_LR])


def test_shipped_files_agree():
    assert (MODEL / "model.safetensors").stat().st_size <= 16_000_000
    evaluation = json.loads((MODEL / "evaluation.json").read_text())
    shown = (MODEL / "README.md").read_text()
    assert card.table(evaluation["families"]) in shown
    for family in evaluate.EXACT:
        result = evaluation["families"][family]
        assert result["answers"] >= 500
        assert result["exact"] >= 0.9 * result["answers"]
    for family in ("code", "chat"):
        assert evaluation["families"][family]["distinct_4gram_ratio"] > 0.2
    generation = json.loads((MODEL / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == 0


@pytest.mark.parametrize("family", evaluate.EXACT)
def test_shipped_model_answers_held_out_prompts(family, loaded):
    model, tokenizer = loaded
    records = prompts.load(family)[:20]
    answers = evaluate.complete(model, tokenizer, [record.chat() for record in records], 96)
    texts = [tokenizer.decode(answer) for answer in answers]
    assert sum(text == record.answer for text, record in zip(texts, records, strict=True)) >= 18


def test_a_model_of_other_sizes_is_trained_and_written(tmp_path):
    """What `benchmarks/train_wide` relies on: 128 experts of which a token uses eight."""
    config = copy.deepcopy(CONFIG)
    config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size = 128, 8, 16
    torch.manual_seed(0)
    net = Net(config)
    tokens = torch.arange(64).view(1, 64)
    logits, aux = net(tokens, torch.ones_like(tokens))
    (logits.square().mean() + aux).backward()
    assert net.model.layers[0].mlp.experts.down_proj.grad.abs().amax(dim=(1, 2)).gt(0).sum() > 64
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        shutil.copy(MODEL / name, tmp_path / "tokenizer" / name)
    train.save(tmp_path, net, torch.optim.AdamW(net.parameters()), 0, 0.0, 0, 0)
    write_model(tmp_path, tmp_path / "model", config)  # which compares logits
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (written["num_experts"], written["num_experts_per_tok"], written["moe_intermediate_size"]) == (128, 8, 16)
