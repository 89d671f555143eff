"""What a method is: a function from a weight, a rank and statistics to two factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from flashsvd.lowrank.ranks import RankSearch, RankSteps
from flashsvd.lowrank.shapes import MatrixShape

Need = Literal["covariance", "mean_abs", "row_gradients", "output_gradients"]
# Those that differentiate a loss.
GRADIENTS: frozenset[Need] = frozenset({"row_gradients", "output_gradients"})


class Factors(NamedTuple):
    """W [..., in, out] ~ U V, with U [..., in, r] and V [..., r, out].

    Columns of U and rows of V come by falling importance, so that the first r of them are the factors of rank r.
    `note` says what was degenerate about the input, and is empty as a rule.
    """

    u: Tensor
    v: Tensor
    note: str = ""

    def product(self) -> Tensor:
        return self.u @ self.v


@dataclass(frozen=True)
class Statistics:
    """What calibration learned about one matrix W [in, out] of h blocks (its heads, or 1).

    Attributes:
        covariance: E[x^T x] of the layer's input rows x, [in, in], not centred.
        mean_abs: E|x|, [in].
        row_gradients: sum over batches of (dL/dW)^2, summed along each row of each block, [h, in].
        output_gradients: E[g^T g] of the gradients g of the summed loss by the layer's output rows, [out, out]; of more
            blocks than one, that of each, [h, out / h, out / h].
        drift: E[x^T (x_dense - x)], [in, in], where x are not the inputs x_dense of the dense model but those that
            compressed layers before give; None where they are. It comes with the covariance.
    """

    covariance: Tensor | None = None
    mean_abs: Tensor | None = None
    row_gradients: Tensor | None = None
    output_gradients: Tensor | None = None
    drift: Tensor | None = None

    def to(self, device: torch.device) -> Statistics:
        fields = (self.covariance, self.mean_abs, self.row_gradients, self.output_gradients, self.drift)
        return Statistics(*(None if value is None else value.to(device) for value in fields))


class Factorize(Protocol):
    def __call__(self, weight: Tensor, rank: int, statistics: Statistics) -> Factors:
        """Factor W [..., in, out], any leading batch of heads, at a rank of at most min(in, out).

        `statistics` holds what the method names in its `needs`, on the weight's device, `row_gradients` as
        [..., in] for the same leading batch.
        """


class RankProblem(Protocol):
    """What a method that chooses ranks by itself may ask. It sees shapes and losses, never a model."""

    @property
    def shapes(self) -> Sequence[MatrixShape]:
        """The matrices to choose ranks for."""

    @property
    def budget(self) -> int:
        """Parameters that all of them together may keep."""

    @property
    def steps(self) -> RankSteps:
        """The steps that ranks are rounded to."""

    @property
    def uniform(self) -> Mapping[str, int]:
        """Ranks that meet the budget by keeping the same fraction of each matrix."""

    @property
    def batches(self) -> int:
        """How many calibration batches there are."""

    @property
    def seed(self) -> int:
        """Seeds everything random."""

    def loss(self, masks: Mapping[str, Tensor], batch: int) -> Tensor:
        """The loss on one batch, differentiable in the masks.

        A mask [full rank] multiplies the rank-space activations of its matrix, whose factors lie by falling
        importance; a matrix without a mask computes its dense form.
        """


class ChooseRanks(Protocol):
    def __call__(self, problem: RankProblem) -> dict[str, int]:
        """A rank for each matrix, within the budget (`ranks.fit_to_budget`); full rank where it should stay dense."""


@dataclass(frozen=True)
class Method:
    """A compression method.

    Attributes:
        needs: the statistics that `factorize` reads, or the search for ranks.
        aliases: other names users know it by.
        choose_ranks: for methods that find a rank for each matrix by themselves; None leaves that to others.
        search: how its ranks are divided.
        options: what `configure` takes, by name, as it is where nothing else is asked for.
        configure: the same method with options set; None where it has none.
    """

    name: str
    factorize: Factorize
    needs: frozenset[Need] = frozenset()
    aliases: tuple[str, ...] = ()
    choose_ranks: ChooseRanks | None = None
    search: RankSearch = "uniform"
    options: Mapping[str, Any] = field(default_factory=dict)
    configure: Callable[..., Method] | None = None
