"""What to evaluate and on what: the options of `flashsvd eval`, which need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

from flashsvd.common.config import Config
from flashsvd.common.device import BACKENDS, DEVICES, DTYPES, PLAIN
from flashsvd.common.options import option
from flashsvd.data.tasks import TASKS
from flashsvd.errors import ConfigError

# Of a language model the logits, not the layers, are what fills memory.
BATCH_SIZE, LM_BATCH_SIZE = 32, 8
SEQ_LEN, LM_SEQ_LEN = 128, 1024

BATCH_SIZE_HELP = f"examples or windows in a batch; the default is {BATCH_SIZE}, {LM_BATCH_SIZE} for language models"
SEQ_LEN_HELP = (
    "tokens an example is cut to, or tokens of a language model's window; the default is "
    f"{SEQ_LEN}, {LM_SEQ_LEN} for language models, a sentence encoder's own, or less where the model reads no more"
)


@dataclass(frozen=True)
class EvalConfig(Config):
    """What to evaluate and on what.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    checkpoint: str = option(
        help="compressed checkpoint, or a dense model's directory or hub name to compare with", path="model"
    )
    task: str | None = option(
        None,
        help="cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte; classification or regression of --data of your own; "
        "similarity for sentence encoders; perplexity (of --data) or wikitext2 for causal language models; "
        "the default is the task that the checkpoint was compressed or trained for, and perplexity for another causal "
        "language model",
        suggestions=tuple(TASKS),
    )
    data: str | None = option(
        None,
        help="a TSV, CSV, parquet or JSON-lines file (a .txt file too for language models), or a directory with a "
        "validation file; the default is the task's own data on the hub",
        path="read",
    )
    batch_size: int | None = option(None, help=BATCH_SIZE_HELP, at_least=1)
    seq_len: int | None = option(None, help=SEQ_LEN_HELP, at_least=1)
    stride: int | None = option(
        None,
        help="tokens from one window of a language model to the next; the default is seq-len; fewer give each token "
        "more context, and each is still scored once",
        at_least=1,
    )
    padding: str = option("longest", help="pad to the longest of the batch, or to seq-len", choices=("longest", "max"))
    max_eval_samples: int | None = option(
        None, help="evaluate only this many examples or windows, drawn by the seed", at_least=1
    )
    seed: int = option(0, help="draws the examples or windows of --max-eval-samples", at_least=0, at_most=2**63 - 1)
    device: str | None = option(None, help="cuda or cpu; the default is cuda where there is one", suggestions=DEVICES)
    dtype: str | None = option(None, help="dtype to run in; the default is the checkpoint's own", choices=DTYPES)
    backend: str | None = option(
        None,
        help="run on fused blocks (BERT-like encoders, ModernBERT, GPT-2 and LLaMA-like decoders): auto takes for each "
        "operation what is faster, by measurement; torch and triton force one; plain runs the model as it is; the "
        "default is auto for a compressed checkpoint that fused blocks take, and plain for a dense model, the baseline "
        "to compare with",
        choices=(PLAIN, *BACKENDS),
    )
    output: str | None = option(None, help="JSON file to write, such as results/x.json", path="write")
    overwrite: bool = option(False, help="replace any file at output, and not only an earlier evaluation")

    def check(self) -> None:
        """Hold fields against each other.

        Raises:
            ConfigError: the name of the output is a directory's.
        """
        if self.output is not None and self.output.endswith("/"):
            raise ConfigError(f"--output {self.output} names a directory, and a file is written; name one in it")
