"""A decoder's feed-forward network over long prompts: time and peak memory, dense and low-rank, plain and ours.

    python benchmark/benchmark_long_context_decoder_ffn.py [--only llama-7b]

x + down(silu(gate(n)) * up(n)), n = RMSNorm(x), of LLaMA-7B's and SmolLM2-135M's sizes at ranks of half the parameters.
What grows with the tokens in plain torch are the two lifts of the inner dimension; ours makes them a chunk at a time,
and writes where it reads, as in `generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from flashsvd.blocks.parts.decoder_ffn import PackedDecoderFFN
from flashsvd.blocks.parts.read import read_whole
from flashsvd.blocks.parts.row_norm import RowNorm
from flashsvd.blocks.running.choice import Choices
from flashsvd.lowrank.layers import LowRankLinear
from flashsvd.lowrank.ranks import rank_for_ratio
from flashsvd.lowrank.shapes import MatrixShape
from support.harness import Case, Check, Prepared, Settings, Variant, finish, parse, run
from support.plot import lines
from support.ways import compiled, eager

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
SIZES = {"llama-7b": (4096, 11008), "smollm2": (576, 1536)}
TINY = {"llama": (32, 80)}
KEEP = 0.5
# Tokens that are held against fp64.
CHECKED = 256
BASELINES = ("dense", "dense compiled", "plain low-rank", "plain low-rank compiled")


class Network(nn.Module):
    """x [tokens, hidden] -> x + the network of a layer."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(hidden)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=inner))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.mlp(self.norm(x))
        return result


@dataclass(frozen=True)
class Ours:
    """The packed network, which is given a copy to write to."""

    network: PackedDecoderFFN
    x: Tensor
    place: Tensor

    def __call__(self) -> Tensor:
        result: Tensor = self.network(self.place.copy_(self.x))
        return result


def main(arguments: Sequence[str] | None = None) -> None:
    settings = parse(__doc__, arguments)
    torch.set_grad_enabled(False)
    file, rows = run("benchmark_long_context_decoder_ffn", cases(settings), settings)
    lines(file, "S", (), ("ms", "mib"))
    finish(rows)


def cases(settings: Settings) -> Iterator[Case]:
    for name, sizes in (TINY if settings.sizes == "tiny" else SIZES).items():
        for length in settings.pick(LENGTHS, (1024, 8192), (40,)):
            yield Case(name, {"S": length}, partial(variants, length, *sizes), BASELINES)


def variants(length: int, hidden: int, inner: int, settings: Settings) -> Iterator[Variant]:
    torch.manual_seed(0)
    with torch.device(settings.device):
        dense = Network(hidden, inner).to(settings.dtype).eval()
        x = torch.randn(length, hidden, dtype=settings.dtype)
    low_rank = factored(dense)
    for name, network in (("dense", dense), ("plain low-rank", low_rank)):
        held_to, call = check(network, x), partial(apply, x)
        yield Variant(name, partial(eager, network, call), held_to)
        yield Variant(f"{name} compiled", partial(compiled, network, call, settings), held_to)
    ours = Ours(packed(low_rank, settings), x, torch.empty_like(x))
    yield Variant("flashsvd", partial(Prepared, ours), held_to)


def apply(x: Tensor, network: nn.Module) -> Tensor:
    result: Tensor = network(x)
    return result


def check(network: nn.Module, x: Tensor) -> Check:
    """On some tokens, of which none knows of the others."""
    some = x[:CHECKED]
    exact = copy.deepcopy(network).double()(some.double())
    return Check(exact, network(some), lambda result: result[:CHECKED])


def factored(dense: Network) -> Network:
    """The same sizes with random factors."""
    hidden, inner = dense.mlp.hidden_size, dense.mlp.intermediate_size
    weight = dense.norm.weight
    low_rank = Network(hidden, inner)
    rank = rank_for_ratio(MatrixShape("mlp", "ffn", hidden, inner), KEEP)
    for name in ("gate_proj", "up_proj"):
        setattr(low_rank.mlp, name, LowRankLinear(hidden, inner, rank, bias=False))
    low_rank.mlp.down_proj = LowRankLinear(inner, hidden, rank, bias=False)
    return low_rank.to(weight.device, weight.dtype).eval()


def packed(network: Network, settings: Settings) -> PackedDecoderFFN:
    """Its block, as `flashsvd.optimize` makes it."""
    mlp, choices = network.mlp, Choices("auto" if settings.cuda else "torch")
    first = [read_whole(layer) for layer in (mlp.gate_proj, mlp.up_proj)]
    norm = RowNorm(network.norm, settings.dtype, choices)
    return PackedDecoderFFN(norm, first, read_whole(mlp.down_proj), "silu", settings.dtype, choices).eval()


if __name__ == "__main__":
    main()
