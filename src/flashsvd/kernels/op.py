"""The scaffold of every operator: what happens between its public function and its kernel.

A file of an operator states a `NamedTuple` of its operands and options, and what to do with one: check it, compute it
in plain torch, make its operands readable by the kernel, and plan the launch. Its public function then calls an `Op`,
which does the rest in this order:

1. A plan that was kept for such operands and options is run, and nothing else is done: a busy host waits for this path.
2. The call is checked.
3. Where the kernel is not asked for or cannot run, plain torch computes the result.
4. Under torch.compile the operator becomes one node of the graph, `torch.ops.flashsvd.<name>`, which comes back here.
5. A call without work is answered with no launch.
6. Tiles are chosen, the launch is planned and run, and the plan is kept where no operand had to be copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashsvd.kernels.launch import Backend, precision, use_triton
from flashsvd.kernels.plans import Operands, Plan, in_place
from flashsvd.kernels.tiles import Table, TilesOption, choose

# Batches without padding differ in their numbers of tokens, each of which has a plan.
MOST_PLANS = 1024

Call = TypeVar("Call", bound=tuple[Any, ...])


def operand_names(call: Callable[..., tuple[Any, ...]]) -> list[str]:
    """The fields of a call that are tensors, which come before its options."""
    return [name for name, hint in get_type_hints(call).items() if hint in (Tensor, Tensor | None)]


def _no_rows(call: tuple[Any, ...]) -> bool:
    return bool(call[0].shape[0] == 0)


class Op(Generic[Call]):
    """An operator of plain torch and a kernel.

    Args:
        name: its name under `torch.ops.flashsvd`, and in the memory of measured tiles.
        call: the `NamedTuple` of operands, tensors or None, and then of options. The first operand is never None; its
            dtype and device are the result's.
        check: raises ValueError where a call cannot be.
        reference: the result in plain torch.
        shape: the shape of the result.
        prepare: the same call, its operands laid out as the kernel reads them, for products of the given precision.
        plan: the launch for prepared operands, the precision, and tiles; these are None without a `table`.
        table: the tiles to choose from; None where the kernel takes none.
        writes: the operands that are written. The first one is where the result goes, and if it is None, new memory.
            Without any the result is always new.
        idle: whether there is nothing to launch for.
    """

    def __init__(
        self,
        name: str,
        call: Callable[..., Call],
        *,
        check: Callable[[Call], None],
        reference: Callable[[Call], Tensor],
        shape: Callable[[Call], tuple[int, ...]],
        prepare: Callable[[Call, str], Call],
        plan: Callable[[Call, str, Any], Plan],
        table: Table[Call] | None = None,
        writes: tuple[str, ...] = (),
        idle: Callable[[Call], bool] = _no_rows,
    ) -> None:
        self.name, self.plans = name, dict[Hashable, Plan]()
        self.check, self.reference = check, reference
        self.call, self._shape, self._idle = call, shape, idle
        self._prepare, self._plan, self._table = prepare, plan, table
        names = operand_names(call)
        self._operands = len(names)
        self._result = names.index(writes[0]) if writes else None
        self._node = _register(self, call, writes)

    def __call__(
        self, operands: Operands, options: tuple[Hashable, ...], backend: Backend, tiles: TilesOption = None
    ) -> Tensor:
        """The result for these fields of the call.

        Raises:
            ValueError: the check refuses the call, or there are no such tiles.
            BackendError: `backend="triton"` cannot run here.
        """
        key, exact, x = None, "", operands[0]
        assert x is not None
        # There may be a plan where a kernel is launched, and on the current GPU, which is where a launch goes. `auto`
        # launches on GPUs only; elsewhere a tensor, such as one of torch's function transforms, may have no address.
        at_hand = x.device.index == torch.cuda.current_device() if x.is_cuda else backend == "triton"
        if backend != "torch" and at_hand and not is_compiling():
            exact = precision(x)
            # What decides how a kernel reads a tensor; Triton compiles anew for addresses that are no multiples of 16.
            kinds = [
                None if o is None else (o.shape, o.stride(), o.dtype, o.device, o.data_ptr() % 16) for o in operands
            ]
            key = (exact, options, backend, tiles, *kinds)
            if plan := self.plans.get(key):
                return plan(*operands)
        call = self.call(*operands, *options)
        self.check(call)
        if not use_triton(backend, x):
            return self.in_torch(call)
        if is_compiling():
            return self._in_graph(call)
        return self.launch(call, exact or precision(x), tiles, key)

    def in_torch(self, call: Call) -> Tensor:
        """The result in plain torch."""
        result, place = self.reference(call), self._place(call)
        return result if place is None else place.copy_(result)

    def launch(self, call: Call, exact: str, tiles: TilesOption = None, key: Hashable = None) -> Tensor:
        """The result by the kernel, whose plan is kept under the key, unless that is None.

        Args:
            exact: the precision to plan for, read once: torch may be set to another one while a kernel compiles.
        """
        if self._idle(call):
            place = self._place(call)
            return call[0].new_empty(self._shape(call)) if place is None else place
        with _current(call[0]):
            ready = self._prepare(call, exact)
            operands: Operands = ready[: self._operands]
            plan = self._planned(ready, exact, tiles)
            result = plan(*operands)
        if key is not None and in_place(call[: self._operands], operands):
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            self.plans[key] = plan
        return result

    def _planned(self, ready: Call, exact: str, tiles: TilesOption) -> Plan:
        if self._table is None:
            return self._plan(ready, exact, None)
        operands = ready[: self._operands]
        chosen = choose(tiles, self._table, ready, self.name, lambda tiles: self._plan(ready, exact, tiles)(*operands))
        return self._plan(ready, exact, chosen)

    def _in_graph(self, call: Call) -> Tensor:
        if self._result is None:
            fresh: Tensor = self._node(*call)
            return fresh
        fields = list(call)
        if fields[self._result] is None:
            fields[self._result] = call[0].new_empty(self._shape(call))
        self._node(*fields)
        place: Tensor = fields[self._result]
        return place

    def _place(self, call: Call) -> Tensor | None:
        """Where the caller wants the result."""
        place: Tensor | None = None if self._result is None else call[self._result]
        return place


def _current(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _register(op: Op[Call], call: Callable[..., Call], writes: tuple[str, ...]) -> Any:
    """The operator as a node of torch's graphs, `torch.ops.flashsvd.<name>`, whose parameters are the call's fields."""

    def run(*fields: Any) -> Tensor | None:
        result = op(fields[: op._operands], fields[op._operands :], "triton")
        return None if writes else result

    def fake(*fields: Any) -> Tensor | None:
        return None if writes else fields[0].new_empty(op._shape(call(*fields)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=hint) for name, hint in get_type_hints(call).items()]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # torch reads the schema from it
        parameters, return_annotation=None if writes else Tensor
    )
    torch.library.custom_op(f"flashsvd::{op.name}", run, mutates_args=writes).register_fake(fake)
    return getattr(torch.ops.flashsvd, op.name).default
