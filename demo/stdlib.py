"""The standard library of the running Python as text: sources, docstrings and the language's help topics.

All of it is under the PSF-2.0 licence; files that carry a copyright line of somebody else are left out.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .records import Split, held_out

# Tables and tests rather than prose or programs; `pydoc_data` is read as topics.
SKIPPED = {"encodings", "pydoc_data", "lib2to3", "msilib", "test", "tests", "idle_test", "this", "__phello__"}
FOREIGN = re.compile(
    r"copyright|\(c\) *\d{4}|all rights reserved|permission (to use|is hereby)|licensed under|public domain", re.I
)
OWN = re.compile(r"python software foundation", re.I)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module: dotted name, path relative to the library's root, and source text."""

    module: str
    path: str
    text: str

    @property
    def split(self) -> Split:
        """All that is taken from a file is on one side."""
        return "held_out" if held_out(self.path, 16) else "train"


@dataclass(frozen=True, slots=True)
class Definition:
    """One function, method or class: where it is, its header, docstring ("" if none) and dedented body."""

    module: str
    name: str
    header: str
    docstring: str
    body: str


@functools.cache
def files() -> tuple[SourceFile, ...]:
    """Every usable module, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or SKIPPED.intersection(parts):
            continue
        if parts[0].startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if any(FOREIGN.search(line) and not OWN.search(line) for line in text.splitlines()):
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append(SourceFile(module, path.relative_to(root).as_posix(), text))
    return tuple(found)


@functools.cache
def definitions(file: SourceFile) -> tuple[Definition, ...]:
    """The functions, methods and classes of a file, outermost first; nested functions are left out."""
    lines = file.text.splitlines()

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[Definition]:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            first = node.body[0]
            docstring = ast.get_docstring(node) or ""
            rest = node.body[1:] if docstring else node.body
            if first.lineno > node.lineno:
                top = first.lineno - 1
                # Comments between the header and the first statement belong to the body.
                head_end = next((i + 1 for i in range(node.lineno - 1, top) if lines[i].rstrip().endswith(":")), top)
                body_start = (first.end_lineno or first.lineno) if docstring else head_end
                yield Definition(
                    file.module,
                    prefix + node.name,
                    textwrap.dedent("\n".join(lines[node.lineno - 1 : head_end])),
                    docstring,
                    _dedent(lines[body_start : node.end_lineno], node.col_offset) if rest else "",
                )
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")

    return tuple(walk(ast.parse(file.text).body, ""))


def topics() -> Iterator[tuple[str, list[str]]]:
    """The help topics of the language reference, sorted: name and plain paragraphs."""
    from pydoc_data.topics import topics as texts

    for name in sorted(texts):
        paragraphs = [part.strip("\n") for part in re.split(r"\n\s*\n", texts[name])]
        yield name, [part for part in paragraphs if part.strip() and not re.fullmatch(r"[*=\-~^ ]+", part)]


def _dedent(lines: list[str], columns: int) -> str:
    """Remove `columns` of indentation, so that a method's body sits four columns in, as a function's does."""
    kept = (line[columns:] if not line[:columns].strip() else line for line in lines)
    return "\n".join(line.rstrip() for line in kept).strip("\n")
