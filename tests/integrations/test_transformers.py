"""The Trainer of Hugging Face against plain loops of this package: same data, same draws, same bits."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from oracle_optimizer import bits

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from rst_fused import RST  # noqa: E402
from rst_fused.integrations.transformers import RSTMixin  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS: dict[str, Any] = {"base": "sgd", "lr": 0.1, "momentum": 0.9, "rho": 0.1, "schedule": 0.5, "seed": 1}
COUNT = 12  # micro-batches of an epoch


class RSTTrainer(RSTMixin, Trainer):
    pass


class Model(torch.nn.Module):
    """With the interface of a model that divides its loss by num_items_in_batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        logits = self.net(x)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum" if num_items_in_batch else "mean")
        return {"loss": loss / num_items_in_batch if num_items_in_batch else loss, "logits": logits}


class WithoutItems(Model):
    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return super().forward(x, labels)


@pytest.fixture(autouse=True)
def fresh():
    """Accelerate keeps its state in the classes."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def rows(count: int = 4 * COUNT) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(count, 5, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    return [{"x": x[i], "labels": labels[i]} for i in range(count)]


def trainer_for(
    folder: Path, model: torch.nn.Module, kind: type[Trainer] = RSTTrainer, data: Any = None,
    callbacks: Any = (), arguments: Any = None, **options: Any,
) -> Any:  # fmt: skip
    given = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 4, "report_to": [],
        "max_steps": 6, "gradient_accumulation_steps": 2, "save_strategy": "no", "logging_strategy": "no",
        "disable_tqdm": True, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "seed": 5,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    opt = RST(model.parameters(), **{**OPTIONS, **options})
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0)
    return kind(
        model=model, args=TrainingArguments(**{**given, **(arguments or {})}), train_dataset=data or rows(),
        optimizers=(opt, scheduler), callbacks=list(callbacks),
    )  # fmt: skip


def plain(
    model: Any, per_step: int = 2, steps: int = 6, clip: float = 0.0, dtype: torch.dtype | None = None,
    epochs: int = 1, scaler: Any = None, **options: Any,
) -> RST:  # fmt: skip
    """The same training, written out: the loss is that of all rows of a step, divided by their number."""
    opt = RST(model.parameters(), **{**OPTIONS, **options})
    data = [torch.utils.data.default_collate(rows()[4 * i : 4 * i + 4]) for i in range(COUNT)]

    def one_pass(window: list[Any]) -> None:
        for batch in window:
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
                if isinstance(model, WithoutItems):
                    loss = model(**batch)["loss"] / len(window)
                else:
                    loss = model(**batch, num_items_in_batch=torch.tensor(4 * len(window)))["loss"]
            (loss if scaler is None else scaler.scale(loss)).backward()

    def clipped() -> None:
        if clip and scaler is not None:
            scaler.unscale_(opt)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)

    model.train()
    windows = [data[start : start + per_step] for start in range(0, COUNT, per_step)] * epochs
    for window in windows[:steps]:
        opt.zero_grad()
        one_pass(window)
        if scaler is None or not opt.draw():
            clipped()
        if opt.perturb():
            with opt.second_pass(model):
                one_pass(window)
            clipped()
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()
    return opt


def rst_of(trainer: Any) -> RST:
    opt = trainer.optimizer.optimizer
    assert type(opt) is RST
    return opt


def assert_same(trainer: Any, other: torch.nn.Module, opt: RST) -> None:
    mine = rst_of(trainer)
    assert (mine.steps, mine.sam_steps) == (opt.steps, opt.sam_steps) and 0 < opt.sam_steps < opt.steps
    model = trainer.model
    assert bits([*model.parameters(), *model.buffers()]) == bits([*other.parameters(), *other.buffers()])


@pytest.mark.parametrize("kind", [Model, WithoutItems])
@pytest.mark.parametrize(
    ("per_step", "gamma", "clip", "bf16"), [(1, 1.0, 0.0, False), (2, 2.0, 0.05, False), (5, 1.0, 0.05, True)]
)
def test_a_run_is_that_of_a_plain_loop(tmp_path, kind, per_step, gamma, clip, bf16):
    arguments = {"max_grad_norm": clip, "gradient_accumulation_steps": per_step, "bf16": bf16, "max_steps": 8}
    trainer = trainer_for(tmp_path, kind(), arguments=arguments, gamma=gamma)
    trainer.train()
    other = kind()
    opt = plain(other, per_step, 8, clip, torch.bfloat16 if bf16 else None, epochs=4, gamma=gamma)
    assert_same(trainer, other, opt)


def test_the_reported_loss_is_that_of_the_first_pass(tmp_path):
    trainer = trainer_for(tmp_path, WithoutItems(), schedule=1.0, rho=1.0, lr=0.0, arguments={"max_steps": 3})
    loss = trainer.train().training_loss
    model, data = WithoutItems(), rows()
    means = [model(**torch.utils.data.default_collate(data[4 * i : 4 * i + 4]))["loss"] for i in range(6)]
    assert loss == pytest.approx(float(sum(means) / 6), rel=1e-6)


def test_a_plain_trainer_takes_base_steps_and_says_so(tmp_path):
    trainer = trainer_for(tmp_path, Model(), Trainer, schedule=1.0)
    with pytest.warns(RuntimeWarning, match="without a closure and without perturb"):
        trainer.train()
    assert (rst_of(trainer).steps, rst_of(trainer).sam_steps) == (6, 0)


def test_with_the_mixin_nothing_warns(tmp_path):
    trainer = trainer_for(tmp_path, Model(), arguments={"max_grad_norm": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        trainer.train()


def test_an_optimizer_that_the_trainer_makes(tmp_path):
    model = Model()
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=4, report_to=[], disable_tqdm=True, save_strategy="no",
        per_device_train_batch_size=4, learning_rate=0.01,
    )  # fmt: skip
    made = (RST, {"base": "adamw", "lr": 0.01, "schedule": 1.0})
    trainer = RSTTrainer(model=model, args=arguments, train_dataset=rows(), optimizer_cls_and_kwargs=made)
    trainer.train()
    assert (rst_of(trainer).steps, rst_of(trainer).sam_steps) == (4, 4)


def test_other_optimizers_are_left_alone(tmp_path):
    model = Model()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = trainer_for(tmp_path, model)
    trainer.optimizer, trainer.lr_scheduler = opt, torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0)
    trainer.train()
    other = Model()
    plain(other, schedule=0.0, momentum=0.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Failing(Model):
    def __init__(self, at: int) -> None:
        super().__init__()
        self.calls, self.at = 0, at

    def forward(self, x: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyError("not today")
        return super().forward(x, labels, **kwargs)


class FailingBeforeTheStep(TrainerCallback):
    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("not today")


@pytest.mark.parametrize("where", ["first pass", "second pass", "between second pass and step"])
def test_an_exception_brings_the_weights_back(tmp_path, where):
    model = Failing({"first pass": 2, "second pass": 4}.get(where, 0))
    callbacks = [FailingBeforeTheStep()] if where.startswith("between") else []
    trainer = trainer_for(tmp_path, model, schedule=1.0, callbacks=callbacks)
    before = bits(list(model.parameters()))
    with pytest.raises(KeyError, match="not today"):
        trainer.train()
    assert bits(list(model.parameters())) == before and rst_of(trainer).steps == 0


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_loss_scaler(tmp_path, monkeypatch, clip):
    """The Trainer makes one on a GPU only: here it is given one."""
    trainer = trainer_for(tmp_path, WithoutItems(), arguments={"max_grad_norm": clip})
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "_mixed_precision", "fp16")
    trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    trainer.train()
    model, scaler = WithoutItems(), torch.amp.GradScaler("cpu")
    opt = plain(model, clip=clip, dtype=torch.float16, scaler=scaler)
    assert scaler.get_scale() == trainer.accelerator.scaler.get_scale()
    assert_same(trainer, model, opt)


def test_what_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, Model(), gamma=2.0)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"Trainer, which .* with a loss scaler \(fp16\) and gamma=2.0"):
        trainer.train()


def test_a_checkpoint_continues_the_draws(tmp_path):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "train_sampling_strategy": "random"}
    whole = trainer_for(tmp_path / "a", Model(), arguments=arguments)
    whole.train()
    resumed = trainer_for(tmp_path / "b", Model(), arguments=arguments, seed=99)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert rst_of(resumed).seed == OPTIONS["seed"]
    assert_same(resumed, whole.model, rst_of(whole))


def _on_a_rank(folder: str) -> Any:
    arguments = {"max_steps": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5}
    arguments["accelerator_config"] = {"dispatch_batches": False, "split_batches": False}
    trainer = trainer_for(Path(folder), WithoutItems(), arguments=arguments, gamma=2.0)
    trainer.train()
    model, opt = trainer.model, rst_of(trainer)
    assert type(trainer.model_wrapped) is torch.nn.parallel.DistributedDataParallel
    return bits(list(model.parameters())), opt.steps, opt.sam_steps, list(model.parameters())


def test_two_processes_are_one_with_the_mean_of_their_gradients(tmp_path):
    found = ranks.run(2, _on_a_rank, str(tmp_path))
    assert found[0][:3] == found[1][:3]
    models = [WithoutItems(), WithoutItems()]
    opts = [RST(m.parameters(), **OPTIONS, gamma=2.0) for m in models]
    data = [torch.utils.data.default_collate(rows()[4 * i : 4 * i + 4]) for i in range(COUNT)]

    def one_pass(start: int) -> None:
        for rank, model in enumerate(models):
            model.train()
            with torch.no_grad():
                for p, q in zip(model.parameters(), models[0].parameters(), strict=True):
                    p.copy_(q)
            opts[rank].zero_grad()
            for i in range(start, start + 3):
                (model(**data[2 * i + rank])["loss"] / 3).backward()
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = (p.grad + q.grad) / 2
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), 0.5)

    for start in (0, 3):
        one_pass(start)
        if opts[0].perturb():
            one_pass(start)
        opts[0].step()
    assert found[0][1:3] == (opts[0].steps, opts[0].sam_steps) == (2, 1)
    for p, q in zip(found[0][3], models[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # sums over ranks in another order
