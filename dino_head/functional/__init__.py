"""The objective as pure functions, without state; they communicate between processes through an argument alone."""

from dino_head.functional.dino import dino_loss
from dino_head.functional.sinkhorn import sinkhorn_center

__all__ = ["dino_loss", "sinkhorn_center"]
