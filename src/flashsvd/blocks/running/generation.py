"""`generate` of an optimised model: greedy decoding and sampling in a loop of our own, all else in transformers'.

transformers' `generate` prepares everything and then calls a method for the way of decoding. For greedy decoding and
sampling that is `_sample`, which is overridden here: where nothing is asked for that a preallocated cache and steps in
CUDA graphs could not do, the loop below runs, which waits for the GPU every few tokens only.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from flashsvd.blocks.running.alone import one_at_a_time
from flashsvd.blocks.running.decoding import MOST_ENDS, Decoder, DecoderModel
from flashsvd.blocks.running.refusals import any_foreign_hooks
from flashsvd.blocks.running.stack import on_device
from flashsvd.blocks.running.watch import Watch
from flashsvd.common.caller_state import ordinary_tensors
from flashsvd.kernels.launch import why_not_triton

# Room in a cache is a multiple of this many tokens, so that one serves prompts of about the same length.
ROOM_STEP = 256
# Caches that are kept for another call, each with its graphs.
MOST_DECODERS = 2
# Steps after which the host looks whether all rows have ended.
STEPS_A_LOOK = 8
KNOWN_INPUTS = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position",
    # What `stop_strings` were tokenized by.
    "tokenizer",
}  # fmt: skip
# What transformers' loop calls of a model; on an instance they are somebody's own.
CALLED = ("forward", "__call__", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
OUTPUTS = ("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits")


class Decoders:
    """The decoders of one model, of which one runs at a time.

    Args:
        describe: a causal language model of transformers -> what of it a step runs.
        in_graphs: whether steps are CUDA graphs.
    """

    def __init__(self, describe: Callable[[Any], DecoderModel], in_graphs: bool) -> None:
        self.describe, self.in_graphs = describe, in_graphs
        self._lock = threading.RLock()
        self._running = False
        self._kept: OrderedDict[tuple[int, int], Decoder] = OrderedDict()
        self._watch: Watch | None = None
        self._last: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoders:
        # Graphs read the weights of the model that they were captured from.
        return Decoders(self.describe, self.in_graphs)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of the caches that are kept."""
        return sum(decoder.bytes for decoder in self._kept.values())

    @property
    def graphs(self) -> int:
        """How many CUDA graphs are kept."""
        return sum(decoder.graphs for decoder in self._kept.values())

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """This thread's turn to generate, for which it waits.

        It does not, and has none, in the middle of a capture or a measurement, which another thread's generation may
        be waiting for.
        """
        taken = self._lock.acquire(blocking=not one_at_a_time.is_mine)
        try:
            yield taken
        finally:
            if taken:
                self._lock.release()

    def forget(self) -> None:
        """Free all caches and graphs, once the last run is done."""
        with self._lock:
            self._finish()
            self._kept.clear()
            self._watch = None

    def _finish(self) -> None:
        if self._last is not None:
            self._last.synchronize()

    def run(self, model: Any, request: Request) -> Tensor | None:
        """All ids [rows, tokens].

        None where a streamer or a criterion asks for it in the middle of a run, and where memory for the whole length
        is not to be had.
        """
        with self._lock, on_device(request.ids), ordinary_tensors(), torch.no_grad():
            if self._running:
                return None
            self._running = True
            try:
                self._wait_for_last(request.ids)
                decoder = self._take(model, len(request.ids), request.longest)
                return None if decoder is None else run(decoder, request).clone()
            finally:
                self._running = False
                if request.ids.is_cuda:
                    self._last = torch.cuda.current_stream().record_event()

    def _wait_for_last(self, x: Tensor) -> None:
        """Another stream may still be at the caches."""
        if self._last is not None and x.is_cuda:
            torch.cuda.current_stream().wait_event(self._last)

    def watched(self, model: Any) -> Watch:
        """The model as it is now; what was kept of it as it was before is gone."""
        with self._lock:
            if self._watch is None or not self._watch.holds():
                self.forget()
                self._watch = Watch(model)
            return self._watch

    def _take(self, model: Any, rows: int, length: int) -> Decoder | None:
        """A decoder for so many rows of up to so many tokens; None where there is no memory for it."""
        watch = self.watched(model)
        key = rows, -(-length // ROOM_STEP) * ROOM_STEP
        if key not in self._kept:
            if len(self._kept) >= MOST_DECODERS:
                self._finish()
                self._kept.popitem(last=False)
            weight = watch.weight
            in_graphs = self.in_graphs and weight.is_cuda and not why_not_triton(weight) and not watch.foreign
            try:
                self._kept[key] = Decoder(self.describe(model), *key, in_graphs)
            except torch.OutOfMemoryError:
                if not self._kept:
                    return None
                self._finish()
                self._kept.clear()
                return self._take(model, rows, length)
        self._kept.move_to_end(key)
        return self._kept[key]


@dataclass(frozen=True)
class Request:
    """What a call of `generate` asks of the loop.

    Attributes:
        ids: [rows, length].
        first: the column of each row's first token, int32 [rows]; None without padding.
        longest: how many tokens a row has at most, the prompt's among them.
        ends: ids that end a row.
        watched: stopping criteria that are asked after every token.
    """

    ids: Tensor
    first: Tensor | None
    longest: int
    ends: tuple[int, ...]
    pad: int
    processors: Any
    watched: Any
    sampling: bool
    streamer: Any


class Generates:
    """Mixed into a causal language model."""

    decoders: Decoders

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        with self.decoders.turn() as has_turn:
            written = None
            if has_turn:
                written = self._written(
                    input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer,
                    model_kwargs,
                )  # fmt: skip
        if written is not None:
            return written
        return super()._sample(  # type: ignore[misc]  # of the model that this is mixed into
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
        )

    def _written(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        synced_gpus: bool, streamer: Any, model_kwargs: dict[str, Any],
    ) -> Tensor | None:  # fmt: skip
        """All ids by the loop of our own; None for calls that it does not serve."""
        request = None
        at_hand = input_ids.device == next(self.parameters()).device  # type: ignore[attr-defined]  # as below
        if at_hand and not synced_gpus and may_loop(self, generation_config, model_kwargs):
            request = request_of(
                input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs
            )
        return None if request is None else self.decoders.run(self, request)

    def _valid_auto_compile_criteria(self, *_: Any, **__: Any) -> bool:
        # Fused blocks are not compiled again.
        return False

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.decoders.forget()
        return super()._apply(*arguments, **options)  # type: ignore[misc]  # as above


def may_loop(model: Any, config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether a call asks for nothing but ids, of a model that nobody watches."""
    if any(getattr(config, name, None) for name in OUTPUTS) or getattr(config, "is_assistant", False):
        return False
    if getattr(config, "prefill_chunk_size", None) is not None or not inputs.get("use_cache"):
        return False
    if any(value is not None for name, value in inputs.items() if name not in KNOWN_INPUTS):
        return False
    if not _is_fresh(inputs.get("past_key_values")) or torch.is_autocast_enabled(model.device.type):
        return False
    if any(name in vars(model) for name in CALLED) or any_foreign_hooks([model]):
        return False
    return not model.decoders.watched(model).is_tampered()


def _is_fresh(cache: Any) -> bool:
    """Whether it is a plain cache that `generate` made, and will not hand out."""
    if cache is None:
        return True
    if type(cache) not in (DynamicCache, StaticCache) or getattr(cache, "_is_user_defined", False):
        return False
    # Whoever keeps it off the GPU has no room for ours there.
    if getattr(cache, "offloading", False):
        return False
    return int(cache.get_seq_length()) == 0


def request_of(
    ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, inputs: Mapping[str, Any]
) -> Request | None:
    """What is asked for; None where the loop does not do it."""
    longest = [int(c.max_length) for c in criteria if type(c) is MaxLengthCriteria]
    watched = type(criteria)(c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria))
    if not longest or ids.shape[1] == 0 or min(longest) <= ids.shape[1]:
        return None
    # By such a criterion transformers pads rows that have ended.
    if any(hasattr(c, "eos_token_id") for c in watched):
        return None
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if any(x is not None and x.device != ids.device for x in (mask, positions)):
        return None
    layout = layout_of(ids, mask, positions)
    if layout is None:
        return None
    first, facts = layout
    pad = config._pad_token_tensor
    tensors = [torch.as_tensor(c.eos_token_id) for c in criteria if type(c) is EosTokenCriteria]
    (fits, padded), pads, *found = read_at_once(facts, pad, *tensors)
    ends = list(itertools.chain.from_iterable(found))
    if not fits or len(ends) > MOST_ENDS or (ends and pad is None):
        return None
    return Request(
        ids, first if padded else None, min(longest), tuple(ends), pads[0] if pads else 0, processors, watched,
        bool(config.do_sample), streamer,
    )  # fmt: skip


def layout_of(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The column of each row's first token, int32 [rows]; and on the device, whether there is no other padding and no
    other position than that says, and whether there is any padding, bool [2]. None for shapes that are not those of
    ids.
    """
    rows, length = ids.shape
    if (mask is not None and mask.shape != ids.shape) or (positions is not None and positions.shape[-1] != length):
        return None
    columns = torch.arange(length, device=ids.device)
    fits = torch.ones((), dtype=torch.bool, device=ids.device)
    if mask is None:
        first = torch.zeros(rows, dtype=torch.int32, device=ids.device)
    else:
        real = mask != 0
        first = (length - real.sum(1)).int()
        fits = (real == (columns >= first[:, None])).all() & (first < length).all()
    if positions is not None:
        counted = columns - first[:, None]
        fits = fits & ((positions == counted) | (counted < 0)).all()
    return first, torch.stack([fits, first.any()])


def read_at_once(*tensors: Tensor | None) -> list[list[int]]:
    """The numbers of each, none of None; the host waits for them once."""
    given = [() if x is None else x.flatten().long() for x in tensors]
    device = next(x.device for x in given if isinstance(x, Tensor))
    numbers = iter(torch.cat([x.to(device) for x in given if isinstance(x, Tensor)]).tolist())
    return [list(itertools.islice(numbers, len(x))) for x in given]


def run(decoder: Decoder, request: Request) -> Tensor:
    """All ids [rows, tokens], which the decoder's next run overwrites."""
    start = request.ids.shape[1]
    logits = decoder.prompt(request.ids, request.first, request.ends, request.pad)
    if request.sampling or len(request.processors) or len(request.watched) or request.streamer is not None:
        return _one_by_one(decoder, request, logits)
    decoder.append_best(logits)
    look = _Look(decoder.ended) if request.ends else None
    for done in range(1, request.longest - start):
        decoder.step(greedy=True)
        if look and done % STEPS_A_LOOK == 0 and look.all_ended():
            break
    end = decoder.column + 1
    return decoder.tokens[:, : _shortened(decoder, start, end) if request.ends else end]


def _one_by_one(decoder: Decoder, request: Request, logits: Tensor) -> Tensor:
    """The loop in which something is done with the logits or the ids of every step."""
    while True:
        # Whoever is asked may keep what it is shown.
        seen = decoder.tokens[:, : decoder.column + 1].clone()
        scores = logits.to(torch.float32, copy=True)
        if len(request.processors):
            scores = request.processors(seen, scores)
        if request.sampling:
            best = torch.multinomial(torch.softmax(scores, -1), num_samples=1)[:, 0]
        else:
            best = scores.argmax(-1)
        has_ends = bool(request.ends)
        if has_ends:
            best = torch.where(decoder.ended, decoder.pad, best)
            decoder.ended |= (best[:, None] == decoder.ends).any(1)
        decoder.append(best)
        seen = decoder.tokens[:, : decoder.column + 1].clone()
        if request.streamer is not None:
            request.streamer.put(best.cpu())
        if len(request.watched):
            decoder.ended |= request.watched(seen, None)
        if seen.shape[1] >= request.longest or ((has_ends or len(request.watched)) and bool(decoder.ended.all())):
            break
        logits = decoder.step(greedy=False)
    if request.streamer is not None:
        request.streamer.end()
    return seen


def _shortened(decoder: Decoder, start: int, end: int) -> int:
    """The column after the one in which the last row ended; `end` where one did not."""
    new = decoder.tokens[:, start:end]
    ended = (new[:, :, None] == decoder.ends).any(2).int().cummax(1).values.bool().all(0)
    return min(end, start + int((~ended).sum()) + 1)


class _Look:
    """Whether all rows have ended, as of the look before: the host does not wait for what it has just queued."""

    def __init__(self, ended: Tensor) -> None:
        self._ended = ended
        self._flags = [torch.zeros((), dtype=torch.bool, pin_memory=ended.is_cuda) for _ in range(2)]
        self._events: list[Any] = []

    def all_ended(self) -> bool:
        if not self._ended.is_cuda:
            return bool(self._ended.all())
        flag = self._flags[len(self._events) % 2]
        flag.copy_(self._ended.all(), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        self._events.append(event)
        if len(self._events) == 1:
            return False
        self._events[-2].synchronize()
        return bool(self._flags[len(self._events) % 2])
