"""C++ compiled where it runs, for the processor it runs on."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_COMPILE_S = 120.0
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")


def compile_library(name: str, flags: Sequence[str] = (), *, march: str = "native") -> ctypes.CDLL:
    """Compile this folder's ``name``.cpp with g++ and load it.

    Raises ``OSError`` or ``subprocess.SubprocessError`` if there is no g++ or it fails.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no g++")
    source = Path(__file__).with_name(f"{name}.cpp")
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        library = Path(folder) / f"{name}.so"
        command = [compiler, *_FLAGS, *flags, f"-march={march}", str(source), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_S)
        return ctypes.CDLL(str(library))
