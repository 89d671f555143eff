"""Padding taken out and put back, and whole sequences cut into chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashsvd.blocks.running import tokens as tokens_module
from flashsvd.blocks.running.tokens import Tokens
from flashsvd.errors import BackendError

MASKS = st.integers(1, 6).flatmap(
    lambda length: st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=1, max_size=6)
)


def batch_like(mask: Tensor) -> Tensor:
    """Numbers that tell every token from every other, from 1 on."""
    return torch.arange(1, mask.numel() * 2 + 1, dtype=torch.float32).view(*mask.shape, 2)


@given(MASKS)
def test_real_tokens_come_back_where_they_were_and_padding_as_zeros(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    x = batch_like(mask)
    tokens = Tokens.of(x, mask)
    packed = tokens.remove_padding(x)
    assert torch.equal(packed, x[mask])
    assert torch.equal(tokens.restore(packed), x * mask[..., None])


@given(MASKS)
def test_the_map_says_where_each_row_begins_and_which_column_each_token_had(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    tokens = Tokens.of(batch_like(mask), mask)
    lengths = mask.sum(1)
    assert tokens.cu_seqlens.dtype == tokens.positions.dtype == torch.int32
    assert tokens.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert tokens.positions.tolist() == mask.nonzero()[:, 1].tolist()
    assert tokens.lengths == tuple(lengths.tolist())
    assert tokens.max_seqlen == int(lengths.max())


@given(MASKS, st.integers(1, 12))
def test_chunks_are_whole_sequences_in_order(rows: list[list[bool]], most: int) -> None:
    mask = torch.tensor(rows)
    tokens = Tokens.of(batch_like(mask), mask)
    chunks = tokens.chunks(most)
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(tokens.count))
    starts = set(tokens.cu_seqlens.tolist())
    for chunk in chunks:
        bounds = [chunk.start + bound for bound in chunk.cu_seqlens.tolist()]
        assert set(bounds) <= starts
        assert (bounds[0], bounds[-1]) == (chunk.start, chunk.stop)
        assert max(chunk.lengths) <= chunk.max_seqlen
        assert torch.equal(chunk.positions, tokens.positions[chunk.start : chunk.stop])
        assert chunk.stop - chunk.start <= most or len([n for n in chunk.lengths if n]) == 1


def test_chunks_of_equal_sequences_are_of_about_one_size() -> None:
    chunks = Tokens.of(torch.zeros(50, 512), None).chunks(8192)
    assert [chunk.sequences for chunk in chunks] == [12, 12, 13, 13]


@given(MASKS)
def test_places_put_every_sequence_at_the_start_of_a_row_of_its_own(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    (chunk,) = Tokens.of(batch_like(mask), mask).chunks(1000)
    expected = [row * chunk.max_seqlen + column for row, n in enumerate(chunk.lengths) for column in range(n)]
    places = torch.arange(chunk.stop) if chunk.places is None else chunk.places
    assert places.tolist() == expected
    if chunk.key_mask is None:
        assert set(chunk.lengths) == {chunk.max_seqlen}
    else:
        assert chunk.key_mask.flatten().nonzero().flatten().tolist() == expected


@given(MASKS, st.integers(1, 12), st.integers(0, 6))
def test_a_chunk_knows_who_sees_whom_through_a_window_of_columns(rows: list[list[bool]], most: int, reach: int) -> None:
    padding = torch.tensor(rows)
    tokens = Tokens.of(batch_like(padding), padding)
    assert tokens.counted == all(row == sorted(row, reverse=True) for row in rows)
    for chunk in tokens.chunks(most):
        columns, longest = chunk.positions, chunk.max_seqlen
        places = torch.arange(len(columns)) if chunk.places is None else chunk.places
        row, column = places.div(max(1, longest), rounding_mode="floor"), places % max(1, longest)
        mask = chunk.mask(reach)
        assert mask is not None
        seen = mask.expand(chunk.sequences, 1, longest, longest)[row[:, None], 0, column[:, None], column]
        near = (columns[:, None] - columns).abs() <= reach
        together = row[:, None] == row
        assert torch.equal(seen & together, near & together)
        assert (chunk.explicit_positions is None) == tokens.counted
        if tokens.counted:
            assert torch.equal(columns, column)
        assert max(columns.tolist(), default=-1) < chunk.span
        # A window that reaches everyone is none.
        assert (chunk.window(reach) is None) == (reach >= chunk.span - 1)
        assert chunk.window(None) is None


class Hesitating(dict[Any, Any]):
    """A dict in whose every operation another thread may come first."""

    def __contains__(self, key: object) -> bool:
        time.sleep(1e-6)
        return super().__contains__(key)

    def __len__(self) -> int:
        time.sleep(1e-6)
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:
        first = super().__iter__()
        time.sleep(1e-6)
        return first

    def __getitem__(self, key: object) -> Any:
        time.sleep(1e-6)
        return super().__getitem__(key)

    def pop(self, *arguments: Any) -> Any:
        time.sleep(1e-6)
        return super().pop(*arguments)


def test_threads_whose_batches_push_each_other_out_of_the_cache_get_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Hesitating()
    monkeypatch.setattr(tokens_module, "_known", known)
    monkeypatch.setattr(tokens_module, "MOST_KNOWN", 1)
    batches = [torch.zeros(rows, rows + 1, 2) for rows in range(1, 5)]

    def walk(first: int) -> None:
        for i in range(50):
            x = batches[(first + i) % 4]
            tokens = Tokens.of(x, None)
            assert (tokens.batch, tokens.length) == x.shape[:2]
            assert tokens.cu_seqlens.tolist() == list(range(0, x[..., 0].numel() + 1, x.shape[1]))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(walk, first) for first in range(8)]:
            done.result()
    assert len(known) == 1


class Gpu:
    """What tokens ask of a GPU; they themselves are made on the CPU."""

    capturing = False
    stream = 1

    def take(self) -> Tokens:
        return tokens_module._full(2, 3, torch.device("cuda", 0))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu, count = Gpu(), tokens_module._count
    monkeypatch.setattr(tokens_module, "_known", {})
    monkeypatch.setattr(tokens_module, "_count", lambda batch, length, _: count(batch, length, torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=gpu.stream))
    return gpu


def test_a_graph_that_someone_captures_reads_tokens_of_its_own(gpu: Gpu) -> None:
    """Those that are known may be pushed out, and their memory be another's, before the graph is replayed."""
    known = gpu.take()
    assert gpu.take() is known
    gpu.capturing = True
    captured = [gpu.take(), gpu.take()]
    assert len({id(tokens) for tokens in (known, *captured)}) == 3
    gpu.capturing = False
    assert gpu.take() is known


def test_tokens_are_known_on_the_stream_that_they_were_made_on(gpu: Gpu) -> None:
    """Another stream may come to them before they have values, or still be at them when their memory is another's."""
    known = gpu.take()
    gpu.stream = 2
    assert gpu.take() is not known
    gpu.stream = 1
    assert gpu.take() is known


def test_nothing_is_copied_where_nothing_is_padding() -> None:
    x = torch.randn(3, 4, 2)
    for mask in (None, torch.ones(3, 4, dtype=torch.bool)):
        tokens = Tokens.of(x, mask)
        assert tokens.indices is None
        assert tokens.remove_padding(x).data_ptr() == x.data_ptr()
        assert tokens.restore(tokens.remove_padding(x)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 4), (2, 3), (2, 4, 4)])
def test_a_mask_that_is_none_of_padding_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match=r"takes an attention mask \[batch, length\], here \[2, 4\], not \["):
        Tokens.of(torch.zeros(2, 4, 8), torch.ones(shape, dtype=torch.bool))
