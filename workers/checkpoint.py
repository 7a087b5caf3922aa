"""A checkpoint on disk: its tensors, read lazily and counted."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def resolve(model: str, revision: str | None = None) -> Path:
    """Return the directory of ``model``, fetching it from the hub when it is an id.

    Raises ``ValueError`` naming the field ``model``. Only configuration, tokenizer and safetensors files are fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model: {model} is a file, expected a directory or a hub id")
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path:
        raise ValueError(f"model: no directory {model}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        directory = Path(
            snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.jinja", "*.txt", "*.model"])
        )
        # Repositories may hold the same weights several times over: fetch what the index names
        index = directory / INDEX
        weights = _indexed_files(index) if index.is_file() else [SINGLE]
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.jinja", "*.txt", *weights])
        )
    except HFValidationError as error:
        raise ValueError(f"model: {model!r} is neither a directory nor a valid hub id") from error
    except Exception as error:  # offline, unknown id, no access: the hub client raises many types
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model: {model!r} is not a directory and could not be fetched from the hub: {message}"
        ) from error


def _indexed_files(index: Path) -> list[str]:
    """Return the weight files that a safetensors index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all(isinstance(name, str) for name in names):
            raise TypeError("weight_map must map names to names")
        return sorted(names)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"model: {index} is not a safetensors index: {error}") from error


class LazyTensor:
    """A tensor of a checkpoint, or some of its experts; reading it is counted.

    Loaders index it as ``tensor[...]``. ``experts``: rows along dimension 0 to read, all when None.
    """

    def __init__(self, reader: CheckpointReader, key: str, experts: Sequence[int] | None = None) -> None:
        self._reader, self._key, self._experts = reader, key, experts

    def get_shape(self) -> list[int]:
        """Return the shape that reading gives."""
        shape = list(self._reader.shape(self._key))
        return shape if self._experts is None else [len(self._experts), *shape[1:]]

    def get_dtype(self) -> str:
        """Return the dtype as safetensors spells it."""
        return self._reader.slice(self._key).get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        assert index is Ellipsis, "loaders read whole tensors"
        source = self._reader.slice(self._key)
        if self._experts is None:
            tensor = source[...]
        else:
            tensor = torch.cat([source[start:stop] for start, stop in _runs(self._experts)])
        self._reader.count(tensor.nbytes)
        return tensor


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return ascending ``numbers`` as half-open runs, so that neighbours are read at once."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


class CheckpointReader:
    """The safetensors files of one checkpoint, open while in a ``with`` block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._files: list[Any] = []
        self._slices: dict[str, Any] = {}

    def __enter__(self) -> CheckpointReader:
        names = self._file_names()
        name = ""
        try:
            for name in names:
                file = safe_open(self.directory / name, framework="pt", device="cpu")
                self._files.append(file)
                for key in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    self._slices[key] = file.get_slice(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model: {self.directory / name} is corrupt or unreadable: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._slices.clear()
        self._files.clear()

    def _file_names(self) -> list[str]:
        index = self.directory / INDEX
        if index.is_file():
            names = _indexed_files(index)
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise ValueError(f"model: {self.directory} lacks {len(missing)} weight files, first {missing[0]}")
            return names
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        raise ValueError(f"model: {self.directory} has neither {SINGLE} nor {INDEX}; only safetensors are loaded")

    def keys(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._slices)

    def slice(self, key: str) -> Any:
        """Return safetensors' lazy handle of one tensor."""
        return self._slices[key]

    def shape(self, key: str) -> list[int]:
        """Return the shape of one tensor in the file."""
        return self._slices[key].get_shape()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the checkpoint."""
        return sum(torch.Size(self.shape(key)).numel() * _item_bytes(self.slice(key)) for key in self._slices)

    def count(self, num_bytes: int) -> None:
        """Add to the bytes read; loaders read from several threads."""
        with self._lock:
            self.bytes_read += num_bytes


def _item_bytes(handle: Any) -> int:
    return _ITEM_BYTES.get(handle.get_dtype(), 1)
