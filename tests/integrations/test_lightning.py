"""Lightning's Trainer against plain loops of this package: same data, same draws, same bits."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import ranks
import torch
from oracle_optimizer import bits

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.plugins.precision import MixedPrecision  # noqa: E402
from pytorch_lightning.strategies import DDPStrategy  # noqa: E402

from rst_fused import RST  # noqa: E402
from rst_fused.integrations.lightning import RSTMixin  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, Any] = {"base": "sgd", "lr": 0.1, "momentum": 0.9, "rho": 0.1, "schedule": 0.5, "seed": 1}


class Plain(pl.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )
        self.options = {**OPTIONS, **options}
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.net(batch[:, :5]) - batch[:, 5:]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> RST:
        return RST(self.parameters(), model=self, **self.options)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(self.trainer.callback_metrics["loss"]))


class Mixed(RSTMixin, Plain):
    def configure_optimizers(self) -> RST:
        return RST(self.parameters(), **self.options)  # without model=: the mixin keeps the buffers


def batches(count: int = 12) -> list[torch.Tensor]:
    x = torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(1))
    return list(x)


def fit(model: Plain, epochs: int = 1, data: Any = None, **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", devices=options.pop("devices", 1), max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(data or batches(), batch_size=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(num_workers|persistent_workers|GPU|fp16).*")
        trainer.fit(model, loader)
    return trainer


def loop(
    model: Plain, per_step: int = 1, epochs: int = 1, dtype: torch.dtype | None = None, clip: float = 0.0,
    scaler: Any = None,
) -> RST:  # fmt: skip
    """The same training, written out."""
    opt = RST(model.parameters(), **model.options)

    def one_pass(window: list[torch.Tensor]) -> None:
        for x in window:
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False):
                loss = (model(x[:, :5]) - x[:, 5:]).square().mean()
            loss = loss / per_step
            (loss if scaler is None else scaler.scale(loss)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)

    data = batches()
    for _ in range(epochs):
        for start in range(0, len(data), per_step):
            window = data[start : start + per_step]
            opt.zero_grad()
            one_pass(window)
            if opt.perturb():
                with opt.second_pass(model):
                    one_pass(window)
            if scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
    return opt


def rst_of(trainer: pl.Trainer) -> RST:
    opt = trainer.optimizers[0]
    assert type(opt) is RST
    return opt


def assert_same(model: Plain, trainer: pl.Trainer, other: Plain, opt: RST) -> None:
    mine = rst_of(trainer)
    assert (mine.steps, mine.sam_steps) == (opt.steps, opt.sam_steps) and 0 < opt.sam_steps < opt.steps
    assert bits([*model.parameters(), *model.buffers()]) == bits([*other.parameters(), *other.buffers()])


@pytest.mark.parametrize("kind", [Plain, Mixed])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_is_that_of_a_plain_loop(kind, gamma, precision):
    model, other = kind(gamma=gamma), Plain(gamma=gamma)
    trainer = fit(model, precision=precision)
    opt = loop(other, dtype=torch.bfloat16 if precision == "bf16-mixed" else None)
    assert_same(model, trainer, other, opt)
    assert trainer.global_step == opt.steps == 12


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulated_micro_batches_are_gone_over_again(gamma, clip):
    model, other = Mixed(gamma=gamma), Plain(gamma=gamma)
    trainer = fit(model, epochs=3, accumulate_grad_batches=4, gradient_clip_val=clip)
    opt = loop(other, per_step=4, epochs=3, clip=clip)
    assert_same(model, trainer, other, opt)
    assert opt.steps == 9


def test_a_last_window_that_is_short():
    model, other = Mixed(), Plain()
    trainer = fit(model, epochs=2, accumulate_grad_batches=5)
    assert_same(model, trainer, other, loop(other, per_step=5, epochs=2))
    assert rst_of(trainer).steps == 6


def test_accumulation_without_the_mixin_is_refused():
    model = Plain(schedule=1.0)
    before = bits(list(model.parameters()))
    with pytest.raises(RuntimeError, match="adds to gradients that were there before.*rst_fused.integrations"):
        fit(model, accumulate_grad_batches=4)
    assert bits(list(model.parameters())) == before


def test_clipping_holds_for_both_passes():
    model, other = Plain(gamma=2.0), Plain(gamma=2.0)
    trainer = fit(model, gradient_clip_val=0.05)
    assert_same(model, trainer, other, loop(other, clip=0.05))


def test_a_loss_scaler():
    """Lightning calls step() without a closure then: base steps and a warning, or the mixin."""

    def plugin() -> tuple[MixedPrecision, torch.amp.GradScaler]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
        return MixedPrecision("16-mixed", "cpu", scaler), scaler

    model, other = Mixed(gamma=2.0), Plain(gamma=2.0)
    trainer = fit(model, plugins=[plugin()[0]], accumulate_grad_batches=2)
    opt = loop(other, per_step=2, dtype=torch.float16, scaler=plugin()[1])
    assert_same(model, trainer, other, opt)
    with pytest.warns(RuntimeWarning, match="without a closure and without perturb"):
        assert rst_of(fit(Plain(schedule=1.0), plugins=[plugin()[0]])).sam_steps == 0
    model = Mixed(schedule=1.0)
    before = bits(list(model.parameters()))
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(model, plugins=[plugin()[0]], gradient_clip_val=1.0)
    assert bits(list(model.parameters())) == before


def test_what_is_logged_is_the_loss_of_the_first_pass():
    model = Mixed(schedule=1.0, rho=1.0, lr=0.0, momentum=0.0)
    fit(model)
    fresh = Plain()
    expected = [float((fresh(x[:, :5]) - x[:, 5:]).square().mean()) for x in batches()]
    assert model.losses == expected
    assert "log" not in vars(model)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_exception_in_the_second_pass_brings_the_weights_back(scaled):
    class Failing(Mixed):
        def training_step(self, batch, batch_idx):
            if "log" in vars(self) and batch_idx == 3:
                raise KeyError("not today")
            return super().training_step(batch, batch_idx)

    model = Failing(schedule=1.0)
    before = bits([*model.parameters()])
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if scaled else None
    with pytest.raises(KeyError, match="not today"):
        fit(model, accumulate_grad_batches=4, plugins=plugins)
    assert bits([*model.parameters()]) == before


def test_a_hook_that_does_not_call_that_of_super():
    class Forgetful(Mixed):
        def on_train_batch_start(self, batch, batch_idx):
            pass

    with pytest.raises(RuntimeError, match=r"has seen the batches \[\].*expected 0 to 1.*super\(\)"):
        fit(Forgetful(), accumulate_grad_batches=2)


def test_other_optimizers_are_left_alone():
    class Sgd(Mixed):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model, other = Sgd(), Plain(schedule=0.0, momentum=0.0)
    fit(model, accumulate_grad_batches=2)
    loop(other, per_step=2)
    assert torch.allclose(model.net[0].weight, other.net[0].weight, rtol=1e-6)


@pytest.mark.parametrize(("kind", "per_step"), [(Plain, 1), (Mixed, 2)])
def test_a_checkpoint_continues_the_draws(tmp_path, kind, per_step):
    whole, first, second = kind(), kind(), kind(seed=99)
    trainer = fit(whole, epochs=4, accumulate_grad_batches=per_step)
    fit(first, epochs=2, accumulate_grad_batches=per_step).save_checkpoint(tmp_path / "a.ckpt")
    resumed = pl.Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=per_step,
    )  # fmt: skip
    resumed.fit(second, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=tmp_path / "a.ckpt")
    assert rst_of(resumed).seed == OPTIONS["seed"]
    assert_same(second, resumed, whole, rst_of(trainer))


def _on_a_rank(cases: list[tuple[str, int, float]]) -> list[Any]:
    rank, found = torch.distributed.get_rank(), []
    for kind, per_step, gamma in cases:
        model = (Mixed if kind == "mixed" else Plain)(gamma=gamma)
        trainer = fit(
            model, devices=2, strategy=DDPStrategy(process_group_backend="gloo"), data=batches()[rank::2],
            accumulate_grad_batches=per_step, use_distributed_sampler=False,
        )  # fmt: skip
        mine = rst_of(trainer)
        found.append((bits([*model.parameters()]), mine.steps, mine.sam_steps, list(model.parameters())))
    return found


def test_two_processes_are_one_with_the_mean_of_their_gradients():
    cases = [("plain", 1, 1.0), ("mixed", 3, 2.0)]
    first, second = ranks.run(2, _on_a_rank, cases)
    for case, mine, theirs in zip(cases, first, second, strict=True):
        assert mine[:3] == theirs[:3]
        check_against_one_process(*case[1:], *mine[1:])


def check_against_one_process(per_step: int, gamma: float, steps: int, sam_steps: int, params: Any) -> None:
    replicas = [Plain(gamma=gamma), Plain(gamma=gamma)]
    replicas[1] = copy.deepcopy(replicas[0])
    opt = RST(replicas[0].parameters(), **replicas[0].options)
    data = batches()

    def one_pass(window: range) -> None:
        """Gradients of both ranks, each with its own batch statistics, and their mean."""
        replicas[1].load_state_dict({**replicas[1].state_dict(), **dict(replicas[0].named_parameters())})
        for rank, replica in enumerate(replicas):
            replica.zero_grad()
            for i in window:
                x = data[rank::2][i]
                ((replica(x[:, :5]) - x[:, 5:]).square().mean() / per_step).backward()
        for p, q in zip(replicas[0].parameters(), replicas[1].parameters(), strict=True):
            p.grad = p.grad / 2 + q.grad / 2

    for start in range(0, 6, per_step):
        one_pass(range(start, start + per_step))
        if opt.perturb():
            one_pass(range(start, start + per_step))
        opt.step()
    assert (steps, sam_steps) == (opt.steps, opt.sam_steps) and sam_steps > 0
    for p, q in zip(params, replicas[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # sums over ranks in another order
