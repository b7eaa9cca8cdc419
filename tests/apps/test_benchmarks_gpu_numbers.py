"""What the GPU benchmarks measure is what they say: bytes, launches, times, ratios, and the same work for everyone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import op_db
import pytest
import torch

from benchmarks.cases import DTYPES, Hyper, many
from benchmarks.gpu import end_to_end, exercise, kernels, models, race, stage
from benchmarks.gpu.device import Gpu, Rehearsal, available_backends, launched
from benchmarks.gpu.race import Entrant, Plan, traffic
from benchmarks.gpu.stages import read_part
from benchmarks.peers import Competitor, Foreach, make

pytestmark = pytest.mark.usefixtures("one_thread")


# --- numbers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "part", "words"),
    [("sgd", "perturb", 20), ("sgd", "update", 20), ("sgd", "base", 20), ("adamw", "perturb", 20),
     ("adamw", "update", 28), ("adamw", "base", 28)],
)  # fmt: skip
def test_bytes_that_must_move(base: str, part: str, words: int) -> None:
    assert (traffic(base, part, 1000, 4), traffic(base, part, 1000, 2)) == (1000 * words, 500 * words)


def test_launches_are_kernels_copies_and_fills() -> None:
    kinds = ["kernel", "kernel", "gpu_memcpy", "gpu_memset", "cpu_op", "cuda_runtime", "gpu_user_annotation"]
    events = [{"cat": kind, "name": kind if kind != "kernel" else "k(float*)", "ph": "X"} for kind in kinds]
    assert launched({"traceEvents": [*events, {"name": "process_name", "ph": "M"}]}) == {
        "k(float*)": 2, "gpu_memcpy": 1, "gpu_memset": 1,
    }  # fmt: skip


def test_the_profiler_writes_a_trace_that_can_be_read() -> None:
    assert Rehearsal().launches(lambda: torch.ones(3).add_(1)) == {}


class Clocked(Rehearsal):
    """A device whose time passes only in the calls below; notes what it was asked for."""

    def __init__(self) -> None:
        self.now, self.held = 0.0, 0

    def mark(self) -> float:
        return self.now

    def hold(self, seconds: float) -> None:
        self.held += 1

    def takes(self, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_a_gpu_is_held_marked_and_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for what needs a GPU; setattr fails for names that torch does not have."""
    asked: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 1500.0  # milliseconds

    class Graph:
        def replay(self) -> None:
            asked.append("replay")

    @contextlib.contextmanager
    def graph(of: Graph) -> Iterator[None]:
        asked.append("capture")
        yield
        asked.append("captured")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "_sleep", asked.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("empty"))
    gpu = Gpu()
    gpu.hold(1e-3)
    gpu.hold(60.0)  # no longer than 50 ms, whatever a slow competitor asks for
    assert gpu.elapsed(gpu.mark(), gpu.mark()) == 1.5
    gpu.capture(lambda: asked.append("call"))()
    gpu.clear()
    assert asked == [
        2_000_000, 100_000_000, "record", "record", "capture", "call", "captured", "replay", "synchronize", "empty",
    ]  # fmt: skip


def test_a_race_reduces_calls_to_rounds() -> None:
    device = Clocked()
    part = device.takes(99.0, 1.0, 5.0, 2.0, 7.0, 8.0, 9.0)  # one to warm up, then two rounds of three calls
    step = device.takes(99.0, 2.0, 4.0, 1.0, 1.0)
    away = device.takes(1000.0)
    times = race.race(device, {"x": Entrant({"p": part}, {"s": step}, away)}, Plan(2, 3, 2, warmup=1))
    assert times == {"x": {"p": [2.0, 8.0], "s": [3.0, 1.0]}}
    assert device.held == 6


def test_fractions_and_ratios_are_of_single_rounds() -> None:
    case = many(1, 1000)
    ours = {"perturb": [5.0, 10.0, 2.5], "update": [5.0, 5.0, 5.0], "base": [1.0] * 3, "step": [1.0, 2.0, 4.0]}
    other = {"perturb": [9.0] * 3, "update": [11.0] * 3, "base": [1.0] * 3, "step": [2.0, 6.0, 2.0]}
    times = {"cuda": ours, "usual": other, "copy": {"copy": [1.0, 2.0, 1.0]}}
    found = {f["what"]: f for f in race.fractions(times, ["cuda"], "sgd", case, 4)}
    assert found["perturb"]["bytes"] == 20_000  # 2.5 times what the copy moves
    assert (found["perturb"]["fraction"], found["perturb"]["best"]) == (0.5, 1.0)
    (ratio,) = race.ratios(times, ["cuda"])
    assert (ratio["against"], ratio["step"], ratio["device"]) == ("usual", 2.0, 2.0)


class OtherRadius(Foreach):
    """Perturbs by a tenth more."""

    def perturb(self) -> None:
        self.hyper = Hyper(rho=1.1 * Hyper().rho)
        super().perturb()


class LosesMomentum(Foreach):
    """Starts every step from a buffer of zeros."""

    def base(self) -> None:
        self.optimizer.state.clear()
        super().base()


@pytest.mark.parametrize(("kind", "agrees"), [(Foreach, True), (OtherRadius, False), (LosesMomentum, False)])
def test_competitors_that_do_something_else_are_noticed(kind: type[Foreach], agrees: bool) -> None:
    case = many(4, 33)
    params = [torch.nn.Parameter(t) for t in case.tensors(torch.float32, seed=0, scale=0.02)]
    standard = make("foreach", case, torch.float32, Hyper())
    racers: dict[str, Competitor] = {"foreach": standard, "x": kind(params, Hyper())}
    (found,) = race.agreement(racers, case.tensors(torch.float32, seed=1, scale=1e-3))
    assert found["agree"] is agrees, found


def test_weights_that_are_not_numbers_never_agree() -> None:
    case = many(2, 5)
    a, b = (make("foreach", case, torch.float32, Hyper()) for _ in range(2))
    before = [p.detach().clone() - 1 for p in a.params]
    assert race.same_weights("b", b, a, before)["agree"]
    with torch.no_grad():
        b.params[0][2] = torch.nan
    assert not race.same_weights("b", b, a, before)["agree"]


@pytest.mark.parametrize("p", end_to_end.PATTERNS)
def test_patterns_have_the_share_they_are_named_after(p: float) -> None:
    assert sum(end_to_end.PATTERNS[p]) == p * end_to_end.PERIOD == p * len(end_to_end.PATTERNS[p])


def test_overhead_is_over_passes_and_one_base_step() -> None:
    times = {"passes": [10.0, 20.0], "base": [1.0, 1.0], "torch": [11.0, 21.0], "RST(0.5)": [17.6, 34.1]}
    found = {r["who"]: r for r in end_to_end.summary(times)}
    assert found["RST(0.5)"]["overhead"] == pytest.approx(0.10)  # of 16 and of 31
    assert found["torch"]["overhead"] == 0
    assert "overhead" not in found["passes"]


def test_models_and_cases_have_their_sizes() -> None:
    with torch.device("meta"):
        vit = sum(p.numel() for p in models.VisionTransformer().parameters())
    sizes = {m.case.name: m.case.elements for m in kernels.full_size()}
    assert (vit, sizes["resnet50"], sizes["gpt2"]) == (86_567_656, 25_557_032, 124_439_808)
    assert 1.00e9 < sizes["1e9"] < 1.01e9
    assert [m.case.name for m in kernels.rehearsal_size()][:3] == list(sizes)[:3]


# --- the measuring stages -------------------------------------------------------------------------------------------
def small(**more: Any) -> kernels.Measured:
    return kernels.Measured(many(3, 17), Plan(2, 1, 1, warmup=1), **more)


def part_of(tmp_path: Path, *backends: str) -> stage.Part:
    return stage.Part(Rehearsal(), tmp_path / "part.json", list(backends) or None)


def test_the_kernels_stage_measures_everything(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    kernels.measure_all(part, [small(bases=("sgd", "adamw"), graphs=True)], 10, compiled=False)
    data = read_part(part.out)
    assert (data["errors"], part.status()) == ([], 0)
    races = {(r["dtype"], r["base"]): r for r in data["races"]}
    assert set(races) == {(dtype, base) for dtype in DTYPES for base in ("sgd", "adamw")}
    ours = set(data["backends"])
    assert ours >= {"reference"}
    for (_, base), r in races.items():
        peers = {"foreach", "usual"} if base == "sgd" else {"foreach"}
        assert {x["who"] for x in r["results"]} == ours | peers | {"copy"}
        assert {a["who"] for a in r["agreement"]} == ours | peers - {"foreach"}
        assert all(len(x["rounds_s"]) == 2 and x["best_s"] > 0 for x in r["results"])
    assert {h["who"] for h in data["host"]} == ours | {"foreach", "usual"}
    (graphs,) = data["graphs"]
    assert {x["who"] for x in graphs["results"]} >= {"reference", "reference, graph", "foreach, graph"}


def test_launches_are_counted_in_a_step_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")
    steps: list[str] = []
    monkeypatch.setattr(race, "sam_step", lambda competitor, grads: steps.append(competitor.name))

    def launches(call: Callable[[], object]) -> dict[str, int]:
        call()
        return {"norm": 1, "update": len(steps)}

    monkeypatch.setattr(part.device, "launches", launches)
    kernels.count_launches(part, many(2, 3), "fp32", "sgd", ("foreach",))
    found = [(x["who"], x["total"], x["of"]) for x in read_part(part.out)["launches"]]
    assert steps == ["ours", "ours", "foreach", "foreach"]
    assert found == [("reference", 3, {"norm": 1, "update": 2}), ("foreach", 5, {"norm": 1, "update": 4})]


def test_one_backend_that_breaks_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")
    part.backends = ["broken", "reference"]
    genuine = kernels.make

    def sometimes(name: str, *args: Any, **options: Any) -> Competitor:
        if options.get("backend") == "broken":
            raise RuntimeError("no such kernel")
        return genuine(name, *args, **options)

    monkeypatch.setattr(kernels, "make", sometimes)
    kernels.race_all(part, small(), "fp32", "sgd", ("foreach",))
    data = read_part(part.out)
    assert len(data["errors"]) == 2 and all("no such kernel" in words for words in data["errors"])
    assert [{x["who"] for x in r["results"]} for r in data["races"]] == [{"reference", "foreach", "copy"}]
    assert part.status() == 1


def test_wrong_weights_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")
    monkeypatch.setattr(race, "AGREEMENT", dict.fromkeys(race.AGREEMENT, -1.0))
    kernels.race_all(part, small(), "fp32", "sgd", ("foreach",))
    kernels.measure_graphs(part, small(), "fp32")
    assert [("are wrong" in words) for words in part.data["errors"]] == [True] * 3  # the race, and two graphs


def test_a_graph_that_cannot_be_captured_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")

    def capture(call: Callable[[], object]) -> Callable[[], object]:
        try:
            raise RuntimeError("a copy is not permitted")
        finally:
            raise RuntimeError("capture was invalidated")  # as leaving a broken capture does

    monkeypatch.setattr(part.device, "capture", capture)
    kernels.measure_graphs(part, small(), "fp32")
    (graphs,) = part.data["graphs"]
    assert set(graphs["failures"]) == {"reference", "foreach"}
    assert all("invalidated" in f and "not permitted" in f for f in graphs["failures"].values())
    assert {x["who"] for x in graphs["results"]} == {"reference", "foreach"}, "without graphs they are measured"


def test_a_dead_device_ends_the_stage_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path)

    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(part.device, "synchronize", dead)
    with pytest.raises(SystemExit):
        part.attempt("something", lambda: part.add("races", 1))
    data = read_part(part.out)
    assert data["races"] == [1] and "no longer answers" in data["errors"][0]


def test_training_steps_are_measured_with_the_first_backend_that_works(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    part.backends = ["broken", "reference", "never"]
    end_to_end.measure_first(part, end_to_end.rehearsal_size()[1])
    (training,) = read_part(part.out)["trainings"]
    shares = {r["who"]: r.get("p") for r in training["results"]}
    assert shares == {"passes": None, "base": None, "torch": 0, **{f"RST({p:g})": p for p in end_to_end.PATTERNS}}
    assert training["backend"] == "reference"
    assert len(part.data["errors"]) == 1 and "broken" in part.data["errors"][0]


def test_backends_that_are_missing_are_noted() -> None:
    names, notes = available_backends(Rehearsal(), ["reference", "metal"])
    assert names == ["reference"]
    assert len(notes) == 1 and "metal" in notes[0]


def test_every_op_is_exercised_and_a_wrong_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {call.removesuffix(exercise.AMSGRAD) for call in exercise.CALLS} == op_db.FUNCTIONS
    for call in exercise.CALLS:
        assert exercise.compare(call, "reference", "cpu", "fp32", 0, False) is None
    assert exercise.compare("restore_sgd_step_", "reference", "cpu", "bf16, fp32 masters", 1, False) is None
    assert exercise.compare("perturb_", "reference", "cpu", "fp32", 1, True) is None
    genuine = exercise.ops.adam_step_
    calls = iter([{}, {"maximize": True}])
    monkeypatch.setattr(exercise.ops, "adam_step_", lambda *args, **given: genuine(*args, **{**given, **next(calls)}))
    words = exercise.compare("adam_step_", "reference", "cpu", "fp32", 0, False)
    assert words is not None and "adam_step_, fp32" in words


def test_inputs_lie_off_the_alignment_on_the_device_too() -> None:
    lists = exercise.moved(exercise.inputs(torch.float32, False, shift=1), "cpu")
    assert {t.data_ptr() % 16 for tensors in lists.values() for t in tensors if t.numel()} == {4}
