"""Which checkpoint a profile is of, by a few reads of each file."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK_BYTES = 1 << 16
_NUM_BLOCKS = 256
"""Read of a weight file, spread evenly over it, so that few tensors could change unseen; 16 MiB at most."""


def model_fingerprint(directory: Path) -> str:
    """Return what tells this checkpoint from others: of config.json, and of name, size and a sample of weight files.

    Raises ``ValueError`` naming ``model`` if a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        digest.update((directory / "config.json").read_bytes())
        for file in sorted(directory.glob("*.safetensors")):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as weights:
                for block in range(_NUM_BLOCKS):
                    weights.seek(max(0, size - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1))
                    digest.update(weights.read(_BLOCK_BYTES))
    except OSError as error:
        raise ValueError(f"model: cannot read {error.filename}: {error.strerror}") from error
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a whole file."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
