"""One decoding step of a model, from the ids of the last tokens to the next ones, as a CUDA graph where that can be.

A `Decoder` has a preallocated cache for some rows and the graphs that read and write it. What a step reads and leaves
lies in it: the ids, their column, and for greedy decoding the next ids and which rows have ended, so that steps follow
one another without the host.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flashsvd.blocks.running.alone import one_at_a_time
from flashsvd.blocks.running.sequences import Prompt, Step, Tables
from flashsvd.blocks.running.stored import StoredLayer
from flashsvd.errors import first_line
from flashsvd.kernels.decode_call import ARRIVALS
from flashsvd.kernels.greedy_append import greedy_append
from flashsvd.kernels.launch import Backend

log = logging.getLogger("flashsvd")

WARMUP_RUNS = 2
# Longer prompts keep a GPU busy without graphs, which would hold their activations.
MOST_PROMPT_TOKENS = 4096
# Lengths of prompts of which there are graphs; the one that was used longest ago makes room for another.
MOST_PROMPTS = 8
# Ids that end a row, for which a graph has room.
MOST_ENDS = 16
NO_ID = -1


class Block(Protocol):
    """What a layer computes, and what it stores."""

    def store(self, rows: int, room: int) -> StoredLayer:
        """A new cache for so many rows of so many tokens."""

    def step(self, x: Tensor, at: Step, stored: StoredLayer) -> Tensor:
        """One token of each row, x [rows, hidden]."""

    def prompt(self, x: Tensor, at: Prompt, stored: StoredLayer) -> Tensor:
        """All tokens of all rows, x [rows * length, hidden], which may be overwritten."""


@dataclass(frozen=True)
class DecoderModel:
    """What of a causal language model a step runs.

    Attributes:
        embed: ids and positions, [n] each -> hidden states [n, hidden].
        head: hidden states [n, hidden] -> logits [n, vocabulary], the last norm included.
        tables: cos, sin [at least span, head_dim / 2] in the dtype of a tensor; None without rotation.
        weight: one of the model's, of its dtype and device.
        backend: of the kernel that appends tokens.
    """

    blocks: Sequence[Block]
    embed: Callable[[Tensor, Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    tables: Callable[[int, Tensor], Tables] | None
    weight: Tensor
    backend: Backend = "auto"


class Decoder:
    """The cache and the graphs for batches of some rows, of at most `room` tokens each."""

    def __init__(self, model: DecoderModel, rows: int, room: int, in_graphs: bool) -> None:
        self.model, self.rows, self.room, self.in_graphs = model, rows, room, in_graphs
        weight = model.weight
        self.layers = [block.store(rows, room) for block in model.blocks]
        self.tables = None if model.tables is None else model.tables(room, weight)
        # Side by side, so that one launch looks a step's angles up.
        self._angles = None if self.tables is None else torch.cat(self.tables, 1)
        options: Any = {"device": weight.device}
        self.tokens = torch.zeros(rows, room, dtype=torch.int64, **options)
        self.ids = torch.zeros(rows, dtype=torch.int64, **options)
        self.position = torch.zeros(1, dtype=torch.int32, **options)
        self.first = torch.zeros(rows, dtype=torch.int32, **options)
        self.ended = torch.zeros(rows, dtype=torch.bool, **options)
        self.ends = torch.full((MOST_ENDS,), NO_ID, dtype=torch.int64, **options)
        self.pad = torch.zeros(1, dtype=torch.int64, **options)
        self.arrivals = torch.zeros(ARRIVALS, dtype=torch.int32, **options)
        self._appending = torch.zeros(1, dtype=torch.int32, **options)
        self.column = 0
        self._padded = False
        self._ends: tuple[int, ...] = ()
        self._graphs: dict[tuple[bool, bool], tuple[Any, Tensor]] = {}
        self._prompts: OrderedDict[tuple[int, bool], tuple[Tensor, Any, Tensor]] = OrderedDict()
        self._seen: set[tuple[int, bool]] = set()
        self._pool: Any = None
        self._stream: Any = None

    @property
    def bytes(self) -> int:
        """Of the cache."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in (layer.keys, layer.values))

    @property
    def graphs(self) -> int:
        """How many were captured, of steps and of prompts."""
        return len(self._graphs) + len(self._prompts)

    def prompt(self, ids: Tensor, first: Tensor | None, ends: Sequence[int], pad: int) -> Tensor:
        """Begin with ids [rows, length]; returns the logits [rows, vocabulary] of what follows.

        Args:
            first: the column of each row's first token, int32 [rows], where there is padding before some.
            ends: ids that end a row.
            pad: what then follows in it.
        """
        length = ids.shape[1]
        self.tokens[:, :length] = ids
        self.column, self._padded = length - 1, first is not None
        self.position.fill_(length - 1)
        self.first.zero_() if first is None else self.first.copy_(first)
        self.ended.zero_()
        if (ends := tuple(ends)) != self._ends:
            self.ends.copy_(torch.tensor([*ends, *[NO_ID] * (MOST_ENDS - len(ends))]))
            self._ends = ends
        self.pad.fill_(pad)
        if not self.in_graphs or ids.numel() > MOST_PROMPT_TOKENS:
            return self._read(ids)
        key = length, self._padded
        if key not in self._prompts:
            if not self._come_again(key):
                return self._read(ids)
            place = ids.clone()
            if (found := self._captured(lambda: self._read(place))) is None:
                return self._read(ids)
            self._prompts[key] = place, *found
        place, graph, logits = self._prompts[key]
        self._prompts.move_to_end(key)
        place.copy_(ids)
        graph.replay()
        return logits

    def _come_again(self, key: tuple[int, bool]) -> bool:
        """Whether prompts of this length came before, which makes room for a graph."""
        if key not in self._seen:
            self._seen.add(key)
            return False
        while len(self._prompts) >= MOST_PROMPTS:
            self._prompts.popitem(last=False)
        return True

    def _read(self, ids: Tensor) -> Tensor:
        """The logits after ids [rows, length], whose keys and values go into the cache."""
        at = Prompt.of(ids, self.first if self._padded else None, self.tables)
        x = self.model.embed(ids.flatten(), at.positions)
        for block, stored in zip(self.model.blocks, self.layers, strict=True):
            x = block.prompt(x, at, stored)
        return self.model.head(x.view(*ids.shape, -1)[:, -1].contiguous())

    def append(self, ids: Tensor) -> None:
        """Take ids [rows] for the next tokens."""
        self.position += 1
        self.column += 1
        self.tokens.index_copy_(1, self.position.long(), ids[:, None])
        self.ids.copy_(ids)

    def append_best(self, logits: Tensor) -> None:
        """Take the most probable ids; in rows that have ended, padding."""
        greedy_append(
            logits, self.ends, self.pad, self.ids, self.tokens, self.position, self.ended, self._appending,
            backend=self.model.backend,
        )  # fmt: skip
        self.column += 1

    def step(self, greedy: bool) -> Tensor:
        """The logits [rows, vocabulary] after the last ids, which the next step overwrites.

        Args:
            greedy: whether the best ids are appended, too.
        """
        key = greedy, self._padded
        if self.in_graphs and key not in self._graphs:
            self._graphs |= {key: found} if (found := self._captured_step(greedy)) else {}
        if not self.in_graphs:
            return self._run(greedy)
        graph, logits = self._graphs[key]
        graph.replay()
        self.column += greedy
        return logits

    def _run(self, greedy: bool) -> Tensor:
        logits = self._logits()
        if greedy:
            self.append_best(logits)
        return logits

    def _logits(self) -> Tensor:
        first = self.first if self._padded else None
        positions = self.position.expand(self.rows) if first is None else self.position - first
        tables = None
        if self._angles is not None:
            cos, sin = self._angles.index_select(0, positions).chunk(2, 1)
            tables = cos, sin
        at = Step(self.column, self.position, first, tables, self.tables, self.arrivals)
        x = self.model.embed(self.ids, positions)
        for block, stored in zip(self.model.blocks, self.layers, strict=True):
            x = block.step(x, at, stored)
        return self.model.head(x)

    def _captured_step(self, greedy: bool) -> tuple[Any, Tensor] | None:
        """The graph of a step. What it is warmed up with writes where the next token's key and value will lie."""
        column = self.column
        graph = self._captured(lambda: self._run(greedy), warm_up=self._logits)
        self.column = column
        return graph

    def _captured(
        self, run: Callable[[], Tensor], warm_up: Callable[[], Tensor] | None = None
    ) -> tuple[Any, Tensor] | None:
        """The graph of a call, and its result, after it was run a few times, or what is as good for that.

        None where there is no memory for it: from then on nothing is captured.
        """
        with one_at_a_time:
            here = torch.cuda.current_stream()
            self._stream = stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            stream.wait_stream(here)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARMUP_RUNS):
                        (warm_up or run)()
                here.wait_stream(stream)
                # A capture that fails leaves its stream in place.
                capture = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
                with torch.cuda.stream(here), capture:
                    result = run()
            except torch.OutOfMemoryError as error:
                log.warning("generation goes on without CUDA graphs: %s", first_line(error))
                self.in_graphs, self._pool = False, None
                # What those hold is wanted now.
                self._graphs.clear()
                self._prompts.clear()
                return None
            self._pool = graph.pool()
        return graph, result
