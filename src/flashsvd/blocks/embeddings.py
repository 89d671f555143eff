"""Fused embeddings: a class that takes the place of a family's embeddings, whose weights stay what they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashsvd.blocks.running.choice import Choices
from flashsvd.blocks.running.packed import PackedModule
from flashsvd.blocks.running.refusals import any_foreign_hooks
from flashsvd.kernels.fused_embeddings import fused_embeddings
from flashsvd.kernels.launch import use_triton

# The module and ids [batch, length] -> positions [batch or 1, length].
Positions = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class EmbeddingParts:
    """How a family's embeddings are built.

    Attributes:
        known: their class in transformers.
        words, norm: names of the table of words and of the norm.
        places, kinds: names of the tables of positions and of token types; empty where there are none.
        positions: those of a batch whose caller gives none.
    """

    known: Any
    words: str = "word_embeddings"
    norm: str = "LayerNorm"
    places: str = "position_embeddings"
    kinds: str = ""
    positions: Positions | None = None

    def fit(self, module: Any) -> bool:
        """Whether a module computes what these say."""
        if type(module) is not self.known or "forward" in vars(module):
            return False
        tables = [getattr(module, name) for name in (self.words, self.places, self.kinds) if name]
        plain = all(type(table) is nn.Embedding and table.max_norm is None for table in tables)
        return plain and type(getattr(module, self.norm)) is nn.LayerNorm and not any_foreign_hooks(module.modules())


def count_columns(module: Any, ids: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... whatever the ids are."""
    positions: Tensor = module.position_ids[:, : ids.shape[1]]
    return positions


class FusedEmbeddings(PackedModule):
    """Mixed into a class of embeddings."""

    parts: EmbeddingParts
    arguments: tuple[str, ...]
    choices: Choices

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        named = dict(zip(self.arguments, arguments, strict=False)) | options
        ids = named.pop("input_ids", None)
        positions, types = named.pop("position_ids", None), named.pop("token_type_ids", None)
        # Other options are embeddings that the caller brings, and what no encoder is given.
        if any(isinstance(x, Tensor) or x for x in named.values()) or not self._can_fuse(ids):
            plain: Tensor = super().forward(*arguments, **options)
            return plain
        parts, norm = self.parts, getattr(self, self.parts.norm)
        if positions is None and parts.positions is not None:
            positions = parts.positions(self, ids)
        if not _fits(positions, ids, 1) or not _fits(types, ids, len(ids)):
            # transformers spreads out what it can, and refuses what it cannot, such as more columns than positions.
            unfused: Tensor = super().forward(*arguments, **options)
            return unfused
        y = fused_embeddings(
            getattr(self, parts.words).weight,
            ids.flatten(),
            norm.weight,
            norm.bias,
            eps=norm.eps,
            places=getattr(self, parts.places).weight if parts.places else None,
            positions=None if positions is None else positions.flatten(),
            kinds=getattr(self, parts.kinds).weight if parts.kinds else None,
            types=None if types is None else types.flatten(),
            backend="triton",
        )
        return y.view(*ids.shape, -1)

    def _can_fuse(self, ids: Any) -> bool:
        """Whether the kernel can take these ids, and nobody watches how their embeddings come about."""
        if type(ids) is not Tensor or ids.ndim != 2 or torch.compiler.is_compiling():
            return False
        words = getattr(self, self.parts.words).weight
        if words.device != ids.device or not use_triton(self.choices.backend, words):
            return False
        # Some families count from behind their padding's position on.
        first = getattr(self, "padding_idx", -1) + 1
        if self.parts.places and ids.shape[1] > len(getattr(self, self.parts.places).weight) - first:
            return False
        if any(module.training for module in self.children() if isinstance(module, nn.Dropout)):
            return False
        gradients = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        return not (gradients or any_foreign_hooks(self.children()) or torch.is_autocast_enabled(ids.device.type))


def _fits(indices: Tensor | None, ids: Tensor, fewest: int) -> bool:
    """Whether there is an index for each id [batch, length]: `fewest` or `batch` rows of them."""
    if indices is None:
        return True
    return indices.ndim == 2 and indices.shape[1] == ids.shape[1] and len(indices) in (fewest, len(ids))


def fuse_embeddings(module: Any, parts: EmbeddingParts, choices: Choices) -> None:
    """Turn a module into fused embeddings, where it is what its family's are."""
    if not parts.fit(module):
        return
    module.parts, module.choices = parts, choices
    module.arguments = tuple(inspect.signature(parts.known.forward).parameters)[1:]
    module.__class__ = type(f"Fused{parts.known.__name__}", (FusedEmbeddings, parts.known), {"__module__": __name__})
