"""What `flashsvd profile` measures: its options, which need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashsvd.common.config import Config
from flashsvd.common.device import BACKENDS, DEVICES, DTYPES, KV_CACHES, PLAIN
from flashsvd.common.options import names_in, option
from flashsvd.data.tasks import TASKS
from flashsvd.errors import ConfigError
from flashsvd.evaluation.config import BATCH_SIZE_HELP, SEQ_LEN_HELP

# In the order in which they are measured; what compiling leaves in the process comes after all others.
VARIANTS = ("dense", "micro-batches", "low-rank", "fused", "int8", "compiled")
# Those on fused blocks; the second only where it is named.
ON_BLOCKS = ("fused", "int8")
BY_DEFAULT = tuple(name for name in VARIANTS if name != "int8")
# What `optimize` is told of CUDA graphs, by its name on the command line.
GRAPHS: dict[str, bool | Literal["auto"]] = {"auto": "auto", "always": True, "never": False}
# Those that can generate; the last on a GPU.
GENERATING = ("dense", "low-rank", *ON_BLOCKS, "compiled")


@dataclass(frozen=True)
class ProfileConfig(Config):
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
        help="what to score on, and what by default, as for flashsvd eval",
        suggestions=tuple(TASKS),
    )
    data: str | None = option(
        None, help="validation data, as for flashsvd eval; the default is the task's own data on the hub", path="read"
    )
    variants: str | None = option(
        None,
        help=f"comma-separated, of {', '.join(VARIANTS)}; the default is all but int8, which is fused with the factors "
        "rounded to integers, where one that does not apply is reported as skipped",
        several=VARIANTS,
    )
    batch_size: int | None = option(None, help=BATCH_SIZE_HELP, at_least=1)
    seq_len: int | None = option(None, help=SEQ_LEN_HELP, at_least=1)
    padding: str = option("longest", help="pad to the longest of the batch, or to seq-len", choices=("longest", "max"))
    micro_batches: int = option(
        4, help="parts that the variant micro-batches runs a batch in, one after the other", at_least=1
    )
    backend: str | None = option(
        None,
        help="how the variant fused runs, as for flashsvd eval: auto, the default, torch or triton; plain leaves that "
        "variant out, and says so",
        choices=(PLAIN, *BACKENDS),
    )
    graph: str = option(
        "auto",
        help="when the fused variant's batches run as CUDA graphs: auto, where their shape has come before; always, "
        "which is an error where they cannot; never; a decoder's graphs are those of the steps in which it generates",
        choices=tuple(GRAPHS),
    )
    kv_cache: str = option(
        "auto",
        help=f"what the fused variant's cache keeps, comma-separated, of {', '.join(KV_CACHES)}, with each of which it "
        "is measured: auto keeps the rank space that keys and values are lifted from where that takes less memory and "
        "no work to read, lowrank wherever it takes less memory, dense nowhere",
        several=KV_CACHES,
    )
    max_eval_samples: int | None = option(
        None, help="read only this many examples or windows, drawn by the seed", at_least=1
    )
    seed: int = option(0, help="draws the examples or windows of --max-eval-samples", at_least=0, at_most=2**63 - 1)
    runs: int = option(1, help="timed passes over the data", at_least=1)
    new_tokens: int | None = option(
        None,
        help="language models only: also time generating so many tokens after prompts, which are windows of seq-len "
        "without their last new-tokens",
        at_least=2,
    )
    device: str | None = option(None, help="cuda or cpu; the default is cuda where there is one", suggestions=DEVICES)
    dtype: str | None = option(None, help="dtype to run all in; the default is the checkpoint's own", choices=DTYPES)
    offload: bool = option(
        False, help="keep weights on the host and move each to the GPU when it is used, by accelerate"
    )
    may_skip: bool = option(
        False, help="report a variant of --variants that does not apply as skipped, with the reason, and measure others"
    )
    output: str | None = option(
        None, help="directory to write profile.json and profile.png to", path="write", directory=True
    )
    overwrite: bool = option(False, help="replace any files of those names in output, and not only an earlier profile")

    def check(self) -> None:
        """Hold fields against each other.

        Raises:
            ConfigError: a variant is not known, or an option is for one that is left out.
        """
        names = self.variant_names()
        if self.new_tokens is not None and not set(names) & set(GENERATING):
            raise ConfigError(
                f"--new-tokens is for the variants {', '.join(GENERATING)}, which --variants leaves out; name one"
            )
        if (
            self.backend == PLAIN
            and self.variants is not None
            and (fused := [n for n in self._named() if n in ON_BLOCKS])
        ):
            raise ConfigError(
                f"--backend plain leaves out the variant {fused[0]}, which --variants names; leave out one of them"
            )
        if not set(names) & set(ON_BLOCKS):
            left_out = f"--backend {PLAIN}" if self.backend == PLAIN else "--variants"
            of_fused = {
                "--graph": self.graph != "auto",
                "--kv-cache": self.kv_caches() != ("auto",),
                "--backend": self.backend not in (None, PLAIN),
            }
            for given, asked in of_fused.items():
                if asked:
                    raise ConfigError(
                        f"{given} is for the variant fused, which {left_out} leaves out; leave out one of them"
                    )
        if self.new_tokens is None and self.kv_caches() != ("auto",):
            raise ConfigError("--kv-cache is of what is generated; add --new-tokens, or leave it out")

    def variant_names(self) -> tuple[str, ...]:
        """The variants to measure, in the order of `VARIANTS`.

        Raises:
            ConfigError: one of them is not known, or none is named.
        """
        return tuple(name for name in self._named() if name not in ON_BLOCKS or self.backend != PLAIN)

    def kv_caches(self) -> tuple[str, ...]:
        """What the fused variant is to keep of keys and values, in the order of `KV_CACHES`.

        Raises:
            ConfigError: one of them is not known, or none is named.
        """
        return names_in("kv_cache", self.kv_cache, KV_CACHES)

    def left_out(self) -> dict[str, str]:
        """The variants that are measured unless an option says otherwise, with the reason."""
        return {name: f"backend {PLAIN} leaves it out" for name in self._named() if name not in self.variant_names()}

    def _named(self) -> tuple[str, ...]:
        return BY_DEFAULT if self.variants is None else names_in("variants", self.variants, VARIANTS)
