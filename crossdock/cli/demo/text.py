"""What the demo trains on: the source of the machine's own Python standard library, byte by byte.

Letters: B sequences of a batch, N bytes of a sequence.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from crossdock.errors import ConfigError

MAX_BYTES = 6 * 2**20
"""Less than this is read: a minute of training sees a fraction of it."""
MIN_BYTES = 2**18
_HELD_OUT = 16
"""One part in this many, the end of the text, is never trained on."""
_SKIPPED = frozenset(
    {
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
        *("encodings", "pydoc_data", "entities.py"),  # tables, which are easier to guess than programs
    }
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Text:
    """A text in two parts, bytes as uint8; the model learns from the one and is tested on the other."""

    train: UInt8[Tensor, "train_bytes"]
    held_out: UInt8[Tensor, "held_out_bytes"]
    num_files: int


def standard_library(folder: Path | None = None) -> Text:
    """The sources of Python's standard library, files in the order of their paths; the same on all ranks of a host.

    Raises:
        ConfigError: this Python came without them.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    parts: list[bytes] = []
    num_bytes = 0
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts) and path.is_file():
            parts.append(path.read_bytes())
            num_bytes += len(parts[-1])
        if num_bytes >= MAX_BYTES:
            break
    if num_bytes < MIN_BYTES:
        raise ConfigError(
            f"{root} has {num_bytes} bytes of Python source; the demo trains on {MIN_BYTES} at least: run it with a "
            f"Python whose standard library lies there as .py files (python.org's, a distribution's, pyenv's)"
        )
    text = torch.from_numpy(np.frombuffer(b"".join(parts)[:MAX_BYTES], dtype=np.uint8).copy())
    num_held_out = len(text) // _HELD_OUT
    return Text(train=text[:-num_held_out], held_out=text[-num_held_out:], num_files=len(parts))


def draw_batch(
    text: UInt8[Tensor, "n"], *, num_sequences: int, length: int, seed: int, step: int
) -> Int64[Tensor, "B N"]:
    """Sequences from random places of the text, the same for a step whoever asks: each rank draws all, and takes some.

    >>> draw_batch(torch.arange(9, dtype=torch.uint8), num_sequences=2, length=3, seed=0, step=5)
    tensor([[1, 2, 3],
            [5, 6, 7]])
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(text) - length + 1, (num_sequences, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def as_text(tokens: Sequence[int]) -> str:
    r"""Bytes as a person reads them; what is no text, and what would steer a terminal, becomes a replacement mark.

    >>> as_text([105, 102, 10, 27, 255])
    'if\n\ufffd\ufffd'
    """
    text = bytes(tokens).decode("utf-8", errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
