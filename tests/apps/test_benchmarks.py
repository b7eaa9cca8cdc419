"""The benchmarks measure what they say: same work for every competitor, right bytes in the probe, ratios, files."""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu, host, record
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Hyper, many
from benchmarks.peers import Competitor, Ours, Unavailable, attach, make
from benchmarks.probe import ALIGNMENT, ARRAYS, BLOCKS, DISTINCT, KEEP, Probe, cut
from benchmarks.runner import Plan, Race, entry, ratios
from rst_fused._step.gradient_memory import serving

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the bandwidth probe needs g++")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("resnet18", 62, 11_173_962), ("gpt2", 148, 124_439_808), ("1000x1000", 1000, 1_000_000)],
)
def test_cases_have_the_sizes_of_their_models(name: str, tensors: int, elements: int) -> None:
    case = CASES[name]()
    assert (len(case.shapes), case.elements) == (tensors, elements)


def _expected(hyper: Hyper, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Weights in float64 after perturb + update, then base, ``steps`` times; and w + e of the first perturbation."""
    case = many(4, 33)
    weights = [w.double() for w in case.tensors(torch.float32, seed=0, scale=0.02)]
    grads = [g.double() for g in case.tensors(torch.float32, seed=1)]
    norm = torch.cat(grads).norm()
    perturbed = [w + hyper.rho * g / norm for w, g in zip(weights, grads, strict=True)]
    buffers = [torch.zeros_like(w) for w in weights]
    for _ in range(2 * steps):  # the gradients stay, so a SAM step and a base step do the same
        for w, g, m in zip(weights, grads, buffers, strict=True):
            m.mul_(hyper.momentum).add_(g + hyper.weight_decay * w)
            w.sub_(hyper.lr * m)
    return perturbed, weights, grads


@pytest.mark.parametrize(
    "name", ["usual", "foreach", pytest.param("compile", marks=pytest.mark.slow), "pytorch_optimizer", "ours"]
)
def test_every_competitor_takes_the_same_step(name: str) -> None:
    hyper, case = Hyper(lr=0.1, weight_decay=0.1), many(4, 33)
    perturbed, weights, _ = _expected(hyper, steps=3)
    grads = case.tensors(torch.float32, seed=1)
    try:
        competitor = make(name, case, torch.float32, hyper)
    except Unavailable as reason:
        pytest.skip(str(reason))
    for step in range(3):
        attach(competitor.params, grads)
        competitor.perturb()
        if step == 0:
            for p, expected in zip(competitor.params, perturbed, strict=True):
                torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-7)
        attach(competitor.params, grads)
        competitor.update()
        attach(competitor.params, grads)
        competitor.base()
    for p, expected in zip(competitor.params, weights, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-5, atol=1e-6)


class Recorded(Competitor):
    """Notes its calls and multiplies its weights, so that a lost or doubled call shows."""

    def __init__(self, name: str, calls: list[tuple[str, str]], factor: float = 1.0) -> None:
        super().__init__([torch.nn.Parameter(torch.ones(3))], Hyper())
        self.name, self.calls, self.factor = name, calls, factor
        self.addresses: list[int] = []
        self.given: list[tuple[float, bool]] = []  # the gradient, and whether somebody else has it

    def _note(self, what: str) -> None:
        self.calls.append((self.name, what))
        self.addresses.append(self.grads()[0].data_ptr())
        self.given.append((float(self.grads()[0][0]), serving(self.params) != self.params))
        self.params[0].data.mul_(self.factor)
        self.params[0].grad = None  # as a perturbation that consumes the gradients does

    def perturb(self) -> None:
        self._note("perturb")

    def update(self) -> None:
        self._note("update")

    def base(self) -> None:
        self._note("base")


@pytest.mark.parametrize("held", [False, True])
def test_a_race_interleaves_its_competitors_and_gives_gradients_back(held: bool) -> None:
    calls: list[tuple[str, str]] = []
    racers = {name: Recorded(name, calls) for name in ("a", "b")}
    race = Race(racers, [[torch.zeros(3)], [torch.ones(3)]], held=held)
    times = race.run(Plan(rounds=2, calls=2, warmup=1, settle=0))
    one = ["perturb", "update", "base"]
    expected = [("a", w) for w in one] + [("b", w) for w in one]  # warm-up
    expected += ([("a", w) for w in one * 2] + [("b", w) for w in one * 2]) * 2
    assert calls == expected
    assert {len(rounds) for parts in times.values() for rounds in parts.values()} == {2}
    for racer in racers.values():
        turns = itertools.cycle([0.0, 1.0])
        assert racer.given == [(next(turns), held) for _ in racer.given], "the sets of gradients take turns"
    addresses = racers["a"].addresses
    if held:
        assert len(set(addresses)) == 2
        assert all(x != y for x, y in itertools.pairwise(addresses))


def test_a_round_is_the_reduced_time_of_its_calls() -> None:
    seconds = iter([9.0] * 3 + [1.0, 10.0, 4.0, 3.0, 5.0, 2.0])

    def clock(call: Callable[[], object]) -> float:
        call()
        return next(seconds)

    race = Race({"ours": Recorded("ours", [])}, [[torch.zeros(3)]], clock=clock)
    times = race.run(Plan(rounds=1, calls=2, warmup=1, settle=0))
    assert times == {"ours": {"perturb": [1.0], "update": [5.0], "base": [2.0], "step": [8.0]}}


@needs_compiler
@pytest.mark.parametrize(("dtype", "probe"), [("fp32", True), ("bf16", False)])
def test_where_weights_are_kept_in_a_run(dtype: str, probe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other competitors weights are kept where the gradients were, as in a training loop; beside the probe in
    backups, which it has too."""
    monkeypatch.setitem(CASES, "1000x1000", lambda: many(40, 1000))
    perturb, seen = Ours.perturb, []

    def noting(self: Ours) -> None:
        perturb(self)
        seen.append((self.optimizer.memory(), repr(self.optimizer)))

    monkeypatch.setattr(Ours, "perturb", noting)
    args = argparse.Namespace(rounds=1, calls=2, no_probe=not probe)
    found = cpu.measure("1000x1000", dtype, ["usual", "foreach", "ours"], args)
    assert [len(race["results"]) for race in found["races"]] == ([12, 8] if probe else [12])
    assert len(seen) == 4 + (13 if probe else 0)  # warm-up, and calls in one round and in five
    for memory, shown in seen[:4]:
        assert (memory.backed_up, memory.backups, memory.weights_in_gradients) == (0, 0, memory.weights)
        assert "backups=0 of 40" in shown
    for memory, shown in seen[5:]:  # after the one that makes them for the probe
        assert (memory.backups, memory.weights_in_gradients) == (memory.weights, 0)
        assert "backups=40 of 40" in shown


def test_ratios_are_of_single_rounds() -> None:
    def parts(*rounds: float) -> dict[str, list[float]]:
        return {what: list(rounds) for what in ("perturb", "update", "step", "base")}

    found = ratios({"ours": parts(1, 2, 4), "usual": parts(3, 4, 16), "foreach": parts(2, 2, 2)}, "gpt2")
    step = {r["against"]: r for r in found if r["what"] == "step"}
    assert (step["usual"]["median"], step["usual"]["best"]) == (3, 3)  # of 3, 2, 4; 3 over 1
    assert (step["usual"]["goal"], step["usual"]["met"]) == (2.8, True)
    assert (step["foreach"]["median"], step["foreach"]["best"], step["foreach"]["met"]) == (1, 2, False)
    base = next(r for r in found if r["against"] == "torch base")
    assert (base["what"], base["median"], base["met"]) == ("update", 1, True)


def test_a_competitor_that_does_other_work_is_noticed() -> None:
    racers = {"a": Recorded("a", []), "b": Recorded("b", [], factor=1.5)}
    race = Race(racers, [[torch.zeros(3)]])
    race.run(Plan(rounds=1, calls=1, warmup=0, settle=0))
    distances = race.disagreement()
    assert distances["a"] == 0
    assert distances["b"] == pytest.approx(1.5**3 - 1)


PROBED = (3 * (1 << 19) + 77, 40, 0, 4096, 1, 100_000)  # bytes of tensors


def probed(threads: int) -> Probe:
    return Probe({name: [torch.zeros(n, dtype=torch.uint8) for n in PROBED] for name in ARRAYS}, threads)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("keep", [KEEP, (1 << 64) - 1], ids=["as in a benchmark", "showing what it moves"])
def test_the_probe_touches_every_byte_once(threads: int, keep: int) -> None:
    probe = probed(threads)
    assert probe.bytes == sum(PROBED)
    generator = torch.Generator().manual_seed(0)
    before = {name: [torch.empty_like(t).random_(0, 256, generator=generator) for t in tensors]
              for name, tensors in probe.streams.items()}  # fmt: skip
    for mix, variants in DISTINCT.items():
        for variant, block, backwards in itertools.product(variants, BLOCKS, (False, True)):
            for name, tensors in probe.streams.items():
                torch._foreach_copy_(tensors, before[name])
            probe.run(mix, variant, block, backwards, keep)
            mask = keep & 0xFF
            for i in range(len(PROBED)):
                expected = {name: before[name][i] for name in ARRAYS}
                w, g, m, backup = expected.values()
                if mix == "perturb":
                    expected["backup"], expected["w"] = w, w ^ (g & mask)
                if mix in ("update", "base"):
                    expected["m"] = m ^ (g & mask)
                    expected["w"] = (backup if mix == "update" else w) ^ (expected["m"] & mask)
                for name in ARRAYS:
                    assert torch.equal(probe.streams[name][i], expected[name]), (mix, variant, block, name, i)


@needs_compiler
def test_the_norm_probe_reads_all_of_its_tensors() -> None:
    probe = probed(2)
    for block in BLOCKS:
        assert probe.run("norm", 0, block, False)[1] == 0
        for g in probe.streams["g"]:
            for i in {0, g.numel() // 3, g.numel() - 1} if g.numel() else ():
                g[i] = 1
                assert probe.run("norm", 0, block, False)[1] == 1 << 8 * (i % 8)
                g[i] = 0


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_probe_shares_the_bytes_among_its_threads(block: int, threads: int) -> None:
    cuts = cut(PROBED, block, threads)
    for tensor, size in enumerate(PROBED):
        ends = [0]
        for _, begin, count, _ in (c for c in cuts if c[0] == tensor):
            assert begin == ends[-1]
            assert begin % ALIGNMENT == 0
            assert count > 0
            ends.append(begin + count)
        assert ends[-1] == size
    if block:
        assert max(count for _, _, count, _ in cuts) <= block
    else:
        load = [sum(count for _, _, count, owner in cuts if owner == t) for t in range(threads)]
        assert max(load) - min(load) <= 2 * ALIGNMENT * len(PROBED)


@needs_compiler
def test_the_probe_runs_over_the_optimizer_s_own_memory_and_leaves_it_as_it_is() -> None:
    case = many(5, 1000)
    ours = make("ours", case, torch.float32, Hyper())
    assert isinstance(ours, Ours)
    attach(ours.params, case.tensors(torch.float32, seed=1))
    ours.perturb()
    attach(ours.params, case.tensors(torch.float32, seed=2))
    ours.update()
    attach(ours.params, case.tensors(torch.float32, seed=3))
    before = {name: [t.clone() for t in tensors] for name, tensors in ours.streams().items()}
    probe = Probe(ours.streams(), 2)
    assert [t.data_ptr() for t in probe.streams["w"]] == [p.data_ptr() for p in ours.params]
    calls: list[str] = []
    probe.calibrate(lambda: calls.append("calibrate"))
    assert all(seconds > 0 for seconds in probe.seconds(lambda: calls.append("time")).values())
    assert calls.count("time") == 3  # before norm, update and base
    for name in ("w", "g", "m"):
        assert all(map(torch.equal, probe.streams[name], before[name])), name
    with pytest.raises(ValueError, match="m must be as large as w"):
        Probe({**ours.streams(), "m": before["m"][:-1]}, 2)


def test_results_are_append_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "host.json"
    arguments = ["host", "--count", "3", "--rounds", "2", "--calls", "2", "--peer", "foreach"]
    arguments += ["--threads", "1", "--out", str(out)]
    assert main(arguments) == 0
    data = record.read(out)
    assert [race["label"] for race in data["races"]] == [
        "fresh gradients", "same gradients", "new gradient addresses", "same gradients, from empty caches"
    ]  # fmt: skip
    assert all(len(r["rounds_s"]) == 2 for race in data["races"] for r in race["results"])
    assert out.with_suffix(".md").read_text() == record.markdown(data)
    kept = out.read_text()
    assert main(arguments) == 2
    assert "append-only" in capsys.readouterr().err
    assert out.read_text() == kept
    assert main([*arguments, "--force"]) == 0
    assert out.read_text() != kept


@needs_compiler
def test_the_probe_has_the_backups_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "1000x1000", lambda: many(3, 1000))
    streams, run, seen = Ours.streams, Race.run, []

    def noting(self: Ours) -> dict[str, list[torch.Tensor]]:
        seen.append((self, streams(self)))
        return seen[-1][1]

    def compared(self: Race, plan: Plan) -> Any:
        times = run(self, plan)
        if self.probe is not None:
            mine, probed = seen[-1]
            backups = mine.optimizer._step_state.backups
            assert [b.data_ptr() for b in probed["backup"]] == [backups[p].data_ptr() for p in mine.params]
            assert [g.data_ptr() for g in probed["g"]] == [g.data_ptr() for g in mine.grads()]
            seen.append((mine, {}))
        return times

    monkeypatch.setattr(Ours, "streams", noting)
    monkeypatch.setattr(Race, "run", compared)
    cpu.measure("1000x1000", "fp32", ["ours"], argparse.Namespace(rounds=1, calls=2, no_probe=False))
    assert len(seen) == 2


def test_goals_of_host_time_are_ratios_of_ours() -> None:
    def race(label: str, ours: str) -> dict[str, Any]:
        ratios = [
            {"ours": ours, "what": "step", "against": "foreach", "median": 24.9},
            {"ours": ours, "what": "update", "against": "torch base", "median": 20.0},
            {"ours": ours, "what": "base", "against": "foreach", "median": 1.0},
        ]
        return {"case": "150x64", "tensors": 150, "label": label, "ratios": ratios}

    races = [race("same gradients", "ours"), race("same gradients", "ours-master"), race("fresh gradients", "ours")]
    assert host._goal_notes([*races, {**races[0], "case": "3x64"}]) == [
        "goal: foreach: step, 150 tensors, same gradients: 25 times the time of ours; 24.9, MISSED",
        "goal: torch base: update, 150 tensors, same gradients: 20 times the time of ours; 20.0, met",
    ]


@needs_compiler
def test_stores_compares_both_kinds_with_the_choice_by_size(tmp_path: Path) -> None:
    out = tmp_path / "stores.json"
    assert main(["stores", "--dtype", "bf16", "--megabytes", "1", "--rounds", "1", "--out", str(out)]) == 0
    data = record.read(out)
    labels = [race["label"] for race in data["races"]]
    assert labels == [f"bf16, 1 MiB of weights, {state}" for state in ("kept in the caches", "from empty caches")]
    for race in data["races"]:
        assert race["elements"] == 1 << 19
        assert {r["who"] for r in race["results"]} == {"plain stores", "non-temporal stores", "ours"}
        assert {r["against"] for r in race["ratios"]} == {"plain stores", "non-temporal stores"}


def test_cpu_writes_a_summary_that_report_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.json"
    case = ["--case", "1000x1000", "--dtype", "fp32", "--peer", "usual", "foreach", "--no-probe", "--threads", "1"]
    assert main(["cpu", *case, "--rounds", "1", "--calls", "1", "--out", str(out)]) == 0
    assert "away from" not in capsys.readouterr().out, "the competitors disagree"
    assert main(["report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# cpu: ")
    assert "1000 tensors, 1,000,000 elements" in printed
    pytest.importorskip("matplotlib")
    assert main(["report", str(out), "--plot", str(tmp_path)]) == 0
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_a_missed_goal_is_visible() -> None:
    race = Race({}, [], times={n: {w: [s] for w in ("perturb", "update", "step", "base")}
                               for n, s in (("ours", 1.0), ("probe", 0.9))})  # fmt: skip
    text = record.markdown(
        {**record.environment("x"), "command": "cpu", "races": [entry(race, CASES["gpt2"](), "fp32")]}
    )
    row = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:6]]
        for line in text.splitlines()
        if "probe: " in line
    }
    assert row["probe: perturb"] == ["0.90", "0.90", "0.95", "NO"]
    assert row["probe: step"] == ["0.90", "0.90", "", ""]


def test_a_file_of_another_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"format": 99}))
    assert main(["report", str(path)]) == 2
    assert "other.json" in capsys.readouterr().err


def test_file_names_tell_device_torch_and_commit() -> None:
    env = {"device": "AMD EPYC (x)  x2", "versions": {"torch": "2.13.0+cpu"}, "commit": "abc123"}
    assert record.path_for(env, "cpu").name == "amd-epyc-x-x2-torch2.13.0-abc123-cpu.json"
