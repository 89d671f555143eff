"""Parts whose columns are unequal or interleaved shares of a module's."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from flashsvd.compression.factoring import Factoring, QKVLayout
from flashsvd.compression.factorize import factor_model, matrix_shapes
from flashsvd.integrations.quantizer import FlashSVDConfig
from flashsvd.lowrank.columns import Columns
from flashsvd.lowrank.joined import JoinedProjections, build_module, dense_bias, dense_matrix, join_columns, separate
from flashsvd.lowrank.joined import share_of_columns as share
from flashsvd.lowrank.ranks import RankChoice
from flashsvd.lowrank.spec import FORMAT_VERSION, JoinedSpec, read_modules
from flashsvd.methods.registry import get_method
from flashsvd.models.architecture import Part, Target

NAMES = ("q", "k", "v")
HEAD_DIM = 3
# Four heads of Q to one of K and one of V: all of Q first, or Q, K and V for each of two heads of K.
PARTS = {
    "unequal": {"shares": (4, 1, 1)},
    "interleaved": {"shares": (1, 1, 1), "groups": 4},
    "unequal and interleaved": {"shares": (4, 1, 1), "groups": 2},
}


class Attention(nn.Module):
    """A layer that computes Q, K and V at once."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(40, 12 * HEAD_DIM, bias=bias)
        self.out = nn.Linear(36, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.qkv(x))
        return out


def targets(kind: str) -> list[Target]:
    columns = Part("q", NAMES, **PARTS[kind]).columns
    heads = [columns.groups * share * 12 // (columns.groups * sum(columns.shares)) for share in columns.shares]
    parts = [
        Target("qkv", "attn", 0, count, Part(name, NAMES, **PARTS[kind]))
        for name, count in zip(NAMES, heads, strict=True)
    ]
    return [*parts, Target("out", "wo", 0)]


@pytest.mark.parametrize("kind", PARTS)
def test_the_parts_are_taken_from_their_columns_and_put_back(kind: str) -> None:
    columns, matrix = Part("q", NAMES, **PARTS[kind]).columns, torch.arange(72.0).reshape(2, 36)
    shares = [share(matrix, columns, i) for i in range(3)]
    assert sum(part.shape[1] for part in shares) == 36
    assert torch.equal(join_columns(shares, columns), matrix)


def test_interleaved_columns_are_those_of_each_group() -> None:
    columns = torch.arange(12)
    assert share(columns, Columns((1, 1, 1), groups=2), 1).tolist() == [2, 3, 8, 9]
    assert share(columns, Columns((2, 1, 1)), 1).tolist() == [6, 7, 8]
    assert share(columns, Columns((4, 1, 1), groups=2), 0).tolist() == [0, 1, 2, 3, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (Columns((4, 1, 1)), "its 8 columns do not make 3 parts of 4 : 1 : 1"),
        (Columns((1, 1), groups=3), "its 8 columns do not make 3 groups of 2 equal parts"),
    ],
)
def test_columns_that_do_not_divide_are_an_error(columns: Columns, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        share(torch.zeros(2, 8), columns, 0)


@pytest.mark.parametrize(("shares", "groups"), [((4, 1), 1), ((4, 1, 1, 1), 1), ((4, 1, 0), 1), ((), 0)])
def test_shares_that_are_not_those_of_the_parts_are_an_error(shares: tuple[int, ...], groups: int) -> None:
    with pytest.raises(ValueError, match="do not divide q, k, v; give one for each"):
        Part("q", NAMES, shares, groups)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qkv", ["joint", "per-head"])
@pytest.mark.parametrize("kind", PARTS)
def test_full_rank_reproduces_the_layer_and_its_description_the_module(kind: str, qkv: QKVLayout, bias: bool) -> None:
    model, dense = Attention(bias), Attention(bias)
    shapes = {shape.name: shape for shape in matrix_shapes(model, targets(kind), qkv)}
    assert sum(shapes[f"qkv.{name}"].out_features for name in NAMES) == 36
    plan = {name: RankChoice(shape.full_rank) for name, shape in shapes.items()}
    # One part of three stays dense.
    plan["qkv.k"] = RankChoice(None, "asked to")
    factor_model(model, Factoring(targets(kind), plan, get_method("standard"), qkv))
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense_matrix(model.qkv), dense_matrix(dense.qkv), rtol=1e-4, atol=1e-5)
    found, expected = dense_bias(model.qkv), dense_bias(dense.qkv)
    assert (found is None) == (expected is None)
    assert found is None or expected is None or torch.equal(found, expected)

    config = FlashSVDConfig.of(model)
    assert config.format_version == FORMAT_VERSION
    written = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    spec = read_modules(written["modules"], written["format_version"])["qkv"]
    assert isinstance(spec, JoinedSpec)
    again = build_module(spec, dense.qkv)
    again.load_state_dict(model.qkv.state_dict())
    assert torch.equal(again(x), model.qkv(x))


@pytest.mark.parametrize("kind", PARTS)
def test_a_target_reads_its_own_columns_of_a_gradient(kind: str) -> None:
    model = Attention(bias=False)
    model.qkv(torch.ones(1, 40)).square().sum().backward()
    gradient = model.qkv.weight.grad
    assert gradient is not None
    parts = [target.own_columns(gradient.T) for target in targets(kind)[:3]]
    part = targets(kind)[0].part
    assert part is not None
    assert torch.equal(join_columns(parts, part.columns), gradient.T)


def test_parts_are_separated_by_name_where_they_are_equal_ones() -> None:
    dense = nn.Linear(4, 12)
    assert [tuple(part.weight.shape) for part in separate(dense, NAMES).values()] == [(4, 4)] * 3
    joined = JoinedProjections.replacing(dense, NAMES, {})
    assert separate(joined, NAMES) == joined.parts()
    for other, names in (
        (JoinedProjections.replacing(dense, NAMES, {}, Columns((2, 1, 1))), NAMES),
        (joined, ("q", "v", "k")),
        (joined, ("input", "gate")),
    ):
        with pytest.raises(ValueError, match="its parts are q, k, v"):
            separate(other, names)
