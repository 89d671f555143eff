"""What `flashsvd profile` measures: its options, which need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

from flashsvd.common.device import DEVICES, DTYPES
from flashsvd.common.options import (
    check_choices,
    check_count,
    check_not_empty,
    check_range,
    check_switches,
    option,
    take_plain_types,
)
from flashsvd.data.tasks import TASKS
from flashsvd.errors import ConfigError
from flashsvd.evaluation.config import BATCH_SIZE_HELP, SEQ_LEN_HELP

# In the order in which they are measured; what compiling leaves in the process comes after all others.
VARIANTS = ("dense", "micro-batches", "low-rank", "fused", "compiled")
# Those that can generate.
GENERATING = ("dense", "low-rank", "fused")


@dataclass(frozen=True)
class ProfileConfig:
    """What to profile and on what.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    checkpoint: str = option(help="compressed checkpoint, or a dense model to profile by itself", path="model")
    dense: str | None = option(
        None,
        help="hub name or directory of the dense model to compare with; the default is the one that the checkpoint "
        "was compressed from",
        path="model",
    )
    task: str | None = option(
        None,
        help="what to score on, as for flashsvd eval; the default is the task that the checkpoint was compressed for",
        suggestions=tuple(TASKS),
    )
    data: str | None = option(
        None, help="validation data, as for flashsvd eval; the default is the task's own data on the hub", path="read"
    )
    variants: str | None = option(
        None,
        help=f"comma-separated, of {', '.join(VARIANTS)}; the default is all, where one that does not apply is "
        "reported as skipped",
    )
    batch_size: int | None = option(None, help=BATCH_SIZE_HELP)
    seq_len: int | None = option(None, help=SEQ_LEN_HELP)
    padding: str = option("longest", help="pad to the longest of the batch, or to seq-len", choices=("longest", "max"))
    micro_batches: int = option(4, help="parts that the variant micro-batches runs a batch in, one after the other")
    graph: bool = option(False, help="replay the fused variant's batches as CUDA graphs")
    max_eval_samples: int | None = option(None, help="read only this many examples or windows, the first ones")
    runs: int = option(1, help="timed passes over the data")
    new_tokens: int | None = option(
        None,
        help="language models only: also time generating so many tokens after prompts, which are windows of seq-len "
        "without their last new-tokens",
    )
    device: str | None = option(None, help="cuda or cpu; the default is cuda where there is one", suggestions=DEVICES)
    dtype: str | None = option(None, help="dtype to run all in; the default is the checkpoint's own", choices=DTYPES)
    offload: bool = option(
        False, help="keep weights on the host and move each to the GPU when it is used, by accelerate"
    )
    may_skip: bool = option(
        False, help="report a variant of --variants that does not apply as skipped, with the reason, and measure others"
    )
    output: str | None = option(None, help="directory to write profile.json and profile.png to", path="write")

    def __post_init__(self) -> None:
        take_plain_types(self)
        check_choices(self)
        check_not_empty(self)
        check_switches(self)
        for name in ("batch_size", "seq_len", "max_eval_samples", "new_tokens"):
            check_count(name, getattr(self, name), optional=True)
        for name in ("micro_batches", "runs"):
            check_count(name, getattr(self, name))
        if self.new_tokens is not None:
            check_range("new_tokens", self.new_tokens, 2)
        names = self.variant_names()
        if self.new_tokens is not None and not set(names) & set(GENERATING):
            raise ConfigError(
                f"--new-tokens is for the variants {', '.join(GENERATING)}, which --variants leaves out; name one"
            )
        if self.graph and "fused" not in names:
            raise ConfigError("--graph is for the variant fused, which --variants leaves out; leave out one of them")

    def variant_names(self) -> tuple[str, ...]:
        """The variants to measure, in the order of `VARIANTS`.

        Raises:
            ConfigError: one is not known.
        """
        if self.variants is None:
            return VARIANTS
        if not isinstance(self.variants, str):
            raise ConfigError(f"--variants must be names with commas between them, got {self.variants!r}")
        asked = [name.strip() for name in self.variants.split(",") if name.strip()]
        for name in asked:
            if name not in VARIANTS:
                raise ConfigError(f"--variants {name!r} is not known; choose from {', '.join(VARIANTS)}")
        if not asked:
            raise ConfigError(f"--variants names none; choose from {', '.join(VARIANTS)}")
        return tuple(name for name in VARIANTS if name in asked)
