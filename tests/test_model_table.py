"""docs/models.md says what the program finds in the installed transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from penstock.workers import model_table
from penstock.workers.architectures import SUPPORTED, objection
from penstock.workers.loader import _moe_modules

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
# Types that an older transformers has, but in another form
CHANGED_SINCE_5_17 = {"aria_text"}


def committed() -> str:
    return PAGE.read_text(encoding="utf-8").partition(model_table.BEGIN)[2].partition(model_table.END)[0]


def rows_of(block: str) -> dict[str, str]:
    return {line.split("`")[1]: line for line in block.splitlines() if line.startswith("| `")}


@pytest.fixture(scope="module")
def rows() -> dict[str, model_table.Row]:
    return {row.model_type: row for row in model_table.rows()}


def test_the_page_is_what_the_program_makes():
    made, found = model_table.block(), committed()
    if f"transformers {transformers.__version__} lists" in found:
        assert made == found, "run: python -m penstock.workers.model_table docs/models.md"
        return
    expected, present = rows_of(found), rows_of(made)
    assert len(present) > 40
    differing = {model_type for model_type, row in present.items() if expected.get(model_type) != row}
    assert differing <= CHANGED_SINCE_5_17


def test_every_supported_type_has_its_row():
    tested = {model_type for model_type, row in rows_of(committed()).items() if "| tested |" in row}
    assert tested == set(SUPPORTED)


def test_the_program_rewrites_only_its_part(tmp_path):
    page = tmp_path / "models.md"
    page.write_text(f"before\n{model_table.BEGIN}old\n{model_table.END}after\n")
    model_table.write(page)
    text = page.read_text()
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert text.count("| `mixtral` | tested |") == 1
    page.write_text("no markers\n")
    with pytest.raises(ValueError, match="lacks the markers"):
        model_table.write(page)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_the_tested_models_have_what_the_table_names(model_type, rows, tiny_model, checkpoint):
    checkpoint(model_type)  # skips what the installed transformers lacks
    row, model = rows[model_type], tiny_model(model_type)
    config = model.config.get_text_config()
    tensors, modules = [*dict(model.named_parameters()), *dict(model.named_buffers())], [*dict(model.named_modules())]
    experts, _ = _moe_modules(model)
    has = {
        "MLA": any("kv_a_proj" in name for name in modules),
        "sliding windows": 0 < (getattr(config, "sliding_window", None) or 0) <= 12,
        "sinks": any(name.endswith(".sinks") for name in tensors),
        "biased": any(name.endswith(("e_score_correction_bias", "expert_bias")) for name in tensors),
        "group-limited": (getattr(config, "n_group", None) or 1) > 1,
        "shared experts": any("shared" in name for name in modules),
        "dense layers": len(experts) < config.num_hidden_layers,
    }
    named = {*row.attention.split(", "), *row.router.split(", "), *row.notes.split(", ")}
    lacking = {feature for feature in named & has.keys() if not has[feature]}
    assert lacking == ({"dense layers"} if model_type == "qwen3_moe" else set())
    assert not {feature for feature, present in has.items() if present} - named


@pytest.mark.parametrize(
    ("model_type", "attention", "router", "notes"),
    [
        ("deepseek_v3", "MLA", "sigmoid, biased, group-limited", "shared experts, dense layers"),
        ("gpt_oss", "grouped-query, sliding windows, sinks", "softmax", ""),
        ("olmoe", "grouped-query", "softmax", ""),
        ("laguna", "grouped-query, sliding windows", "sigmoid, biased", "shared experts, dense layers"),
    ],
)
def test_features_are_read_from_the_source(model_type, attention, router, notes, rows):
    row = rows[model_type]
    assert (row.status, row.attention, row.router, row.notes) == ("tested", attention, router, notes)


def test_an_untested_type_with_nothing_against_it_loads(monkeypatch):
    monkeypatch.setattr(model_table, "SUPPORTED", tuple(set(SUPPORTED) - {"mixtral"}))
    statuses = {row.model_type: row.status for row in model_table.rows()}
    assert statuses["mixtral"] == "loads"
    assert [model_type for model_type, status in statuses.items() if status == "loads"] == ["mixtral"]
    assert all((statuses[t] == "refused") == bool(objection(t)) for t in statuses)
