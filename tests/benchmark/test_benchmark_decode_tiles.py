"""`benchmark_decode_linears.py --tiles` measures each product of a layer with all tiles that fit, and says the best."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import benchmark_decode_linears
from flashsvd.kernels.decode_table import MOST_OF_A_WARP, default_tiles
from support import decode_tiles, harness
from support.decode_layers import SIZES
from support.decode_tiles import TABLE, Cell, Way, as_call, cells, jobs, summary, ways
from support.results import Row, read_rows

LLAMA = SIZES["llama-7b"]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """A script turns them off."""
    yield
    torch.set_grad_enabled(True)


def find(name: str, n: int, dtype: torch.dtype = BF16) -> Cell:
    return next(cell for cell in cells(LLAMA, [n], dtype) if cell.name == name)


@pytest.mark.slow
def test_a_dry_run_has_a_row_for_each_product_and_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Kernels in the interpreter have tests of their own, and take their time.
    monkeypatch.setattr(harness, "interpreting", lambda: False)
    benchmark_decode_linears.main(["--tiles", "--dry-run", "--out", str(tmp_path)])
    rows = read_rows(tmp_path / "decode_tiles_cpu.csv")
    assert {row.status for row in rows} == {"ok"}
    names = {f"{name} {kind}" for name in ("qkv_u", "qkv_v", "gate_up_v", "o_u") for kind in ("fp32", "int8")}
    assert names <= {row.case for row in rows if row.variant == TABLE}
    assert "times as long" in capsys.readouterr().out


def test_what_fits_no_registers_is_left_out() -> None:
    exact = torch.float32
    one, four = (find("down_u fp32", n, exact) for n in (1, 4))
    assert Way(decode_tiles.ThinTiles(2, 1024, warps=2, stages=1)) in ways(one, exact)
    assert "8x2048/8/1" in map(str, ways(one, exact))
    assert "8x2048/8/1" not in map(str, ways(four, exact))
    for way in ways(four, exact)[1:]:
        assert way.tiles is not None
        assert 4 * way.tiles.rows * way.tiles.columns <= MOST_OF_A_WARP * way.tiles.warps


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["qkv_u bf16", "gate_up_v int8", "down_u bf16"])
def test_no_tiles_are_measured_twice(name: str, n: int) -> None:
    cell = find(name, n)
    found = ways(cell, BF16)
    table = Way(default_tiles(as_call(cell, BF16)))
    assert found[0] == Way(None)
    assert table not in found
    assert len(found) == len(set(map(str, found))) > 3


@pytest.mark.parametrize("name", ["qkv_u bf16", "o_u int8", "down_u bf16"])
def test_programs_share_the_columns_of_first_factors_by_tensor_cores(name: str) -> None:
    assert any(way.splits == 4 for way in ways(find(name, 8), BF16))
    assert not any(way.splits for way in ways(find(name, 1), BF16))


def test_tensor_cores_get_tiles_that_they_take() -> None:
    tiles = [way.tiles for way in ways(find("o_v bf16", 8), BF16) if way.tiles is not None]
    assert all(t.rows >= 16 and t.columns <= 512 for t in tiles)


def test_a_kernel_that_several_products_launch_is_compiled_once(tmp_path: Path) -> None:
    settings = harness.parse(None, ["--dry-run", "--dtype", "bf16", "--out", str(tmp_path)])
    names = ("o_v bf16", "down_v bf16")
    alone, together = (jobs([find(name, 8) for name in some], settings) for some in (names[:1], names))
    assert len(alone) == len(together) == len(ways(find("o_v bf16", 8), BF16))


def test_the_summary_names_the_fastest_and_how_far_the_table_is_off() -> None:
    def row(variant: str, ms: float | None, note: str) -> Row:
        return Row("o_u bf16", "n=1", variant, "ok" if ms else "failed", ms=ms, note=note)

    rows = [row(TABLE, 0.006, "2x2048/4/1, 1.40 TB/s"), row("a", 0.004, "4x1024/4/1, 2.10 TB/s"), row("b", None, "no")]
    expected = "o_u bf16 n=1: 4x1024/4/1, 2.10 TB/s in 4.00 us; the table's 2x2048/4/1, 1.40 TB/s, 1.50 times as long"
    assert summary(rows) == expected
    assert summary([row(TABLE, None, "no room"), rows[1]]) == "o_u bf16 n=1: the table's failed: no room"
