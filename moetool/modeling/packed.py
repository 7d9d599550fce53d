"""Experts in the form in which they are stored, inside the family's own block.

A stock block asks its stacked parameter for one expert at a time (`self.gate_up_proj[expert]`, the
`eager` experts of transformers). `Packed` stands in that parameter's place and decodes the expert
that is asked for, so that routing, activation and biases stay the family's own, and only experts
with tokens are decoded.
"""

from __future__ import annotations

import torch
from torch import nn

from moetool.kernels import codec
from moetool.modeling.stacks import Stack, parts
from moetool.surgery import forms
from moetool.surgery.checkpoint import Checkpoint

Tensor = torch.Tensor


class Packed(nn.Module):
    """A stacked parameter of experts, as parts [experts, matrices of an entry, *part]. It is built
    without memory; `fill` reads it.
    """

    def __init__(self, stack: Stack, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = stack.shape, dtype
        self.form, self.params = forms.named(stack.like.form), stack.like.params
        for number, part in enumerate(stack.like.tensors):
            shape = (len(stack.entries), len(stack.entries[0]), *part.shape)
            made = torch.empty(shape, dtype=codec.torch_dtype(part.dtype), device="meta")
            self.register_parameter(f"part{number}", nn.Parameter(made, requires_grad=False))

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        """The matrix of one expert [rows, columns]."""
        entry = [part[int(expert)] for part in self.parameters()]
        each = [self.form.decode(p, self.params) for p in zip(*entry, strict=True)]
        made = torch.cat([m.to(self.dtype) for m in each])
        return made.view(self.shape[1:])

    def fill(self, source: Checkpoint, stack: Stack) -> None:
        """Read every part from the file."""
        for expert, entry in enumerate(stack.entries):
            for number, matrix in enumerate(entry):
                read = parts(source, matrix)
                for mine, theirs in zip(self.parameters(), read, strict=True):
                    mine.data[expert, number].copy_(theirs)
