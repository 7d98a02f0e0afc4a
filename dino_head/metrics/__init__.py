"""Metrics for a DINO run, as torchmetrics: distributions over prototypes, rank of features, kNN accuracy.

`dino_head` itself does not import them, because torchmetrics takes about as long to import as torch.
"""

from dino_head.metrics.knn import KNNAccuracy
from dino_head.metrics.rankme import RankMe
from dino_head.metrics.statistics import DINOStatistics

__all__ = ["DINOStatistics", "KNNAccuracy", "RankMe"]
