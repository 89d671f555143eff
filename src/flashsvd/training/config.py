"""What to train and how: the options of `flashsvd finetune`, which need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashsvd.common.config import Config
from flashsvd.common.device import DTYPES
from flashsvd.common.options import flag, names_in, option
from flashsvd.common.paths import expand
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
class FinetuneConfig(Config):
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
    epochs: float = option(3.0, help="passes over the training data; a fraction is one", above=0)
    batch_size: int = option(32, help="examples in a batch of each process", at_least=1)
    learning_rate: float = option(5e-5, help="highest learning rate of AdamW", above=0)
    scheduler: str = option(
        "linear", help="how the learning rate falls after the warm-up", choices=("linear", "cosine", "constant")
    )
    warmup: float = option(
        0.06, help="fraction of all steps in which the learning rate rises to its highest", at_least=0, below=1
    )
    weight_decay: float = option(0.01, help="decay of weights; biases and norms have none", at_least=0)
    clip: float = option(1.0, help="largest norm of the gradient; 0 does not clip", at_least=0)
    accumulation: int = option(1, help="batches between two steps of the optimiser", at_least=1)
    bf16: bool = option(False, help="compute in bfloat16; weights and optimiser stay in float32")
    early_stopping: int | None = option(
        None, help="stop after this many evaluations without a better metric", at_least=1
    )
    eval_steps: int | None = option(
        None, help="steps between evaluations; the default is one after each epoch", at_least=1
    )
    save_steps: int = option(
        500,
        help="steps between checkpoints to resume from, beside the one after each evaluation or epoch",
        at_least=1,
    )
    new_head: bool = option(
        False, help="cls: give a classifier a fresh head, for other classes than it was trained for"
    )
    freeze: str | None = option(
        None,
        help="what to leave as it is: embeddings, attention (its projections), ffn, or several with commas",
        several=FREEZABLE,
    )
    class_weights: str | None = option(
        None, help="cls: weigh classes by how rare they are in the training data", choices=("balanced",)
    )
    max_train_samples: int | None = option(None, help="train on this many examples only, drawn by the seed", at_least=1)
    max_eval_samples: int | None = option(
        None, help="evaluate on this many examples only, those that flashsvd eval draws", at_least=1
    )
    seq_len: int | None = option(
        None,
        help=f"tokens an example is cut to; the default is {SEQ_LEN}, or less where the model reads no more",
        at_least=1,
    )
    teacher: str | None = option(
        None, help="model to imitate, as a rule the dense one that the model to train was compressed from", path="model"
    )
    distill_weight: float | None = option(
        None,
        help=f"share of the teacher's outputs in the loss, from 0 to 1 ({DISTILL_WEIGHT})",
        at_least=0,
        at_most=1,
    )
    temperature: float | None = option(
        None, help=f"softens class probabilities for student and teacher alike ({TEMPERATURE})", above=0
    )
    hidden_weight: float | None = option(
        None, help="weight of the squared difference from the teacher's hidden states, layer by layer (0)", at_least=0
    )
    device: str | None = option(
        None, help="where to train; the default is cuda where there is one", choices=("cuda", "cpu")
    )
    dtype: str | None = option(None, help="dtype of the saved weights; the default is the model's own", choices=DTYPES)
    output: str | None = option(
        None,
        help=f"directory to write; the default is {OUTPUT_ROOT}/MODEL_TASK",
        path="write",
        directory=True,
        default_path=OUTPUT_ROOT,
    )
    overwrite: bool = option(
        False,
        help="replace an earlier result of the same kind: a compressed checkpoint where a compressed model is trained, "
        "a dense model that flashsvd trained where a dense one is",
    )
    resume: bool = option(False, help="continue an interrupted run of the same options")
    seed: int = option(
        0,
        help="seeds a new head, the order of the data, dropout and masks",
        at_least=0,
        at_most=2**32 - 1,  # what NumPy takes, which transformers seeds too
    )

    def check(self) -> None:
        """Hold fields against each other.

        Raises:
            ConfigError: a new head is for another mode, or an option of a teacher stands without one.
        """
        if self.new_head and self.mode != "cls":
            raise ConfigError(f"--new-head is for classifiers; leave it out of --mode {self.mode}")
        for name in ("distill_weight", "temperature", "hidden_weight"):
            if getattr(self, name) is not None and self.teacher is None:
                raise ConfigError(f"{flag(name)} says how a teacher is imitated; give one with --teacher")

    def frozen(self) -> tuple[str, ...]:
        """The parts that `freeze` names, in the order of `FREEZABLE`."""
        return () if self.freeze is None else names_in("freeze", self.freeze, FREEZABLE)

    def output_directory(self) -> Path:
        """Where the trained model goes."""
        if self.output is not None:
            return expand(self.output)
        directory = expand(self.model)
        # A link goes by its own name; `.` and `..` have none.
        named = directory.resolve() if directory.is_dir() and directory.name in ("", "..") else directory
        task = self.task or ("classification" if self.mode == "cls" else self.mode)
        return Path(OUTPUT_ROOT) / f"{named.name}_{task}"
