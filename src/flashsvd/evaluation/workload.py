"""The data that models are evaluated on and how it is cut into batches, known before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashsvd.blocks.registry import is_decoder
from flashsvd.data.own_task import fit_task
from flashsvd.data.rows import Examples, load_examples
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import Task
from flashsvd.data.text import load_text
from flashsvd.errors import BackendError, ConfigError
from flashsvd.evaluation.config import BATCH_SIZE, LM_BATCH_SIZE, LM_SEQ_LEN, SEQ_LEN
from flashsvd.evaluation.labelled import Classifier, LabelledTexts, Predictor, SentenceSimilarity
from flashsvd.evaluation.loop import BatchShape, EvalJob
from flashsvd.evaluation.perplexity import Perplexity, read_tokens
from flashsvd.evaluation.subject import Subject
from flashsvd.models.heads import head_classes
from flashsvd.models.loading import load_tokenizer
from flashsvd.models.sentence import encoder_length, read_sentence_encoder


@dataclass(frozen=True)
class Workload:
    """What every model that is compared is asked, the same tokens for each.

    Attributes:
        data: examples, or the tokens [n] of running text.
        draw: which windows of running text; None takes all.
    """

    task: Task
    data: Examples | Tensor
    tokenizer: Any
    shape: BatchShape
    draw: Draw | None

    @property
    def longest(self) -> int:
        """Tokens that a sample has at most: of a text shorter than a window, all of it."""
        return min(self.shape.seq_len, len(self.data)) if isinstance(self.data, Tensor) else self.shape.seq_len

    @classmethod
    def prepare(
        cls, task: Task, data: Examples | str, subject: Subject, shape: BatchShape, draw: Draw | None
    ) -> Workload:
        """Tokenize by the subject's own tokenizer: running text now, examples batch by batch.

        Raises:
            ModelError: there is no tokenizer, or it is not the model's.
            DataError: the text is too short.
        """
        tokenizer = load_tokenizer(subject.source)
        tokens: Examples | Tensor
        tokens = read_tokens(tokenizer, data, subject.config, subject.source) if isinstance(data, str) else data
        return cls(task, tokens, tokenizer, shape, draw)

    def job(self, subject: Subject) -> EvalJob:
        """A fresh job for a model, whose own classes and pooling say what its outputs mean.

        Raises:
            ModelError: the tokenizer cannot pad, or the model's pooling is not supported.
        """
        if isinstance(self.data, Tensor):
            return Perplexity(self.data, self.shape, self.draw)
        predictor: Predictor
        if self.task.head == "classifier":
            predictor = Classifier(self.task, subject.config)
        else:
            encoder = read_sentence_encoder(subject.source, subject.config)
            predictor = SentenceSimilarity(encoder.adapted(self.tokenizer))
        return LabelledTexts(
            self.task, self.data, predictor, self.tokenizer, self.shape, subject.config, subject.source
        )

    def check_fused(self, subject: Subject) -> None:
        """Refuse a tokenizer that puts padding, where an optimised model has zeros, into the column a head reads.

        Raises:
            BackendError: saying what to change.
        """
        # ModernBERT's head may read the mean of all real tokens instead, and a decoder's reads the last one.
        pooled = getattr(subject.config, "classifier_pooling", "cls")
        reads_first = pooled == "cls" and not is_decoder(subject.config)
        if self.task.head == "classifier" and self.tokenizer.padding_side == "left" and reads_first:
            raise BackendError(
                f"the head of {subject.source} reads the first column, and its tokenizer pads on the left; "
                "set padding_side to right in tokenizer_config.json, or run the plain model"
            )


def load_data(task: Task, data: str | None, draw: Draw | None, subject: Subject) -> tuple[Task, Examples | str]:
    """The task's validation data: examples, those drawn, or one running text; and the task fitted to it.

    Raises:
        DataError: it cannot be had, or does not fit the task.
    """
    if task.head == "lm":
        return task, load_text(task, "validation", data)
    if not task.is_fitted:
        task = fit_task(task, "validation", data, head_classes(subject.config))
    return task, load_examples(task, "validation", data, draw)


def batch_shape(
    task: Task, subject: Subject, batch_size: int | None, seq_len: int | None, padding: str, stride: int | None = None
) -> BatchShape:
    """The sizes asked for, the rest filled in.

    Raises:
        ConfigError: they do not fit the task, the model or one another.
    """
    if task.head != "lm":
        if stride is not None:
            raise ConfigError(f"--stride is for running text, {task.name} has single examples; leave it out")
        own = encoder_length(subject.source, subject.config) if task.head == "encoder" else SEQ_LEN
        return BatchShape(batch_size or BATCH_SIZE, subject.seq_len(seq_len, own), padding)
    seq_len = subject.seq_len(seq_len, LM_SEQ_LEN)
    stride = stride or seq_len
    if seq_len < 2:
        raise ConfigError(f"--seq-len must be at least 2 for {task.name}: a token is predicted from those before it")
    if stride > seq_len:
        raise ConfigError(f"--stride {stride} is above --seq-len {seq_len}, so that tokens would be left out; lower it")
    if padding == "max":
        raise ConfigError(f"--padding max is for single examples, {task.name} has none to pad; leave it out")
    return BatchShape(batch_size or LM_BATCH_SIZE, seq_len, "none", stride)
