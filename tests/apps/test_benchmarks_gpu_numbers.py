"""What the GPU benchmarks measure is what they say: bytes, launches, times, ratios, and the same work for everyone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import op_db
import pytest
import torch

from benchmarks.cases import Hyper, many
from benchmarks.gpu import end_to_end, exercise, models, modes, race, races, stage
from benchmarks.gpu.device import Gpu, Rehearsal, available_backends, launched
from benchmarks.gpu.modes import FP32
from benchmarks.gpu.race import Entrant, Plan
from benchmarks.gpu.stages import read_part
from benchmarks.peers import Competitor, Foreach, make

pytestmark = pytest.mark.usefixtures("one_thread")


# --- numbers --------------------------------------------------------------------------------------------------------
def test_launches_are_kernels_copies_and_fills_in_order() -> None:
    kinds = ["kernel", "gpu_memcpy", "kernel", "gpu_memset", "cpu_op", "cuda_runtime", "gpu_user_annotation"]
    events = [
        {"cat": kind, "name": kind if kind != "kernel" else "k(float*)", "ph": "X", "ts": 100 - i, "dur": i + 1}
        for i, kind in enumerate(kinds)
    ]
    found = launched({"traceEvents": [*events, {"name": "process_name", "ph": "M"}]})
    assert {name: [round(s * 1e6) for s in seconds] for name, seconds in found.items()} == {
        "k(float*)": [3, 1], "gpu_memcpy": [2], "gpu_memset": [4],
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
    away, prepared = device.takes(1000.0), []

    def prepare(what: str) -> None:
        prepared.append(what)
        away()

    times = race.race(device, {"x": Entrant({"p": part}, {"s": step}, prepare)}, Plan(2, 3, 2, warmup=1))
    assert times == {"x": {"p": [2.0, 8.0], "s": [3.0, 1.0]}}
    assert device.held == 6 and prepared == ["p"] * 7


def test_fractions_and_ratios_are_of_single_rounds() -> None:
    ours = {"perturb": [5.0, 10.0, 2.5], "update": [5.0, 5.0, 5.0], "base": [1.0] * 3, "step": [1.0, 2.0, 4.0]}
    other = {"perturb": [9.0] * 3, "update": [11.0] * 3, "base": [1.0] * 3, "step": [2.0, 6.0, 2.0]}
    times = {"cuda": ours, "usual": other, "copy": {"copy": [1.0, 2.0, 1.0]}}
    (perturb,) = race.fractions(times, ["cuda"], {"perturb": 20_000}, 4000)
    assert perturb["bytes"] == 20_000  # 2.5 times what the copy moves, which reads and writes
    assert (perturb["fraction"], perturb["best"]) == (0.5, 1.0)
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
    (found,) = race.agreement(racers, case.tensors(torch.float32, seed=1, scale=1e-3), "foreach")
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
    sizes = {m.case.name: m.case.elements for m in (*races.full_size(), *races.more_sizes())}
    assert (vit, sizes["resnet50"], sizes["gpt2"]) == (86_567_656, 25_557_032, 124_439_808)
    assert 1.00e9 < sizes["1e9"] < 1.01e9
    for more, full in ((False, races.full_size()), (True, races.more_sizes())):
        rehearsed = [(m.case.name, m.compiled, m.graphs) for m in races.rehearsal_size(more)]
        assert rehearsed[:3] == [(m.case.name, m.compiled, m.graphs) for m in full][:3]


# --- the measuring stages -------------------------------------------------------------------------------------------
def small(**more: Any) -> races.Measured:
    return races.Measured(many(3, 17), Plan(2, 1, 1, warmup=1), **more)


def part_of(tmp_path: Path, *backends: str) -> stage.Part:
    return stage.Part(Rehearsal(), tmp_path / "part.json", list(backends) or None)


def test_the_races_stage_measures_everything(tmp_path: Path) -> None:
    part = part_of(tmp_path)
    contests = ((FP32, "sgd"), (modes.BF16, "adamw"), (modes.MASTERS, "sgd"), (modes.GRST, "sgd"))
    races.measure_all(part, [small(contests=contests, graphs=True)], 10, compiled=False)
    data = read_part(part.out)
    assert (data["errors"], part.status()) == ([], 0)
    found = {(r["mode"], r["base"]): r for r in data["races"]}
    assert set(found) == {(mode.name, base) for mode, base in contests}
    ours = set(data["backends"])
    assert ours >= {"reference"}
    for (name, base), r in found.items():
        same = name in ("fp32, G-RST", "bf16, fp32 masters")
        peers = {"reference"} if same else {"foreach", "usual"} if base == "sgd" else {"foreach"}
        assert {x["who"] for x in r["results"]} == ours | peers | {"copy"}
        assert {a["who"] for a in r["agreement"]} == (ours | peers) - {r["standard"]}
        assert all(len(x["rounds_s"]) == 2 and x["best_s"] > 0 for x in r["results"])
    assert {h["who"] for h in data["host"]} == ours | {"foreach", "usual"}
    (graphs,) = data["graphs"]
    assert {x["who"] for x in graphs["results"]} >= {"reference", "reference, graph", "foreach, graph"}


def test_the_races_that_have_goals_or_other_kernels() -> None:
    named = {(mode.name, base) for mode, base in races.ALL}
    assert named >= {(mode.name, base) for mode in modes.MAIN for base in ("sgd", "adamw")}
    others = {mode for mode, _ in races.ALL} - set(modes.MAIN)
    assert {(m.masters, m.adaptive, m.mixing, m.offset, m.zero_rows) for m in others} == {
        (False, True, False, 0, False), (False, False, True, 0, False), (False, False, False, 4, False),
        (False, False, False, 8, False), (False, False, False, 0, True), ("remainder", False, False, 0, False),
    }  # fmt: skip


def test_launches_are_counted_in_a_step_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")
    steps: list[str] = []
    monkeypatch.setattr(race, "sam_step", lambda competitor, *grads: steps.append(competitor.name))

    def launches(call: Callable[[], object]) -> dict[str, list[float]]:
        call()
        return {"norm": [1.0], "update": [1.0] * len(steps)}

    monkeypatch.setattr(part.device, "launches", launches)
    races.count_launches(part, many(2, 3), FP32, "sgd", ("foreach",))
    found = [(x["who"], x["total"], x["of"]) for x in read_part(part.out)["launches"]]
    assert steps == ["ours", "ours", "foreach", "foreach"]
    assert found == [("reference", 3, {"norm": 1, "update": 2}), ("foreach", 5, {"norm": 1, "update": 4})]


def test_one_backend_that_breaks_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")
    part.backends = ["broken", "reference"]
    genuine = races.make

    def sometimes(name: str, *args: Any, **options: Any) -> Competitor:
        if options.get("backend") == "broken":
            raise RuntimeError("no such kernel")
        return genuine(name, *args, **options)

    monkeypatch.setattr(races, "make", sometimes)
    races.race_all(part, small(), FP32, "sgd", ("foreach",))
    data = read_part(part.out)
    assert len(data["errors"]) == 2 and all("no such kernel" in words for words in data["errors"])
    assert [{x["who"] for x in r["results"]} for r in data["races"]] == [{"reference", "foreach", "copy"}]
    assert part.status() == 1


def test_wrong_weights_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")
    monkeypatch.setattr(race, "AGREEMENT", dict.fromkeys(race.AGREEMENT, -1.0))
    races.race_all(part, small(), FP32, "sgd", ("foreach",))
    races.measure_graphs(part, small(), FP32)
    assert [("are wrong" in words) for words in part.data["errors"]] == [True] * 3  # the race, and two graphs


def test_a_graph_that_cannot_be_captured_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = part_of(tmp_path, "reference")

    def capture(call: Callable[[], object]) -> Callable[[], object]:
        try:
            raise RuntimeError("a copy is not permitted")
        finally:
            raise RuntimeError("capture was invalidated")  # as leaving a broken capture does

    monkeypatch.setattr(part.device, "capture", capture)
    races.measure_graphs(part, small(), FP32)
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


def test_what_race_modes_change(tmp_path: Path) -> None:
    assert modes.GRST.options() == {"gamma": 2.0} and modes.ASAM.options() == {"adaptive": True, "eta": 0.01}
    assert modes.MASTERS.options() == {"master_weights": True} and FP32.options() == {}
    device, case = Rehearsal(), many(2, 6)
    for mode, offset in ((modes.OFF_BY_4, 4), (modes.OFF_BY_8, 8)):
        made = mode.gradients(device, case)
        assert {g.data_ptr() % 16 for g in made} == {offset}
        plain = modes.Mode("", mode.dtype).gradients(device, case)
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(made, plain, strict=True))
    (rows, *_) = modes.ZERO_ROWS.gradients(device, case)
    assert (rows != 0).tolist() == [True, False] * 3
    first, second = FP32.both_gradients(device, case)
    assert first is second
    first, second = modes.GRST.both_gradients(device, case)
    assert {g.data_ptr() for g in first}.isdisjoint(g.data_ptr() for g in second), "both are read from memory"


def test_steps_that_mix_read_two_gradients() -> None:
    """The first is perturbed by, the second updated with."""
    case = many(2, 6)
    competitor = make("foreach", case, torch.float32, Hyper())
    first, second = modes.GRST.both_gradients(Rehearsal(), case)
    seen: list[Any] = []
    for part in ("perturb", "update", "base"):
        setattr(competitor, part, lambda: seen.append([p.grad for p in competitor.params]))
    race.sam_step(competitor, first, second)
    e = race.entrant(competitor, first, second)
    for part in ("perturb", "update", "base"):
        e.prepare(part)
        e.parts[part]()
    wanted = [first, second, first, second, first]
    assert all(a is b for x, y in zip(seen, wanted, strict=True) for a, b in zip(x, y, strict=True))


def test_backends_that_are_missing_are_noted() -> None:
    names, notes = available_backends(Rehearsal(), ["reference", "metal"])
    assert names == ["reference"]
    assert len(notes) == 1 and "metal" in notes[0]


def test_every_op_is_exercised_and_a_wrong_one_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {call.partition(" ")[0] for call in exercise.CALLS} == op_db.FUNCTIONS
    for call in exercise.CALLS:
        assert exercise.compare(call, "reference", "cpu", "fp32", 0, False) is None
    for mode in ("bf16, fp32 masters", "bf16, remainders"):
        assert exercise.compare("restore_sgd_step_", "reference", "cpu", mode, 1, False) is None
    assert exercise.compare("perturb_", "reference", "cpu", "fp32", 1, True) is None
    genuine = exercise.ops.adam_step_
    calls = iter([{}, {"maximize": True}])
    monkeypatch.setattr(exercise.ops, "adam_step_", lambda *args, **given: genuine(*args, **{**given, **next(calls)}))
    words = exercise.compare("adam_step_", "reference", "cpu", "fp32", 0, False)
    assert words is not None and "adam_step_, fp32" in words


def test_inputs_lie_off_the_alignment_on_the_device_too() -> None:
    lists = exercise.moved(exercise.inputs(torch.float32, None, shift=1), "cpu")
    assert {t.data_ptr() % 16 for tensors in lists.values() for t in tensors if t.numel()} == {4}
