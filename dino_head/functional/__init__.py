"""The objectives as pure functions without state; only the `reduce` argument communicates between processes."""

from dino_head.functional.dino import dino_loss
from dino_head.functional.ibot import ibot_patch_loss
from dino_head.functional.koleo import koleo_loss
from dino_head.functional.sinkhorn import sinkhorn_center

__all__ = ["dino_loss", "ibot_patch_loss", "koleo_loss", "sinkhorn_center"]
