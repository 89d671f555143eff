"""Real tokens only: padding is taken out once before the layers and put back once after them."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashsvd.errors import BackendError


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some whole sequences of a batch, rows `start` to `stop` of its packed tokens.

    Attributes:
        cu_seqlens: int32, where each of the sequences starts within the chunk, and where the last one ends.
        max_seqlen: at least the length of the longest.
        positions: int32 [stop - start], the column of each token in the padded batch.
        lengths: of the sequences; empty where only the device knows, and the last tokens may belong to none.
        counted: whether the positions of each sequence are 0, 1, 2, ...
        span: all positions lie below it.
    """

    start: int
    stop: int
    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    lengths: tuple[int, ...]
    counted: bool
    span: int

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def explicit_positions(self) -> Tensor | None:
        """The positions; None where kernels can count them."""
        return None if self.counted else self.positions

    def window(self, reach: int | None) -> int | None:
        """The window as a number of columns; None where it takes in every token of a sequence."""
        return None if reach is None or reach >= self.span - 1 else reach

    @functools.cached_property
    def places(self) -> Tensor | None:
        """int64 [stop - start], the place of each token where every sequence takes `max_seqlen` places; None where
        they all do.
        """
        if min(self.lengths) == self.max_seqlen:
            return None
        count = self.stop - self.start
        missing = self.max_seqlen - self.cu_seqlens.diff()
        # Before a token lie the gaps that the sequences before its own leave.
        gaps = (missing.cumsum(0) - missing).repeat_interleave(self.cu_seqlens.diff(), output_size=count)
        return torch.arange(count, device=gaps.device) + gaps

    @functools.cached_property
    def key_mask(self) -> Tensor | None:
        """bool [sequences, 1, 1, max_seqlen], true where `places` puts a token; None where it does everywhere."""
        if self.places is None:
            return None
        columns = torch.arange(self.max_seqlen, device=self.cu_seqlens.device)
        return (columns < self.cu_seqlens.diff()[:, None])[:, None, None]

    @property
    def columns(self) -> Tensor:
        """The columns of the tokens where `places` puts them, [sequences or 1, max_seqlen]."""
        if self.counted:
            return torch.arange(self.max_seqlen, device=self.cu_seqlens.device)[None]
        return spread(self.positions, self)

    def mask(self, window: int | None) -> Tensor | None:
        """bool [sequences or 1, 1, max_seqlen or 1, max_seqlen], whether a token attends to another."""
        if window is None:
            return self.key_mask
        columns = self.columns
        near = (columns[:, None, :, None] - columns[:, None, None, :]).abs() <= window
        return near if self.key_mask is None else near & self.key_mask


def spread(x: Tensor, chunk: Chunk) -> Tensor:
    """[n, ...] -> [sequences, longest, ...], zeros behind shorter sequences."""
    if chunk.places is not None:
        x = x.new_zeros(chunk.sequences * chunk.max_seqlen, *x.shape[1:]).index_copy_(0, chunk.places, x)
    return x.view(chunk.sequences, chunk.max_seqlen, *x.shape[1:])


SMALL_MASK = 4096


@dataclass(frozen=True, eq=False)
class Padding:
    """What the host knows of a batch's padding.

    Attributes:
        mask: [batch, length], not zero where a token is real; None where all are.
        lengths: the number of real tokens of each row.
        counted: whether they stand in its first columns, all padding behind them.
    """

    mask: Tensor | None
    lengths: tuple[int, ...]
    counted: bool

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None) -> Padding:
        """The layout of x [batch, length, ...], real where the mask [batch, length] is true; all of it for None.

        Raises:
            BackendError: the mask does not say which tokens are padding.
        """
        batch, length = x.shape[:2]
        if mask is None:
            return cls(None, (length,) * batch, True)
        if not isinstance(mask, Tensor) or mask.shape != (batch, length):
            given = list(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise BackendError(
                f"an optimised model takes an attention mask [batch, length], here [{batch}, {length}], "
                f"not {given}; load the checkpoint without optimize for other masks"
            )
        # The one place where the host waits for the device, and it counts faster than that launches. What is small is
        # fetched as it is.
        real = (mask if mask.numel() <= SMALL_MASK else mask.bool()).cpu().bool().numpy()
        lengths = real.sum(1)
        full = bool((lengths == length).all())
        counted = not bool((real[:, 1:] > real[:, :-1]).any())
        return cls(None if full else mask.to(x.device), tuple(lengths.tolist()), counted)

    @property
    def count(self) -> int:
        """How many real tokens there are."""
        return sum(self.lengths)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Where the real tokens of a padded batch lie.

    Attributes:
        cu_seqlens: int32 [batch + 1], where each row's tokens start among the packed ones, and where the last ends.
        max_seqlen: at least the length of the longest row.
        positions: int32 [T], the column of each token in the padded batch.
        indices: int64 [T], the place of each token in the flattened batch; None where no padding was removed.
        lengths: the number of tokens of each row; empty where only the device knows, and the last tokens may belong to
            none.
        counted: whether the tokens of each row stand in its first columns, all padding behind them.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor
    indices: Tensor | None
    batch: int
    length: int
    lengths: tuple[int, ...]
    counted: bool
    _chunks: dict[int, tuple[Chunk, ...]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None) -> Tokens:
        """The tokens of x [batch, length, ...], real where the mask [batch, length] is true; all of them for None.

        Raises:
            BackendError: the mask does not say which tokens are padding.
        """
        return cls.behind(x, Padding.of(x, mask))

    @classmethod
    def behind(cls, x: Tensor, padding: Padding) -> Tokens:
        """The tokens of a batch whose padding was found out already."""
        if padding.mask is None:
            return _full(x.shape[0], x.shape[1], x.device)
        longest = max(padding.lengths)
        return cls.masked(padding.mask.bool(), padding.count, longest, padding.counted, padding.lengths)

    @classmethod
    def masked(cls, mask: Tensor, count: int, max_seqlen: int, counted: bool, lengths: tuple[int, ...] = ()) -> Tokens:
        """The tokens where the mask [batch, length] is true, found without the host waiting for the device.

        Args:
            count: at least as many as there are; surplus tokens are given the place behind the batch's last.
        """
        batch, length = mask.shape
        indices = torch.nonzero_static(mask.flatten(), size=count, fill_value=mask.numel()).squeeze(1)
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=mask.device)
        torch.cumsum(mask.sum(1), 0, dtype=torch.int32, out=cu_seqlens[1:])
        positions = (indices % length).to(torch.int32)
        return cls(cu_seqlens, max_seqlen, positions, indices, batch, length, lengths, counted)

    @property
    def count(self) -> int:
        return self.positions.shape[0]

    @property
    def span(self) -> int:
        """All positions lie below it."""
        return self.max_seqlen if self.counted else self.length

    def remove_padding(self, x: Tensor) -> Tensor:
        """[batch, length, ...] -> [T, ...]; a view where nothing is removed."""
        flat = x.flatten(0, 1)
        if self.indices is None:
            return flat
        # Surplus tokens, which belong behind the batch, may read any of it.
        indices = self.indices if self.lengths else self.indices.clamp(max=len(flat) - 1)
        return flat.index_select(0, indices)

    def restore(self, y: Tensor) -> Tensor:
        """[T, ...] -> [batch, length, ...], zeros at padding; a view where nothing was removed."""
        if self.indices is not None:
            places = self.batch * self.length
            # With a place behind the batch for surplus tokens.
            room = places if self.lengths else places + 1
            y = y.new_zeros(room, *y.shape[1:]).index_copy_(0, self.indices, y)[:places]
        return y.view(self.batch, self.length, *y.shape[1:])

    def chunks(self, most: int) -> tuple[Chunk, ...]:
        """Whole sequences together, in order: about equal numbers of tokens, `most` or one sequence at the most."""
        if most not in self._chunks:
            self._chunks[most] = tuple(self._cut(most))
        return self._chunks[most]

    def _cut(self, most: int) -> Iterator[Chunk]:
        if self.count <= most or not self.lengths:
            yield Chunk(
                0,
                self.count,
                self.cu_seqlens,
                self.max_seqlen,
                self.positions,
                self.lengths,
                self.counted,
                self.span,
            )
            return
        ends = list(itertools.accumulate(self.lengths))
        first = start = 0
        for row, end in enumerate(ends):
            following = ends[row + 1] if row + 1 < len(ends) else None
            # Behind the last token there may be empty sequences yet.
            left = max(1, self.count - start)
            if following is None or following - start > -(-left // -(-left // most)):
                lengths = self.lengths[first : row + 1]
                if end > start:
                    cu_seqlens = self.cu_seqlens[first : row + 2] - self.cu_seqlens[first]
                    longest = max(lengths)
                    span = longest if self.counted else self.length
                    positions = self.positions[start:end]
                    yield Chunk(start, end, cu_seqlens, longest, positions, lengths, self.counted, span)
                first, start = row + 1, end


# Of batches without padding, which are mostly of a few shapes; on the stream that they were made on.
_known: dict[tuple[int, int, torch.device, int], Tokens] = {}
MOST_KNOWN = 32
_lock = threading.Lock()


def _full(batch: int, length: int, device: torch.device) -> Tokens:
    """Every token is real."""
    stream = 0
    if device.type == "cuda":
        # A graph reads its own: what is made while it is captured has no values before its replay, and what is known
        # may be dropped by then.
        if torch.cuda.is_current_stream_capturing():
            return _count(batch, length, device)
        stream = torch.cuda.current_stream(device).cuda_stream
    key = (batch, length, device, stream)
    with _lock:
        if key not in _known:
            tokens = _count(batch, length, device)
            if len(_known) >= MOST_KNOWN:
                _known.pop(next(iter(_known)))
            _known[key] = tokens
        return _known[key]


def _count(batch: int, length: int, device: torch.device) -> Tokens:
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    positions = torch.arange(length, dtype=torch.int32, device=device).repeat(batch)
    return Tokens(cu_seqlens, length, positions, None, batch, length, (length,) * batch, True)
