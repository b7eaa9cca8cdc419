"""Lightning's ModelParallelStrategy with FSDP2: automatic optimization, against a plain loop on one process."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import ranks
import sharded
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
import pytorch_lightning as pl  # noqa: E402
from pytorch_lightning.strategies import ModelParallelStrategy  # noqa: E402

from rst_fused import RST  # noqa: E402
from rst_fused.integrations.lightning import RSTMixin  # noqa: E402

STEPS = 12


class Plain(pl.LightningModule):
    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.recipe, self.net = recipe, sharded.make_model()

    def configure_model(self) -> None:
        for layer in self.net:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> RST:
        self.opt = RST(self.parameters(), **self.recipe)
        return self.opt


class Mixed(RSTMixin, Plain):
    pass


def _fit(recipe: dict[str, Any], per_step: int) -> dict[str, Any]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in sharded.batches(STEPS)]
    micro = [(a, b) for x, y in mine for a, b in zip(x.chunk(per_step), y.chunk(per_step), strict=True)]
    model = (Mixed if per_step > 1 else Plain)(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu", devices=size, max_epochs=1, accumulate_grad_batches=per_step, logger=False,
            strategy=ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(micro, batch_size=None))
    return sharded.result(model.opt, model.net)


@pytest.mark.parametrize("per_step", [1, 2])
def test_trains_as_one_process(per_step: int):
    recipe = {"base": "sgd", "lr": 0.05, "momentum": 0.9}
    expected = sharded.alone(recipe, STEPS)
    for result in ranks.run(2, _fit, recipe, per_step):
        assert sharded.difference(result["weights"], expected["weights"]) <= sharded.TOLERANCE
        assert (result["steps"], result["sam_steps"]) == (STEPS, expected["sam_steps"])
