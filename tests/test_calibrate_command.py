"""`penstock calibrate` on the demo model, and the profile that it leaves at work."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock.cluster.calibrate_command import calibrate
from penstock.cluster.calibration.fingerprint import file_sha256
from penstock.cluster.calibration.profile import read_profile
from penstock.cluster.client.question_file import read_questions
from penstock.cluster.flags import CalibrationFlags
from penstock.demo.records import generate

DEMO = str(Path(__file__).parents[1] / "demo" / "model")
FLAGS = CalibrationFlags(device="cpu", num_threads=1, dtype="float32", max_model_len=512)
BUDGETS = ("experts=16,scope=request", "experts=5,scope=request")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines: list[dict[str, Any]] = [
        {"messages": record.chat(), "answer": record.answer, "family": "math"}
        for record in islice(generate("math", "held_out", 9), 4)
    ]
    lines.append({"prompt": "import os\nimport sys\n"})
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return file


def test_what_it_writes_is_served(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "out.json", tmp_path / "plot.png"
    calibrate(DEMO, data=data, output=output, budget=BUDGETS[:1], max_tokens=24, num_records=5, plot=plot, engine=FLAGS)
    shown = capsys.readouterr()
    assert BUDGETS[0] in shown.out
    assert "written to" in shown.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    [entry] = read_profile(output).budgets
    conditions = entry.conditions
    assert (conditions.draft_len, conditions.num_records, conditions.max_tokens) == (7, 5, 24)
    assert (conditions.data, conditions.data_sha256) == ("data.jsonl", file_sha256(data))
    assert entry.num_pairs == 4
    assert entry.experts_per_layer <= 16 < entry.reference_experts_per_layer
    # Another run adds to it
    calibrate(DEMO, data=data, output=output, budget=BUDGETS[1:], max_tokens=24, draft_len=7, engine=FLAGS)
    assert [str(entry.parsed) for entry in read_profile(output).budgets] == list(BUDGETS)
    options: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "num_threads": 1, "max_model_len": 512, "draft_len": 7,
        "budget_profile": str(output), "max_quality_loss": 1.0, "max_perplexity_increase": 100.0,
    }  # fmt: skip
    prompt = "class Parser:\n    def parse(self, text):\n"
    with penstock.LLM(DEMO, **options) as llm:
        [exact] = llm.generate(prompt, temperature=0, max_tokens=40)
    with penstock.LLM(DEMO, **options, expert_budget=BUDGETS[1]) as llm:
        [lossy] = llm.generate(prompt, temperature=0, max_tokens=40)
        [refused] = llm.generate(prompt, temperature=0, max_tokens=40, expert_budget="off")
        assert llm.stats().budgeted_rows == 4 * lossy.stats.num_budgeted_rows > 0, "the model has four layers"
        assert llm.stats().kept_weight / llm.stats().budgeted_rows == pytest.approx(lossy.stats.kept_weight)
        with pytest.raises(ValueError, match=r"^expert_budget: 'no' is not one of auto, off"):
            llm.generate(prompt, expert_budget="no")
    assert refused.token_ids == exact.token_ids != lossy.token_ids
    assert (refused.stats.num_budgeted_rows, refused.stats.kept_weight) == (0, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": ("experts=few",)}, "^expert_budget: 'few' is no value of experts"),
        ({"budget": ("experts=3",)}, r"^expert_budget: experts 3 is not in \[4, 32\]"),
        ({"max_tokens": 0}, "^max_tokens: 0 is not at least 1"),
        ({"num_records": 0}, "^num_records: 0 is not at least 1"),
        ({"draft_len": 0}, "^draft_len: 0 is not at least 1"),
        ({"output": Path("nowhere/out.json")}, "^output: cannot write nowhere/out.json"),
        ({"plot": Path("nowhere/out.png")}, "^plot: cannot write nowhere/out.png"),
        ({"data": Path("nowhere.jsonl")}, "^data: cannot read nowhere.jsonl: No such file"),
    ],
)
def test_mistakes_are_named(data: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    output = tmp_path / "out.json"
    with pytest.raises(ValueError, match=message):
        calibrate(DEMO, **{"data": data, "output": output, "engine": FLAGS, **given})
    assert not output.exists()


def test_a_plot_needs_matplotlib(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "penstock.cluster.calibration.plot.find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    with pytest.raises(ValueError, match=r"^plot: matplotlib is not installed"):
        calibrate(DEMO, data=data, plot=Path("x.png"), engine=FLAGS)


# --- the data --------------------------------------------------------------------------------------------------------


class Words:
    """One token a word."""

    def encode(self, prompt: str) -> list[int]:
        return [len(word) for word in prompt.split()]

    def encode_chat(self, messages: Any) -> list[int]:
        if "content" not in messages[-1]:
            raise ValueError("messages: expected content")
        return [100, *self.encode(messages[-1]["content"])]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "d.jsonl"
        file.write_text(text)
        return file

    return write


def test_records_are_chats_or_texts_and_may_have_an_answer(written: Callable[[str], Path]) -> None:
    file = written(
        '{"prompt": "a bc", "family": "x"}\n\n{"messages": [{"role": "user", "content": "abc"}], "answer": "d"}\n'
        '{"prompt": "a", "answer": null}\n'
    )
    found = read_questions(file, Words(), max_prompt_tokens=9)
    assert [(question.prompt, question.answer) for question in found] == [((1, 2), None), ((100, 3), "d"), ((1,), None)]
    assert read_questions(file, Words(), max_prompt_tokens=9, num_records=2) == found[:2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has neither messages nor a prompt"),
        ('{"prompt": 1}', "has neither messages nor a prompt"),
        ('{"prompt": "a", "answer": 5}', ": answer: expected text, got int"),
        ('{"messages": [{"role": "user"}]}', ": messages: expected content"),
        ('{"prompt": "a b c d"}', r": 4 tokens are not in \[1, 3\]"),
        ('{"prompt": " "}', r": 0 tokens are not in \[1, 3\]"),
    ],
)
def test_a_bad_line_is_named(written: Callable[[str], Path], line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^data: line 2 of .*{message}"):
        read_questions(written(f'{{"prompt": "a"}}\n{line}\n'), Words(), max_prompt_tokens=3)


def test_a_file_without_records_is_refused(written: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match=r"^data: .* holds no prompt"):
        read_questions(written("\n"), Words(), max_prompt_tokens=3)
