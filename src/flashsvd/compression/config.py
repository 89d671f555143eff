"""What to compress and how: the options of `flashsvd compress`, which need neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flashsvd.common.config import Config
from flashsvd.common.device import DEVICES, DTYPES
from flashsvd.common.options import flag, option
from flashsvd.common.paths import expand
from flashsvd.compression.recipes import RECIPES, recipe
from flashsvd.data.tasks import TASKS
from flashsvd.errors import ConfigError
from flashsvd.lowrank.ranks import RANK_SEARCHES, RANK_STEPS, RankRequest, RankSteps
from flashsvd.lowrank.spec import FACTOR_KINDS, FactorKind

OUTPUT_ROOT = "compressed_models"
# Those of `flashsvd.methods.registry`, which needs torch.
METHOD_NAMES = ("standard", "fwsvd", "drone", "asvd", "adasvd")


@dataclass(frozen=True)
class CompressConfig(Config):
    """What to compress and how.

    Raises:
        ConfigError: an option has a value that cannot be used.
    """

    model: str = option(help="hub name or local directory of the model to compress", path="model")
    recipe: str | None = option(
        None,
        help="options that go together: best is --method drone --rank-steps fine --rank-search loss --calib-inputs "
        "compressed --refine 360, quick the same without the last two; each of them can be given otherwise",
        choices=RECIPES,
        by_name=True,
    )
    method: str = option(
        None,
        help="compression method: standard (or svd; the default), fwsvd (or fw), drone (or whiten, whitening), asvd, "
        "or adasvd (or ada)",
        suggestions=METHOD_NAMES,
    )
    task: str | None = option(
        None,
        help="task the model is for: a GLUE task, classification or regression of your own, similarity, perplexity or "
        "wikitext2",
        suggestions=tuple(TASKS),
    )
    rank: int | None = option(
        None, help="rank r of all layers: attention r, feed-forward and attention output 4r", at_least=1
    )
    rank_attn: int | None = option(
        None, help="rank of the Q, K, V projections (per head with --qkv per-head)", at_least=1
    )
    rank_ffn: int | None = option(None, help="rank of the feed-forward matrices", at_least=1)
    rank_wo: int | None = option(None, help="rank of the attention output projection", at_least=1)
    ratio: float | None = option(
        None, help="fraction of the factored layers' parameters to keep; finds the ranks", above=0, below=1
    )
    rank_steps: str = option(
        None,
        help="which ranks are looked for: fast ones (the default), those that kernels run fastest at among the ways to "
        "divide the budget of --ratio, or fine ones, multiples of 8 from 64 on that keep the same fraction of each "
        "matrix",
        choices=RANK_STEPS,
    )
    rank_search: str | None = option(
        None,
        help="how ranks are divided: uniform, as --rank-steps says; loss, where gradients by the outputs say that "
        "truncation costs least; or learned, as adasvd does with its own. The default is uniform, but for adasvd",
        choices=RANK_SEARCHES,
    )
    ranks_json: str | None = option(None, help="ranks.json of an earlier run, for the rank of each matrix", path="read")
    qkv: str = option(
        "joint",
        help="factor each of Q, K, V as a whole, or every head by itself",
        choices=("joint", "per-head"),
    )
    factors: str = option(
        "float",
        help="keep the factors in the model's dtype, or as integers of 8 bits with a scale for each row, which cannot "
        "be trained",
        choices=FACTOR_KINDS,
    )
    calib_data: str | None = option(
        None,
        help="training data to calibrate on: a text file, a file of the task's rows, or a directory with a train "
        "file; the default is the task's training split, or WikiText-2's, from the hub",
        path="read",
    )
    calib_samples: int = option(512, help="texts, pairs or windows to calibrate on", at_least=1)
    calib_order: str = option(
        "random", help="draw the samples by the seed, or take the first ones", choices=("random", "first")
    )
    calib_seq_len: int | None = option(
        None,
        help="tokens a calibration sample is cut to; the default is 128, or windows of 512 for a causal model",
        at_least=1,
    )
    calib_batch_size: int = option(
        8, help="samples in a calibration batch; fwsvd squares gradients batch by batch", at_least=1
    )
    calib_inputs: str = option(
        None,
        help="calibrate each layer on what the dense model's layers before it give (the default), or on what they give "
        "once they are compressed, layer by layer (drone, asvd, or adasvd on drone)",
        choices=("dense", "compressed"),
    )
    refine: int = option(
        None,
        help="steps for which the factors of each layer are trained to give what the dense layer gave, without labels; "
        "the default is none",
        at_least=0,
    )
    save_stats: str | None = option(
        None, help="directory to write the calibration statistics to", path="write", directory=True
    )
    stats: str | None = option(None, help="statistics of the same model to use instead of calibrating", path="read")
    alpha: float | None = option(
        None, help="asvd: exponent of the mean activation that scales a channel (0.5)", at_least=0, at_most=2
    )
    asvd_search: bool = option(False, help="asvd: find each matrix's rank by its sensitivity, within the budget")
    adasvd_base: str | None = option(
        None,
        help="adasvd: method of the factors, standard, fwsvd or drone (drone)",
        suggestions=("standard", "fwsvd", "drone"),
    )
    device: str | None = option(
        None, help="where to compute: cuda or cpu; the default is cuda where there is one", suggestions=DEVICES
    )
    dtype: str | None = option(None, help="dtype of the saved weights; the default is the model's own", choices=DTYPES)
    output: str | None = option(
        None,
        help=f"directory to write; the default is {OUTPUT_ROOT}/MODEL_METHOD_RANKS",
        path="write",
        directory=True,
        default_path=OUTPUT_ROOT,
    )
    overwrite: bool = option(
        False, help="replace an existing compressed checkpoint, or existing statistics, and nothing else"
    )
    resume: bool = option(
        False,
        help="go on from the layers that an interrupted run of the same options has finished; they lie in "
        "OUTPUT.partial",
    )
    state_dict: bool = option(False, help="also write flashsvd_state_dict.pt, for tools that want one")
    seed: int = option(
        0,
        help="seeds calibration, rank search and the weights of a head the model comes without",
        at_least=0,
        at_most=2**63 - 1,  # what torch takes
    )

    def __post_init__(self) -> None:
        for name, value in recipe(self.recipe, finds_ranks=not self.ranks_json).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        super().__post_init__()

    def check(self) -> None:
        """Hold fields against each other.

        Raises:
            ConfigError: the ranks do not go together, or the statistics are to be both read and written, or are not
                those of the dense model alone.
        """
        self.rank_request()
        if self.stats and self.save_stats:
            raise ConfigError("--stats reuses statistics and --save-stats writes new ones; leave out one of them")
        for name in ("stats", "save_stats"):
            if self.calib_inputs == "compressed" and getattr(self, name):
                raise ConfigError(
                    f"{flag(name)} holds statistics of the dense model, and --calib-inputs compressed takes those of "
                    "layers before which others are compressed; leave out one of them"
                )

    def rank_request(self) -> RankRequest:
        """The ranks asked for; an empty request where a file gives the rank of each matrix.

        Raises:
            ConfigError: no ranks are given, more than one kind of them, or one that cannot be.
        """
        options = (self.rank, self.rank_attn, self.rank_ffn, self.rank_wo, self.ratio)
        if self.ranks_json:
            if any(value is not None for value in options):
                raise ConfigError("--ranks-json gives the rank of each matrix; leave out --rank... and --ratio")
            return RankRequest()
        steps: RankSteps = "fine" if self.rank_steps == "fine" else "fast"
        return RankRequest.from_options(*options, steps=steps)

    @property
    def walks(self) -> bool:
        """Whether the model is compressed layer by layer, and not in one pass."""
        return self.calib_inputs == "compressed" or self.refine > 0

    @property
    def factor_kind(self) -> FactorKind:
        return "int8" if self.factors == "int8" else "float"

    def output_directory(self, method: str) -> Path:
        """Where the checkpoint goes."""
        if self.output is not None:
            return expand(self.output)
        directory = expand(self.model)
        # A link goes by its own name; `.` and `..` have none.
        named = directory.resolve() if directory.is_dir() and directory.name in ("", "..") else directory
        label = "ranks-json" if self.ranks_json else self.rank_request().label
        layout = "_per-head" if self.qkv == "per-head" else ""
        search = f"_{self.rank_search}" if self.rank_search in ("loss", "learned") else ""
        integers = "_int8" if self.factors == "int8" else ""
        return Path(OUTPUT_ROOT) / f"{named.name}_{method}_{label}{search}{layout}{integers}"
