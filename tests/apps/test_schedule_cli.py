"""The command ``rst-fused schedule``, through its functions."""

from __future__ import annotations

import argparse
import builtins

import pytest

from rst_fused import schedule as S
from rst_fused import schedule_cli


def cli(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    schedule_cli.add_arguments(parser)
    return schedule_cli.run(parser.parse_args(arguments))


def test_cli_report(capsys) -> None:
    assert cli("linear", "--p", "0.3", "--steps", "1000", "--seed", "4") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "linear(p=0.3, steps=1000)"
    assert "p(  0) = 0.0000" in out and "p(999) = 0.5994" in out and "p(444) = 0.2664" in out
    assert "mean p       0.2997" in out and "mean cost    1.2997 " in out
    fired = sum(S.draw(4, t, S.linear(0.3, 1000)(t)) for t in range(1000))
    assert f"seed 4: {fired} SAM steps in 1000 steps, {1 + fired / 1000:.6g} pairs" in out
    assert out.isascii()


@pytest.mark.parametrize(("arguments", "want"), [
    ("constant --p 0.4", S.constant(0.4)),
    ("late --b 0.4 --steps 20", S.late(0.4, 20)),
    ("piecewise --p 0.2 --b 0.4", S.piecewise(0.2, 0.4, 1000)),
    ("interval --every 4 --offset 1", S.interval(4, 1)),
    ("cosine --warmup 100", S.warmup(S.cosine(1000), 100)),
    ("linear --cost 1.25 --steps 50", S.for_cost("linear", 1.25, 50)),
    ("piecewise --cost 1.25 --p 0.9", S.for_cost("piecewise", 1.25, 1000, p=0.9)),
    ("interval --cost 1.25", S.interval(4)),
])  # fmt: skip
def test_cli_builds(arguments: str, want: S.Schedule, capsys) -> None:
    assert cli(*arguments.split()) == 0
    assert eval(capsys.readouterr().out.splitlines()[0], vars(S)) == want


@pytest.mark.parametrize(("arguments", "message"), [
    ("linear", "linear needs --p (or --cost)"),
    ("piecewise", "piecewise needs --p and --b (or --cost)"),
    ("linear --p 0.3 --b 0.2", "linear takes no --b"),
    ("linear --p 3", "p=3.0"),
    ("linear --p 0.3 --steps 0", "--steps 0"),
    ("linear --p 0.3 --seed -1", "seed=-1"),
    ("linear --p 0.3 --steps 10 --warmup 10", "warm-up below the 10 steps"),
    ("cosine --cost 1.2", "cosine always costs 1.5"),
    ("constant --p 0.3 --output /nonexistent/plot.png", "--output /nonexistent/plot.png"),
])  # fmt: skip
def test_cli_errors(arguments: str, message: str, capsys) -> None:
    pytest.importorskip("matplotlib")
    assert cli(*arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_cli_plot() -> None:
    assert schedule_cli.plot([0.0, 1.0, 0.5, 0.2], height=4).splitlines() == [
        " 1.0 | #", " 0.8 | #", " 0.5 | ##", " 0.2 | ###", "     +----", "      0  3",
    ]  # fmt: skip
    # More steps than columns: each column is the mean of its steps, so 0, 1, 0, 1, ... is level at a half.
    rows = schedule_cli.plot([t % 2 for t in range(600)]).splitlines()
    assert [row.count("#") for row in rows[:10]] == [0] * 5 + [60] * 5


def test_cli_picture(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "plot.png"
    assert cli("cosine", "--steps", "50", "--output", str(target)) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {target}" in capsys.readouterr().out


def test_cli_needs_matplotlib_for_pictures_only(monkeypatch, tmp_path) -> None:
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert cli("cosine", "--steps", "5") == 0
    # The command line's main() turns this into the message that names the extra to install.
    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        cli("cosine", "--steps", "5", "--output", str(tmp_path / "plot.png"))
