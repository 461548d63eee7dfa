"""Datasets and their loaders."""

from __future__ import annotations

from pipeline.data.dataset import Dataset, make_dataset
from pipeline.data.loaders import cifar10, digits, fashion_mnist, mnist
from pipeline.data.soft_labels import cifar10h, teacher

__all__ = ["Dataset", "cifar10", "cifar10h", "digits", "fashion_mnist", "make_dataset", "mnist", "teacher"]
