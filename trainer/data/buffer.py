"""Tensors of several dtypes and shapes in one block of memory, which moves as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape."""

_ALIGNMENT_BYTES = 256


class Span(NamedTuple):
    """Where a tensor lies in a buffer."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return self.dtype.itemsize * math.prod(self.shape)


class Buffer:
    """A block of memory, uint8 [byte], and views of it by name in `tensors`."""

    def __init__(self, memory: Tensor, layout: Mapping[str, Span]) -> None:
        self.memory, self.layout = memory, layout
        self.tensors = {
            name: memory[span.offset_bytes : span.offset_bytes + span.num_bytes]
            .view(span.dtype)
            .view(span.shape)
            for name, span in layout.items()
        }

    @classmethod
    def allocate(cls, shapes: Shapes, *, pin: bool) -> Buffer:
        """Allocate uninitialised tensors, in page-locked memory if `pin`."""
        layout, end = {}, 0
        for name, (dtype, shape) in shapes.items():
            layout[name] = span = Span(dtype, shape, end)
            # The next tensor starts at a multiple of the alignment, which suits every dtype.
            end += -(-span.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        # torch keeps page-locked blocks and uses each again after the copies from it are done.
        return cls(torch.empty(end, dtype=torch.uint8, pin_memory=pin), layout)

    def to(self, device: torch.device) -> Buffer:
        """Copy to a device; asynchronously on the current stream if the memory is page-locked."""
        return Buffer(self.memory.to(device, non_blocking=True), self.layout)
