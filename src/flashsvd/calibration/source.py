"""Which text a model is calibrated on, how it is cut into batches, and which loss belongs to it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashsvd.calibration.batches import labelled_batches, masked_batches, text_batches, window_batches
from flashsvd.calibration.losses import Loss, head_loss, similarity_loss
from flashsvd.calibration.probes import embedding_probe, state_probe
from flashsvd.data.own_task import fit_task
from flashsvd.data.rows import load_examples
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import TASKS, Task, check_classifier, label_permutation
from flashsvd.data.text import load_text
from flashsvd.data.tokenize import Batch, Tokenize, token_ids
from flashsvd.errors import DataError
from flashsvd.methods.method import Need
from flashsvd.models.heads import fitting_tasks, head_classes, head_of
from flashsvd.models.loading import check_tokenizer, check_tokens, load_tokenizer
from flashsvd.models.sentence import SentenceEncoder, encoder_length, read_sentence_encoder

log = logging.getLogger("flashsvd")

WINDOW_TOKENS, TEXT_TOKENS = 512, 128


@dataclass(frozen=True)
class CalibrationRequest:
    """What the user asked of calibration; None leaves it to the kind of model.

    Attributes:
        data: a file or a directory with a train file; None takes the task's training split from the hub, and
            WikiText-2's where there is no task.
    """

    data: str | None
    draw: Draw
    seq_len: int | None
    batch_size: int


@dataclass(frozen=True)
class Calibration:
    """Everything that a pass over calibration data takes.

    Attributes:
        loss: None where nothing says what the model's outputs should be.
        probe: what a search for ranks by the loss differentiates.
        about: how it came about, for the checkpoint's metadata.
    """

    batches: Sequence[Batch]
    loss: Loss | None
    probe: Loss
    about: Mapping[str, Any]

    def losses(self, needs: Collection[Need]) -> dict[Loss, set[Need]]:
        """Which gradients are taken of which loss: those by outputs are for the search for ranks, by weights not."""
        found: dict[Loss, set[Need]] = {}
        if "row_gradients" in needs:
            assert self.loss is not None, "the caller refuses needs that no loss meets"
            found[self.loss] = {"row_gradients"}
        if "output_gradients" in needs:
            found.setdefault(self.probe, set()).add("output_gradients")
        return found


def prepare_calibration(
    request: CalibrationRequest, task: Task | None, model_class: Any, model_config: Any, source: str, longest: int
) -> Calibration:
    """Read and tokenise the calibration data of a model that is not loaded yet.

    Args:
        model_class: the transformers class that the model will be loaded as.
        longest: the longest sequence the model can read.

    Raises:
        FlashSVDError: the data, the tokenizer or the sequence length cannot be used.
    """
    if task is not None and not task.is_fitted:
        task = fit_task(task, "train", request.data, head_classes(model_config))
    kind = _kind(task, model_class, model_config)
    if kind == "similarity":
        default = encoder_length(source, model_config)
    else:
        default = WINDOW_TOKENS if kind == "causal-lm" else TEXT_TOKENS
    seq_len = request.seq_len or min(default, longest)
    if seq_len > longest:
        raise DataError(f"--calib-seq-len {seq_len} is above {longest}, the longest {source} can read")
    tokenizer = load_tokenizer(source)
    if kind != "causal-lm":
        check_tokenizer(tokenizer, source, masks=kind == "masked-lm")
    shortest = 2 if kind == "causal-lm" else 1 + tokenizer.num_special_tokens_to_add(pair=_is_pair(task))
    if seq_len < shortest:
        raise DataError(
            f"--calib-seq-len {seq_len} is below {shortest}, the shortest that holds anything to learn from"
        )
    if kind == "classifier":
        check_classifier(model_config, source)
    encoder = None
    if kind == "similarity":
        encoder = read_sentence_encoder(source, model_config).adapted(tokenizer)
    tokenize = Tokenize(tokenizer, seq_len)
    if task is not None:
        tokenize = Tokenize.of(task, tokenizer, seq_len, prompt=encoder.prompt if encoder else "")
    if kind in ("classifier", "similarity"):
        assert task is not None, "these kinds come from a task"
        batches = _labelled(request, task, model_config, tokenize)
    else:
        batches = _running_text(request, kind, tokenize, model_config if task is None else None)
    if not sum(batch.tokens for batch in batches):
        raise DataError("the calibration samples hold no tokens; give other --calib-data")
    for batch in batches:
        check_tokens(batch.largest, model_config, source)
    about = {
        "kind": kind,
        "task": task.name if task else None,
        "data": request.data or f"hub:{(task or TASKS['wikitext2']).hub_config or TASKS['wikitext2'].hub_config}",
        "samples": sum(len(batch.inputs[0]["input_ids"]) for batch in batches),
        "tokens": sum(batch.tokens for batch in batches),
        "seq_len": seq_len,
        "batch_size": request.batch_size,
        "order": "first" if request.draw.first else "random",
        "seed": request.draw.seed,
    }
    log.info("calibrating on %d samples (%d tokens) of %s", about["samples"], about["tokens"], about["data"])
    return Calibration(batches, _loss(kind, encoder), _probe(kind, encoder, request.draw.seed), about)


def _kind(task: Task | None, model_class: Any, model_config: Any) -> str:
    """`classifier` and `similarity` have labels, `causal-lm` and `masked-lm` make their own, `text` has none."""
    if task is not None and task.head != "lm":
        return "similarity" if task.head == "encoder" else "classifier"
    match head_of(model_config, model_class):
        case "lm":
            return "causal-lm"
        case "masked-lm":
            return "masked-lm"
        case _:
            return "text"


def _is_pair(task: Task | None) -> bool:
    """Whether one input holds two texts."""
    return task is not None and task.head == "classifier" and len(task.columns) > 1


def _loss(kind: str, encoder: SentenceEncoder | None) -> Loss | None:
    if encoder is not None:
        return similarity_loss(encoder)
    return None if kind == "text" else head_loss


def _probe(kind: str, encoder: SentenceEncoder | None, seed: int) -> Loss:
    """The loss of a head, which what is predicted makes one of the outputs; of an encoder how far these move.

    The gold scores of pairs say less: their errors are small where the model is good, and so are their gradients.
    """
    if encoder is not None:
        return embedding_probe(encoder, seed)
    return state_probe(seed) if kind == "text" else head_loss


def _labelled(request: CalibrationRequest, task: Task, model_config: Any, tokenize: Tokenize) -> list[Batch]:
    examples = load_examples(task, "train", request.data)
    order = label_permutation(task, model_config) if task.labels else None

    def labels(values: list[float]) -> Tensor:
        if order is None:
            return torch.tensor(values, dtype=torch.float32)
        return torch.tensor([order[int(value)] for value in values])

    chosen = request.draw.indices(len(examples))
    return labelled_batches(examples, tokenize, labels, chosen, request.batch_size)


def _running_text(request: CalibrationRequest, kind: str, tokenize: Tokenize, taskless: Any) -> list[Batch]:
    """Batches of running text.

    Args:
        taskless: the config of a model that no task was named for; None where one was.
    """
    advice = "without a task it is read as running text; for rows of a task that the model fits, name it with --task: "
    advice = advice + fitting_tasks(taskless) if taskless is not None else ""
    text = load_text(TASKS["wikitext2"], "train", request.data, advice=advice)
    if kind == "causal-lm":
        return window_batches(token_ids(tokenize.tokenizer, text), tokenize.seq_len, request.draw, request.batch_size)
    batches = text_batches(text, tokenize, request.draw, request.batch_size)
    return masked_batches(batches, tokenize.tokenizer, request.draw.seed) if kind == "masked-lm" else batches
