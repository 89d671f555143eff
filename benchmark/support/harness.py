"""What every benchmark shares: a script says how its variants are set up, and this checks, measures and records them.

A variant is held against fp64 before it is timed: its error may be at most twice that of the same products in plain
torch and the same dtype, plus a floor. One that is further off is reported as refused, and no time is taken; one that
raises is reported as failed. Either way the others are measured, and the script exits 1 in the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from flashsvd.errors import BackendError
from flashsvd.kernels.launch import Backend, interpreting
from support.memory import MIB, Held, held, level, peak, reset_peak, resident, settle
from support.results import RESULTS, Environment, Row, Status, csv_file, merge, read_rows, write_rows
from support.timing import time_events, time_graph, time_wall

Sizes = Literal["full", "small", "tiny"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Shares of the largest number of a result: half a unit in its last place, and for fp32 two units of many sums.
FLOORS = {torch.float32: 2.5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    runs: int
    warmup: int
    graphs: bool
    only: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    out: Path = RESULTS
    commit: str = ""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> Backend:
        """For kernels: they themselves, on a GPU or in the interpreter; plain torch is all that is left elsewhere."""
        return "triton" if self.cuda or interpreting() else "torch"

    def wants(self, variant: str) -> bool:
        """Whether to measure a variant of this name."""
        chosen = not self.variants or any(part in variant for part in self.variants)
        return chosen and not any(part in variant for part in self.without)

    def pick(self, full: Sequence[Any], small: Sequence[Any], tiny: Sequence[Any]) -> Sequence[Any]:
        return {"full": full, "small": small, "tiny": tiny}[self.sizes]


class Rule(Protocol):
    """What holds results against the right answer.

    Attributes:
        plain_error: what plain torch errs by in the variants' dtype.
        allowed: the most that a result may err by.
    """

    @property
    def plain_error(self) -> float: ...

    @property
    def allowed(self) -> float: ...

    def error(self, result: Tensor) -> float:
        """That of a variant's result."""


@dataclass(frozen=True)
class Check:
    """What results are held against.

    Attributes:
        exact: the right answer in fp64, on some of the rows.
        plain: what plain torch makes of them in the variants' dtype, one operation after the other.
        pick: those rows of a variant's result.
        exact_of_plain: the right answer to what `plain` answers, where that is more; it then is the scale of errors.
    """

    exact: Tensor
    plain: Tensor
    pick: Callable[[Tensor], Tensor]
    exact_of_plain: Tensor | None = None

    @property
    def plain_error(self) -> float:
        return error(self.plain, self._all)

    def error(self, result: Tensor) -> float:
        """That of a variant's result."""
        return error(self.pick(result), self.exact, self._all)

    @property
    def _all(self) -> Tensor:
        return self.exact if self.exact_of_plain is None else self.exact_of_plain

    @property
    def allowed(self) -> float:
        return most_allowed(self.plain_error, self.plain.dtype)


@dataclass(frozen=True)
class Prepared:
    """A variant that is set up.

    Attributes:
        forget: drops what calls keep for later ones, such as captured graphs, so that the next call takes it anew.
        describe: what else to say of it, after it ran.
        less: what the call does beside what is measured, as a call whose own time is taken off.
    """

    call: Callable[[], Tensor]
    forget: Callable[[], None] | None = None
    describe: Callable[[], str] | None = None
    less: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        make: sets it up; what it allocates is no part of the memory that calls take.
        flops: of one call; None where it is not counted.
        read: bytes of the weights that are read for each unit of what is measured; None where they are not counted.
    """

    name: str
    make: Callable[[], Prepared]
    check: Rule
    flops: float | None = None
    read: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        call: Callable[[], Tensor],
        check: Rule,
        flops: float | None = None,
        read: int | None = None,
    ) -> Variant:
        """One that needs no set-up."""
        return cls(name, lambda: Prepared(call), check, flops, read)


@dataclass(frozen=True)
class Case:
    """Variants beside each other.

    Attributes:
        name: what `--only` picks by its beginning.
        build: makes the operands and the variants, one after the other where they are large.
        baselines: variants that the others' times are compared with.
        per_call: how many of what is measured, such as batches, one call computes.
        quoted: figures from elsewhere, to stand beside the measured ones.
        graphs: whether runs may be replayed as one CUDA graph; whole models are called as users call them.
    """

    name: str
    shapes: dict[str, Any]
    build: Callable[[Settings], Iterable[Variant]]
    baselines: tuple[str, ...] = ()
    per_call: int = 1
    quoted: tuple[Row, ...] = ()
    graphs: bool = True

    @property
    def sizes(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.shapes.items())


class Named(Protocol):
    """What `--only` picks by the beginning of its name."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def error(result: Tensor, exact: Tensor, scale: Tensor | None = None) -> float:
    """The largest, as a share of the largest number, of `scale` where that is another tensor."""
    return float((result.double() - exact).abs().max() / (exact if scale is None else scale).abs().max())


def most_allowed(plain_error: float, dtype: torch.dtype) -> float:
    """The most that a result may err by where plain torch errs by so much."""
    return 2 * plain_error + FLOORS[dtype]


def parse(description: str | None, arguments: Sequence[str] | None = None, *, on_cpu: bool = False) -> Settings:
    """The settings of a script's command line, for one that needs a GPU, unless it is to run on the CPU."""
    parser = gpu_parser(description)
    return gpu_settings(parser, parser.parse_args(arguments), on_cpu=on_cpu)


def gpu_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of `parse`, for a script that has more of them."""
    parser = parser_of(description)
    parser.add_argument("--sizes", choices=["full", "small", "tiny"], default="full", help="how much to sweep")
    parser.add_argument("--events", action="store_true", help="time every run by itself, not many as one CUDA graph")
    return parser


def gpu_settings(parser: argparse.ArgumentParser, given: argparse.Namespace, *, on_cpu: bool = False) -> Settings:
    """The settings that the options of `gpu_parser` ask for."""
    if not (given.dry_run or on_cpu or torch.cuda.is_available()):
        parser.error("there is no GPU here; --dry-run tries the script on the CPU")
    device = torch.device("cpu" if given.dry_run or on_cpu else "cuda")
    return settings_of(given, device, given.sizes, graphs=not given.events)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: bf16, on a CPU fp32")
    parser.add_argument("--runs", type=int, default=50, help="timed runs, whose median counts (default: 50)")
    parser.add_argument("--warmup", type=int, default=10, help="calls before those (default: 10)")
    parser.add_argument("--only", default="", help="cases, by the beginnings of their names, comma-separated")
    parser.add_argument("--variants", default="", help="variants to measure, by parts of their names, comma-separated")
    parser.add_argument("--without", default="", help="variants to leave out, by parts of their names, comma-separated")
    parser.add_argument(
        "--out", type=Path, help="where CSV and plot go (default: benchmark/results; of a dry run, a temporary one)"
    )
    parser.add_argument("--commit", default="", help="what to record as the commit, where there is no git to ask")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and few runs on the CPU: does it work?")
    return parser


def settings_of(given: argparse.Namespace, device: torch.device, sizes: Sizes = "full", *, graphs: bool) -> Settings:
    """The settings that the options of `parser_of` ask for; those of a dry run are tiny."""
    dry = given.dry_run
    return Settings(
        device=device,
        # Triton's interpreter computes wrongly in bf16, and many CPUs slowly.
        dtype=DTYPES[given.dtype or ("fp32" if device.type == "cpu" else "bf16")],
        sizes="tiny" if dry else sizes,
        runs=2 if dry else given.runs,
        warmup=1 if dry else given.warmup,
        graphs=graphs,
        only=names(given.only),
        variants=names(given.variants),
        without=names(given.without),
        out=given.out or (Path(tempfile.mkdtemp()) if dry else RESULTS),
        commit=given.commit,
    )


def run(script: str, cases: Iterable[Case], settings: Settings) -> tuple[Path, list[Row]]:
    """Measure the cases, and write what was found after each of them; earlier rows of other cases stay.

    Returns:
        The CSV file, and the rows of this run.

    Raises:
        SystemExit: with 2, a name of `--only` begins no case.
    """
    chosen = pick(list(cases), settings.only)
    torch.set_grad_enabled(False)
    environment = Environment.of(settings.device, settings.commit)
    file = csv_file(script, environment.gpu, settings.out)
    earlier = read_rows(file) if file.is_file() else []
    print(f"{script}: {environment.gpu}, torch {environment.torch}, triton {environment.triton}, "
          f"transformers {environment.transformers}, commit {environment.commit or 'unknown'}")  # fmt: skip
    rows: list[Row] = []
    for case in chosen:
        rows += [_on(environment, row) for row in run_case(case, settings)]
        write_rows(merge(earlier, rows), file)
    print(f"\n{file}: {len(rows)} rows of this run")
    return file, rows


def pick(cases: Sequence[C], only: tuple[str, ...]) -> list[C]:
    """Those whose names begin with one of `only`, or all where that is empty.

    Raises:
        SystemExit: with 2, one of `only` begins no case's name.
    """
    for name in only:
        if not any(case.name.startswith(name) for case in cases):
            known = ", ".join(dict.fromkeys(case.name for case in cases))
            print(f"--only {name} begins the name of no case; there are {known}", file=sys.stderr)
            raise SystemExit(2)
    return [case for case in cases if not only or case.name.startswith(only)]


def _on(environment: Environment, row: Row) -> Row:
    """The row with what it was measured on; figures from elsewhere keep their own."""
    return row if row.status == "quoted" else dataclasses.replace(row, **vars(environment))


def finish(rows: Sequence[Row]) -> None:
    """Ends the script with exit code 1 where a variant was refused or failed."""
    if untimed := [f"{row.case}: {row.variant} ({row.status})" for row in rows if row.status in ("refused", "failed")]:
        raise SystemExit(f"not timed: {'; '.join(untimed)}")


def run_case(case: Case, settings: Settings) -> list[Row]:
    """The rows of a case, printed as they come."""
    print(f"\n{case.name}, {case.sizes}, {short(settings.dtype)}", flush=True)
    settle()
    rows: list[Row] = []
    try:
        for variant in case.build(settings):
            if not settings.wants(variant.name):
                continue
            rows.append(_attempt(variant, case, settings))
            _show(rows[-1])
    except Exception as error:
        status, note = failure(error)
        rows.append(Row(case.name, case.sizes, "set-up", status, short(settings.dtype), note=note))
        _show(rows[-1])
    rows = [dataclasses.replace(row, speedups=speedups(row, rows, case.baselines)) for row in rows]
    for row in rows:
        if row.speedups and row.variant not in case.baselines:
            print(f"  {row.variant}: {row.speedups}")
    for row in case.quoted:
        _show(row)
    return rows + [dataclasses.replace(row, case=case.name, shapes=case.sizes) for row in case.quoted]


def _attempt(variant: Variant, case: Case, settings: Settings) -> Row:
    """The variant's row, whatever becomes of it: one that fails must not cost the others their measurement."""
    row = Row(case.name, case.sizes, variant.name, "failed", short(settings.dtype))
    try:
        return _measure(variant, case, settings, row)
    except Exception as error:
        status, note = failure(error)
        return dataclasses.replace(row, status=status, note=note)
    finally:
        settle()


def failure(error: Exception) -> tuple[Status, str]:
    """What became of a variant that raised this, and why."""
    if isinstance(error, BackendError):
        return "skipped", str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "failed", "out of memory"
    if type(error).__name__ == "OutOfResources":  # Triton's, which may not be installed
        return "failed", "its tiles do not fit on this GPU"
    traceback.print_exc()
    lines = str(error).strip().splitlines() or [""]
    return "failed", f"{type(error).__name__}: {lines[-1][:200]}"


def attempt(row: Row, check: Check, call: Callable[[], Tensor], time: Callable[[], float]) -> Row:
    """The row with the error of a call and, where that is allowed, with its milliseconds, whatever becomes of it."""
    try:
        found, allowed = check.error(call()), check.allowed
        row = dataclasses.replace(row, error=found, plain_error=check.plain_error)
        # Written so that a NaN fails.
        if not found <= allowed:
            return dataclasses.replace(row, status="refused", note=f"error {found:.2e}, allowed {allowed:.2e}")
        return dataclasses.replace(row, status="ok", ms=time())
    except Exception as error:
        status, note = failure(error)
        return dataclasses.replace(row, status=status, note=note)


def _measure(variant: Variant, case: Case, settings: Settings, row: Row) -> Row:
    start = time.perf_counter()
    prepared = variant.make()
    setup = time.perf_counter() - start
    if settings.cuda:
        level()
    before = held() if settings.cuda else Held(0, 0)
    first = _seconds(prepared.call, settings)
    capture, capture_peak = None, 0
    if prepared.forget is not None and settings.cuda:
        # Once more without what compiling and measuring took.
        prepared.forget()
        level()
        reset_peak()
        capture = _seconds(prepared.call, settings)
        capture_peak = peak()
    for _ in range(settings.warmup - 1):
        prepared.call()
    # What is checked is what the timed calls will do, replays included.
    found = variant.check.error(prepared.call())
    row = dataclasses.replace(
        row, setup_s=setup, first_s=first, capture_s=capture, error=found, plain_error=variant.check.plain_error
    )
    # Written so that a NaN fails.
    if not found <= variant.check.allowed:
        return dataclasses.replace(
            row, status="refused", note=f"error {found:.2e}, allowed {variant.check.allowed:.2e}"
        )
    if settings.cuda:
        mib, mib_call = _memory(prepared.call, before, capture_peak)
        row = dataclasses.replace(row, mib=mib, mib_call=mib_call)
    else:
        if prepared.forget is not None:
            prepared.forget()
        row = dataclasses.replace(row, mib=resident(prepared.call))
    ms, timing = _time(prepared.call, settings, case)
    if prepared.less is not None:
        prepared.less()
        ms -= _time(prepared.less, settings, case)[0]
    ms /= case.per_call
    tflops = None if variant.flops is None else variant.flops / case.per_call / ms / 1e9
    notes = [] if variant.read is None else [f"{variant.read / ms / 1e9:.3g} TB/s of {variant.read / 1e9:.4g} GB"]
    notes += [prepared.describe()] if prepared.describe else []
    return dataclasses.replace(
        row, status="ok", ms=ms, tflops=tflops, runs=settings.runs, timing=timing, note=" | ".join(notes)
    )


def _memory(call: Callable[[], Any], before: Held, capture_peak: int) -> tuple[float, float]:
    """MiB of a call above `before` and above what is there between calls.

    A replay allocates nothing: its intermediates lie in the graph's pool, all of which therefore counts as taken.
    """
    settle()
    between = held()
    reset_peak()
    call()
    highest = peak()
    above = max(highest + between.idle, capture_peak + before.idle) - before.live - before.idle
    return above / MIB, (highest - between.live) / MIB


def _time(call: Callable[[], Any], settings: Settings, case: Case) -> tuple[float, str]:
    if not settings.cuda:
        return time_wall(call, settings.runs), "wall"
    if settings.graphs and case.graphs:
        return time_graph(call, settings.runs), "graph"
    return time_events(call, settings.runs), "events"


def _seconds(call: Callable[[], Any], settings: Settings) -> float:
    start = time.perf_counter()
    call()
    if settings.cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def speedups(row: Row, rows: Sequence[Row], baselines: tuple[str, ...]) -> str:
    """How many times as long as a row each of these variants takes, as `baseline=times`."""
    if row.ms is None:
        return ""
    times = {other.variant: other.ms for other in rows if other.variant in baselines and other.ms is not None}
    return "; ".join(f"{name}={ms / row.ms:.2f}" for name, ms in times.items() if name != row.variant)


def _show(row: Row) -> None:
    print(_line(row), flush=True)
    if row.status == "ok" and row.note:
        print("      " + row.note.replace(" | ", "\n      "), flush=True)


def _line(row: Row) -> str:
    parts = [f"  {row.variant:<44}"]
    if row.ms is None:
        return f"{parts[0]} {row.status}: {row.note}"
    parts.append(f"{row.ms:9.3f} ms")
    parts.append(f"{row.tflops:6.0f} TFLOP/s" if row.tflops is not None else "")
    parts.append(f"{row.mib:8.1f} MiB" if row.mib is not None else "")
    parts.append(f"({row.mib_call:.1f} a call)" if row.mib_call is not None else "")
    parts.append(f"error {row.error:.1e}/{row.plain_error:.1e}" if row.error is not None else "")
    parts += [f"{name} {value:.1f} s" for name, value in (("setup", row.setup_s), ("first", row.first_s),
              ("capture", row.capture_s)) if value is not None and value >= 0.05]  # fmt: skip
    if row.status != "ok":
        parts.append(f"[{row.status}] {row.note}")
    return " ".join(part for part in parts if part)


def names(text: str) -> tuple[str, ...]:
    """Those of a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def short(dtype: torch.dtype) -> str:
    """A dtype as `--dtype` names it."""
    return next(name for name, known in DTYPES.items() if known == dtype)
