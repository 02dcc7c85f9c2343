"""The Triton kernels in Triton's interpreter, which runs them on the CPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from glmquant.ops import triton as on_gpu

needs_interpreter = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs Triton, and a machine without a GPU, where its interpreter is used",
)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is meant for a GPU takes tensors on the CPU."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """The interpreter multiplies the bits of bfloat16 as integers."""
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(operand, tl.float32) for operand in (a, b))
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(on_gpu, "why_not", lambda device: None)


@pytest.fixture
def as_on_a_gpu(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators choose the Triton kernel, though the operands are on the CPU."""
    from dataclasses import replace

    from glmquant.ops import choice

    kernel = next(i for i in choice.IMPLEMENTATIONS if i.name == "Triton kernel")
    there = replace(kernel, objection=lambda request: on_gpu.objection(replace(request, device="cuda")))
    monkeypatch.setattr(choice, "IMPLEMENTATIONS", [there, choice.IMPLEMENTATIONS[-1]])


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> torch.device:
    """torch says that there is a GPU of this compute capability, with nothing known about it yet."""
    monkeypatch.setattr(on_gpu, "_found", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test")
    return torch.device("cuda")
