"""These tests want a GPU; without one all of them are skipped. ``scripts/test-gpu`` runs them as they are meant."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def missing() -> str | None:
    """Why these tests cannot run here."""
    if not torch.cuda.device_count():
        return f"torch {torch.__version__} finds no CUDA device; scripts/test-gpu runs these on a machine with one"
    if not importlib.util.find_spec("triton"):
        return "the kernels are written in Triton: pip install triton"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if HERE in item.path.parents]
    if ours and (reason := missing()):
        # One line says so, for all of them.
        ours[0].add_marker(pytest.mark.skip(reason=f"and {len(ours) - 1} more in tests/gpu: {reason}"))
        config.hook.pytest_deselected(items=ours[1:])
        left_out = set(ours[1:])
        items[:] = [item for item in items if item not in left_out]
    # To kill a rank may take other processes on its GPU along, so those tests come last.
    items.sort(key=lambda item: "killed" in item.name and HERE in item.path.parents)
