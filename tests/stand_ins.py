"""What the documents' commands read, small and on this machine: models under their names, and the hub's data."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import WORDS, build_model, build_tokenizer
from flashsvd import CompressConfig, run_compress
from flashsvd.data.tasks import TASKS
from training_data import write_task_data, write_text

# Wide enough for the ranks that the documents ask for.
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 1}
# Long enough for the scripts' windows.
LONG = {"max_position_embeddings": 400}

Make = Callable[[Path], object]

TOPICS = replace(TASKS["mnli"], columns=("text",), validation="validation")


def _model(family: str, head: str, **options: Any) -> Make:
    def make(directory: Path) -> None:
        build_model(family, head, **options).save_pretrained(directory)
        build_tokenizer().save_pretrained(directory)

    return make


def _compressed(family: str, head: str, task: str, **options: Any) -> Make:
    def make(directory: Path) -> None:
        dense = directory.with_name(f"{directory.name}-dense")
        _model(family, head, **options)(dense)
        run_compress(CompressConfig(model=dense, rank=4, task=task, output=directory, device="cpu"))

    return make


def _corpus(file: Path) -> None:
    draw = random.Random(0)
    file.write_text(" ".join(draw.choice(WORDS) for _ in range(2000)))


# Those that are there, on the hub or a user's disk, before a command runs.
GIVEN: dict[str, Make] = {
    "sentence-transformers/all-MiniLM-L6-v2": _model("bert", "base"),
    "textattack/bert-base-uncased-SST-2": _model("bert", "classifier", **WIDE),
    "openai-community/gpt2": _model("gpt2", "causal-lm", **LONG),
    "path/to/model": _model("bert", "classifier"),
    "path/to/classifier": _model("bert", "classifier"),
    "path/to/encoder": _model("bert", "base"),
    "path/to/bert": _model("bert", "masked-lm"),
    "path/to/sentence-encoder": _model("bert", "base"),
    "path/to/llama": _model("llama", "causal-lm", **LONG),
    "path/to/glue/sst2": lambda directory: write_task_data(directory, TASKS["sst2"]),
    "path/to/topics": lambda directory: write_task_data(directory, TOPICS),
    "path/to/stsb": lambda directory: write_task_data(directory, TASKS["stsb"]),
    "path/to/text": write_text,
    "corpus.txt": _corpus,
    "examples/data/stsb-train-512.tsv": lambda file: _pairs(file, "train"),
    "examples/data/stsb-validation.tsv": lambda file: _pairs(file, TASKS["stsb"].validation),
}

# Those that an earlier block of the documents has made.
MADE: dict[str, Make] = {
    "small": _compressed("bert", "classifier", "sst2"),
    "compressed_models/all-MiniLM-L6-v2_drone_p0.5": _compressed("bert", "base", "similarity"),
    "models/small-gpt2": _compressed("gpt2", "causal-lm", "wikitext2", **LONG),
    "compressed_models/bert-base-uncased-SST-2_standard_p0.5": _compressed("bert", "classifier", "sst2"),
}


def _pairs(file: Path, split: str) -> None:
    directory = write_task_data(file.parent / f"{file.stem}-files", TASKS["stsb"])
    (directory / f"{split}.tsv").rename(file)


def load_dataset(hub: str, config: str, split: str) -> list[dict[str, Any]]:
    """In place of the function of datasets, a few rows of the task."""
    task = next(task for task in TASKS.values() if (task.hub, task.hub_config) == (hub, config))
    if task.columns == ("text",):
        return [{"text": " ".join(WORDS[(start + i) % len(WORDS)] for i in range(40))} for start in range(60)]
    classes = len(task.labels)
    return [
        {column: f"the {WORDS[i % len(WORDS)]} runs" for column in task.columns}
        | {"label": i % classes if classes else float(i % 5)}
        for i in range(40)
    ]
