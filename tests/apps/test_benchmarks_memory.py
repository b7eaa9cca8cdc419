"""What ``python -m benchmarks memory`` counts is exact: known allocations, arithmetic, and opt.memory() agree."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import memory, record
from benchmarks.__main__ import main
from benchmarks.allocated import Allocations
from benchmarks.cases import DTYPES
from benchmarks.passes import gpt2_loss, gradients_alone

SIZE = (64, 2, 500, 16)
CASE = memory.case_of(SIZE)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _measure(name: str, dtype: str = "fp32", what: str = "alone") -> dict[str, Any]:
    try:
        return memory.measure_here(memory.MODES[name], DTYPES[dtype], CASE, what)
    except memory.Unavailable as error:
        pytest.skip(str(error))


# --- the counter ------------------------------------------------------------------------------------------------------
def test_known_allocations_are_counted_to_the_byte() -> None:
    with Allocations() as found:
        with found.phase("nothing"):
            pass
        with found.phase("kept"):
            kept = torch.zeros(1000, dtype=torch.float64)
        with found.phase("freed within"):
            torch.empty(300, dtype=torch.bfloat16)
        with found.phase("within an op"):
            more = kept.neg().sum()  # -kept lives until the sum is there
        with found.phase("freed"):
            del kept
        with found.phase("all freed"):
            del more
    assert [(p.name, p.peak, p.end) for p in found.phases] == [
        ("nothing", 0, 0),
        ("kept", 8000, 8000),
        ("freed within", 8600, 8000),
        ("within an op", 16008, 8008),
        ("freed", 8008, 8),
        ("all freed", 8, 0),
    ]


def test_what_a_backward_allocates_is_counted() -> None:
    p = nn.Parameter(torch.ones(1000))
    with Allocations() as found:
        with found.phase("forward"):
            loss = p.exp().sum()  # exp(p) is kept for the backward
        with found.phase("backward"):
            loss.backward()
            del loss
    assert [phase.end for phase in found.phases] == [4000 + 4, 4000]


# --- the gradients ----------------------------------------------------------------------------------------------------
def test_gradients_alone_come_one_after_another_and_need_nothing_else() -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (30, 20, 10)]
    seen = []
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.numel()))
    with Allocations() as found, found.phase("passes"):
        gradients_alone(params)
    assert seen == [10, 20, 30]
    assert (found.phases[0].peak, found.phases[0].end) == (240, 240)
    for p in params:
        assert p.grad is not None and p.grad.shape == p.shape and p.grad.ne(0).all()


def test_gradients_that_a_hook_frees_never_exist_together() -> None:
    params = [nn.Parameter(torch.ones(n)) for n in (30, 20, 10)]
    for p in params:
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Allocations() as found, found.phase("passes"):
        gradients_alone(params)
    assert (found.phases[0].peak, found.phases[0].end) == (120, 0)


def test_gpt2_is_the_model_of_its_parameters() -> None:
    """At small weights it guesses at random, and every parameter has a gradient, in its own layout."""
    params = [nn.Parameter(t) for t in CASE.tensors(torch.float32, seed=0, scale=0.02)]
    loss = gpt2_loss(params, torch.tensor([[3, 1, 4, 1, 5]]))
    assert loss.item() == pytest.approx(math.log(SIZE[2]), rel=1e-3)
    loss.backward()
    for p in params:
        assert p.grad is not None and p.grad.stride() == p.stride()
    assert params[1].grad is not None and params[1].grad[4:].eq(0).all() and params[1].grad[:4].ne(0).any()


# --- the modes --------------------------------------------------------------------------------------------------------
def test_torch_s_own_optimizers_need_what_arithmetic_says_to_the_byte() -> None:
    bytes_of_one = 4 * CASE.elements
    sgd, adamw = _measure("torch-sgd"), _measure("torch-adamw")
    assert (sgd["peak"], sgd["kept"], sgd["made"]) == (2 * bytes_of_one, bytes_of_one, 0)
    counters = 4 * len(CASE.shapes)  # of AdamW: one for each parameter
    assert adamw["kept"] == 2 * bytes_of_one + counters
    assert 0 <= adamw["peak"] - 3 * bytes_of_one - counters <= 64  # numbers of one call
    passes = _measure("passes")
    assert (passes["peak"], passes["kept"]) == (bytes_of_one, 0)


def test_the_foreach_peer_needs_what_arithmetic_says() -> None:
    """Momentum, a backup that is never freed, gradients, and e of all parameters at once."""
    found = _measure("foreach")
    assert found["kept"] == 8 * CASE.elements and found["at"] == "perturb"
    assert 0 <= found["peak"] - 16 * CASE.elements <= 16 * len(CASE.shapes) + 64  # the norms


OURS = [(name, dtype) for name, mode in memory.MODES.items() if mode.options is not None for dtype in mode.dtypes]
RELEASING = [(n, d) for n, d in OURS if "release_gradients" in (memory.MODES[n].options or {})]


@pytest.mark.parametrize(("name", "dtype"), [one for one in OURS if one not in RELEASING])
def test_ours_needs_what_is_predicted(name: str, dtype: str) -> None:
    """But for numbers of the optimizer, of which there are the same in a model of any size."""
    found = _measure(name, dtype)
    predicted = memory.MODES[name].predicted(DTYPES[dtype].itemsize)
    assert predicted is not None
    for key, each in predicted.items():
        assert 0 <= found[key] - each * CASE.elements <= 4096, key
    assert found["kept"] == found["reported"] + found["made"], "opt.memory() and the allocator disagree"


@pytest.mark.parametrize(("name", "dtype"), RELEASING)
def test_released_gradients_never_exist_together(name: str, dtype: str) -> None:
    """The model is smaller than a bucket, so a peak of all gradients is allowed here."""
    element = DTYPES[dtype].itemsize
    found = _measure(name, dtype)
    predicted = memory.MODES[name].predicted(element)
    assert predicted is not None
    assert 0 <= found["peak"] - predicted["peak"] * CASE.elements <= element * CASE.elements + 4096
    assert found["kept"] == found["reported"] + found["made"]


@pytest.mark.parametrize("name", ["torch-sgd", "sam"])
def test_a_model_adds_what_its_passes_add(name: str) -> None:
    """The optimizer's figure is the same beside activations: the difference is that of the passes alone."""
    alone, whole = _measure(name), _measure(name, what="gpt2")
    passes = _measure("passes", what="gpt2")["peak"] - _measure("passes")["peak"]
    assert whole["kept"] == alone["kept"]
    assert passes > 0 and abs(whole["peak"] - alone["peak"] - passes) <= 4096


# --- the command ------------------------------------------------------------------------------------------------------
def _options(out: Path, *modes: str) -> list[str]:
    return [
        "memory",
        "--mode",
        *modes,
        "--dtype",
        "fp32",
        "--size",
        *map(str, SIZE),
        "--threads",
        "1",
        "--out",
        str(out),
    ]


def test_the_command_measures_in_children_and_fills_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, page = tmp_path / "memory.json", tmp_path / "page.md"
    (tmp_path / "figures").mkdir()
    begin, end = memory.PAGE_MARKS
    page.write_text(f"# Before\n\n{begin}\nold\n{end}\n\nAfter.\n")
    assert main([*_options(out, "torch-sgd", "sam"), "--page", str(page)]) == 0
    data = record.read(out)
    sgd = data["memory"][0]
    assert sgd["predicted"] == {"peak": 8, "kept": 4} and sgd["alone"]["peak"] == 8 * CASE.elements
    assert sgd["gpt2"]["peak"] > sgd["alone"]["peak"] and sgd["gpt2"]["elements"] == CASE.elements
    tables = record.memory_tables(data["memory"])
    assert page.read_text() == f"# Before\n\n{begin}\n{tables}{end}\n\nAfter.\n"
    row = next(line for line in tables.splitlines() if line.startswith("| torch.optim.SGD"))
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["8.00", "8", "4.00", "4"]
    assert out.with_suffix(".md").read_text() == record.markdown(data) and tables in record.markdown(data)
    assert (tmp_path / "figures" / "memory.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("no place for tables")
    with pytest.raises(ValueError, match="has no place for the tables"):
        memory.write_page(page, data)
    capsys.readouterr()
    assert main(["report", str(out), "--plot", str(tmp_path)]) == 0
    assert (tmp_path / "memory.png").exists() and tables in capsys.readouterr().out


def test_what_cannot_be_measured_is_said() -> None:
    found = {"peak": 80, "kept": 40, "elements": 10}
    entries = [
        {"mode": "here", "dtype": "fp32", "predicted": None, "alone": found, "gpt2": found},
        {"mode": "elsewhere", "dtype": "fp32", "predicted": None, "alone": "not installed", "gpt2": "not installed"},
    ]
    lines = record.memory_tables(entries).splitlines()
    assert [line for line in lines if "elsewhere" in line] == ["* elsewhere: not installed"]
    assert "8.00" in lines[2] and len(lines) == 5


def test_the_page_has_the_tables_that_are_kept() -> None:
    data = record.read(ROOT / "benchmarks" / "results" / "memory.json")
    begin, end = memory.PAGE_MARKS
    page = (ROOT / "docs" / "memory.md").read_text()
    assert f"{begin}\n{record.memory_tables(data['memory'])}{end}" in page
