"""What to train and how: the options of `flashsvd finetune`, which need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashsvd.common.device import DTYPES
from flashsvd.common.options import (
    check_choices,
    check_count,
    check_not_empty,
    check_range,
    check_seed,
    check_switches,
    flag,
    option,
    take_plain_types,
)
from flashsvd.data.tasks import TASKS
from flashsvd.errors import ConfigError

OUTPUT_ROOT = "finetuned_models"
MODES = ("cls", "mlm", "similarity")
FREEZABLE = ("embeddings", "attention", "ffn")
SEQ_LEN = 128
CLASSIFIER_TASKS = tuple(task.name for task in TASKS.values() if task.head == "classifier")
# Where a teacher is given and these are not.
DISTILL_WEIGHT, TEMPERATURE = 0.5, 2.0


@dataclass(frozen=True)
class FinetuneConfig:
    """What to train and how.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    model: str = option(help="hub name or directory of the model to train, dense or compressed", path="model")
    mode: str = option(
        "cls",
        help="cls trains a classifier or regression on a task, similarity a sentence encoder on scored pairs, mlm "
        "a masked language model on running text",
        choices=MODES,
    )
    task: str | None = option(
        None,
        help="cls: cola, sst2, mrpc, qqp, stsb, mnli, qnli or rte; classification (the default) or regression of "
        "--data of your own",
        suggestions=CLASSIFIER_TASKS,
    )
    data: str | None = option(
        None,
        help="a directory with a train and a validation file, or a file to train on (TSV, CSV, parquet, JSON lines; "
        "text for mlm); the default is the task's data, or WikiText-2, from the hub",
        path="read",
    )
    eval_data: str | None = option(
        None,
        help="a file, or a directory with a validation file, to evaluate on; the default is the one in --data",
        path="read",
    )
    epochs: float = option(3.0, help="passes over the training data; a fraction is one")
    batch_size: int = option(32, help="examples in a batch of each process")
    learning_rate: float = option(5e-5, help="highest learning rate of AdamW")
    scheduler: str = option(
        "linear", help="how the learning rate falls after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup: float = option(0.06, help="fraction of all steps in which the learning rate rises to its highest")
    weight_decay: float = option(0.01, help="decay of weights; biases and norms have none")
    clip: float = option(1.0, help="largest norm of the gradient; 0 does not clip")
    accumulation: int = option(1, help="batches between two steps of the optimiser")
    bf16: bool = option(False, help="compute in bfloat16; weights and optimiser stay in float32")
    early_stopping: int | None = option(None, help="stop after this many evaluations without a better metric")
    eval_steps: int | None = option(None, help="steps between evaluations; the default is one after each epoch")
    save_steps: int = option(
        500, help="steps between checkpoints to resume from, beside the one after each evaluation or epoch"
    )
    new_head: bool = option(
        False, help="cls: give a classifier a fresh head, for other classes than it was trained for"
    )
    freeze: str | None = option(
        None, help="what to leave as it is: embeddings, attention (its projections), ffn, or several with commas"
    )
    class_weights: str | None = option(
        None, help="cls: weigh classes by how rare they are in the training data", choices=("balanced",)
    )
    max_train_samples: int | None = option(None, help="train on this many examples only, drawn by the seed")
    max_eval_samples: int | None = option(None, help="evaluate on this many examples only, the first ones")
    seq_len: int | None = option(
        None, help=f"tokens an example is cut to; the default is {SEQ_LEN}, or less where the model reads no more"
    )
    teacher: str | None = option(
        None, help="model to imitate, as a rule the dense one that the model to train was compressed from", path="model"
    )
    distill_weight: float | None = option(
        None, help=f"share of the teacher's outputs in the loss, from 0 to 1 ({DISTILL_WEIGHT})"
    )
    temperature: float | None = option(
        None, help=f"softens class probabilities for student and teacher alike ({TEMPERATURE})"
    )
    hidden_weight: float | None = option(
        None, help="weight of the squared difference from the teacher's hidden states, layer by layer (0)"
    )
    device: str | None = option(
        None, help="where to train; the default is cuda where there is one", choices=("cuda", "cpu")
    )
    dtype: str | None = option(None, help="dtype of the saved weights; the default is the model's own", choices=DTYPES)
    output: str | None = option(
        None,
        help=f"directory to write; the default is {OUTPUT_ROOT}/MODEL_TASK",
        path="write",
        default_path=OUTPUT_ROOT,
    )
    overwrite: bool = option(False, help="replace an existing model that flashsvd wrote")
    resume: bool = option(False, help="continue an interrupted run of the same options")
    seed: int = option(0, help="seeds a new head, the order of the data, dropout and masks")

    def __post_init__(self) -> None:
        take_plain_types(self)
        check_choices(self)
        check_not_empty(self)
        check_switches(self)
        check_seed(self.seed)
        # NumPy, which transformers seeds too, takes no larger one.
        if self.seed >= 1 << 32:
            raise ConfigError(f"--seed must be below 2**32 for training, got {self.seed}")
        for name in ("batch_size", "accumulation", "save_steps"):
            check_count(name, getattr(self, name))
        optional = ("early_stopping", "eval_steps", "max_train_samples", "max_eval_samples", "seq_len")
        for name in optional:
            check_count(name, getattr(self, name), optional=True)
        for name in ("epochs", "learning_rate"):
            check_range(name, getattr(self, name), 0, above=True)
        for name in ("weight_decay", "clip"):
            check_range(name, getattr(self, name), 0)
        check_range("warmup", self.warmup, 0, 1, below=True)
        if self.new_head and self.mode != "cls":
            raise ConfigError(f"--new-head is for classifiers; leave it out of --mode {self.mode}")
        self._check_distillation()
        self.frozen()

    def _check_distillation(self) -> None:
        for name in ("distill_weight", "temperature", "hidden_weight"):
            if getattr(self, name) is not None and self.teacher is None:
                raise ConfigError(f"{flag(name)} says how a teacher is imitated; give one with --teacher")
        check_range("hidden_weight", self.hidden_weight or 0, 0)
        if self.temperature is not None:
            check_range("temperature", self.temperature, 0, above=True)
        if self.distill_weight is not None:
            check_range("distill_weight", self.distill_weight, 0, 1)

    def frozen(self) -> tuple[str, ...]:
        """The parts that `freeze` names, in the order of `FREEZABLE`."""
        if self.freeze is not None and not isinstance(self.freeze, str):
            raise ConfigError(f"--freeze must be text such as 'embeddings,ffn', got {self.freeze!r}")
        named = {part.strip() for part in self.freeze.split(",")} if self.freeze is not None else set()
        if unknown := sorted(named - set(FREEZABLE)):
            raise ConfigError(f"--freeze {unknown[0]!r} is not known; choose from {', '.join(FREEZABLE)}")
        return tuple(part for part in FREEZABLE if part in named)

    def output_directory(self) -> Path:
        """Where the trained model goes."""
        if self.output is not None:
            return Path(self.output).expanduser()
        directory = Path(self.model).expanduser()
        # A link goes by its own name; `.` and `..` have none.
        named = directory.resolve() if directory.is_dir() and directory.name in ("", "..") else directory
        task = self.task or ("classification" if self.mode == "cls" else self.mode)
        return Path(OUTPUT_ROOT) / f"{named.name}_{task}"
