"""The table of model types in docs/models.md, made from transformers' own list and sources.

    python -m penstock.workers.model_table docs/models.md

rewrites what stands between the page's markers; `tests/test_model_table.py` fails when it would change anything.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .architectures import ROUTER_CLASS, SUPPORTED, UNSTEERABLE, has_experts, modeling_source, objection

BEGIN = "<!-- made by penstock.workers.model_table: do not edit -->\n"
END = "<!-- end of what is made -->\n"


@dataclass(frozen=True, slots=True)
class Row:
    """One model type of the table."""

    model_type: str
    status: str
    """``tested``, ``loads`` or ``refused``."""
    attention: str
    router: str
    notes: str
    """What there is besides routed experts, or why the type is refused."""

    def __str__(self) -> str:
        return f"| `{self.model_type}` | {self.status} | {self.attention} | {self.router} | {self.notes} |"


def rows() -> list[Row]:
    """Return a row for every model type with experts among the installed transformers' causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    sources = {model_type: modeling_source(model_type) for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    made = [_row(model_type, source) for model_type, source in sources.items() if has_experts(source)]
    return sorted(made, key=lambda row: (("tested", "loads", "refused").index(row.status), row.model_type))


def block() -> str:
    """Return what the program writes between the markers."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    made = rows()
    num_types = len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    name = f"transformers {transformers.__version__}"
    counts = ", ".join(
        f"{sum(row.status == status for row in made)} {status}" for status in ("tested", "loads", "refused")
    )
    return "\n".join(
        [
            f"{name} lists {num_types} types of causal language models, {len(made)} with experts: {counts}.",
            "",
            "| model type | status | attention | router | besides routed experts, or why it is refused |",
            "|---|---|---|---|---|",
            *map(str, made),
            "",
            "Refused as well, because transformers does not list them as causal language models: "
            + ", ".join(f"`{model_type}`" for model_type in _unlisted())
            + ".",
            "",
        ]
    )


def write(page: Path) -> None:
    """Put the table for the installed transformers into ``page``."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{page} lacks the markers {BEGIN.strip()} and {END.strip()}")
    page.write_text(before + BEGIN + block() + END + after, encoding="utf-8")


def _row(model_type: str, source: str) -> Row:
    reason = objection(model_type)
    if reason:
        return Row(model_type, "refused", "", "", reason)
    status = "tested" if model_type in SUPPORTED else "loads"
    return Row(model_type, status, _attention(source), _router(model_type, source), _notes(source))


def _attention(source: str) -> str:
    kinds = ["MLA" if "kv_a_proj" in source else "grouped-query"]
    if "create_sliding_window_causal_mask(" in source or "else create_sliding_window_causal_mask" in source:
        kinds.append("sliding windows")
    if "s_aux=" in source:
        kinds.append("sinks")
    return ", ".join(kinds)


def _router(model_type: str, source: str) -> str:
    if model_type in UNSTEERABLE:
        return f"cannot be steered: {UNSTEERABLE[model_type]}"
    routers = [
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and ROUTER_CLASS.search(node.name)
    ]
    code = "\n".join(_code(router) for router in routers)
    kinds = [" or ".join(kind for kind in ("softmax", "sigmoid") if kind in code)]
    if re.search(r"e_score_correction_bias|expert_bias", source):
        kinds.append("biased")
    if "topk_group" in code:
        kinds.append("group-limited")
    return ", ".join(kinds)


def _code(definition: ast.ClassDef) -> str:
    """Return a class's statements without comments and docstrings."""
    for node in ast.walk(definition):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(definition)


def _notes(source: str) -> str:
    notes = []
    if re.search(r"self\.shared_(expert|mlp)", source):
        notes.append("shared experts")
    if re.search(r"\b(mlp_layer_types|first_k_dense_replace|mlp_only_layers|num_dense_layers)\b", source):
        notes.append("dense layers")
    if "enable_moe_block" in source:
        notes.append("a dense block in every layer")
    if "pixel_values" in source:
        notes.append("text only")
    return ", ".join(notes)


def _unlisted() -> list[str]:
    """Return the types with experts that transformers has, but in no form as a causal language model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed = {modeling_source(model_type) for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    found: dict[str, str] = {}
    for model_type in sorted(CONFIG_MAPPING, key=len):
        source = modeling_source(model_type)
        if source not in listed and has_experts(source):
            found.setdefault(source, model_type)
    return sorted(found.values())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
