"""Conventional training for comparison: one run with a `DataLoader`, Lightning's loop and its MLFlowLogger.

It does little besides training, so that the comparison is fair: no progress bar, no checkpoints, metrics only per
epoch, and no calibration error (the pipeline does compute it).
"""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import MLFlowLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.steps import BARE_LOSSES, BATCH, LEARNING_RATE
from pipeline.data.dataset import Dataset
from pipeline.models import mlp

EXPERIMENT = "conventional"  # `end_to_end.database` creates it


class Classifier(pl.LightningModule):
    """MLP with automatic optimisation and `self.log` of the usual metrics."""

    def __init__(self, arm: str, data: Dataset) -> None:
        super().__init__()
        self.model, self.loss = mlp(data.input_shape, data.num_classes), BARE_LOSSES[arm]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = self.loss(self.model(inputs), labels)
        self.log("train/objective", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_metrics("val", *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._log_metrics("test", *batch)

    def _log_metrics(self, split: str, inputs: Tensor, labels: Tensor) -> None:
        logits = self.model(inputs)
        probs = logits.softmax(-1)
        metrics = {
            "nll": nn.functional.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(-1) == labels).float().mean(),
            "brier": torch.square(probs - nn.functional.one_hot(labels, probs.shape[-1])).sum(-1).mean(),
        }
        self.log_dict({f"{split}/{name}": value for name, value in metrics.items()})


def train(arm: str, seed: int, epochs: int, data: Dataset, tracking_uri: str) -> None:
    """Train one run and record it in MLflow."""
    pl.seed_everything(seed, verbose=False)
    logger = MLFlowLogger(EXPERIMENT, f"{arm}/s{seed}", tracking_uri, tags={"loss": arm, "seed": str(seed)})
    settings = {"loss": arm, "seed": seed, "epochs": epochs, "batch_size": BATCH, "lr": LEARNING_RATE}
    logger.log_hyperparams(settings)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Classifier(arm, data)
    trainer.fit(module, _loader(data, "train", shuffle=True), _loader(data, "val"))
    trainer.test(module, _loader(data, "test"), verbose=False)


def _loader(data: Dataset, split: str, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*data.take(data.splits[split])), BATCH, shuffle=shuffle)
