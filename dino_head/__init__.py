"""The DINO projection head, objective and training rules as parts for PyTorch Lightning.

`dino_head` itself is plain PyTorch and does not import Lightning; import the Lightning callbacks from
`dino_head.callbacks`.
"""

from dino_head.diagnosis import diagnose
from dino_head.functional import dino_loss, ibot_patch_loss, koleo_loss
from dino_head.head import DINOProjectionHead, ProjectionHead
from dino_head.losses import DINOLoss, IBOTPatchLoss
from dino_head.masking import random_block_masks
from dino_head.multicrop import multicrop_forward
from dino_head.optim import parameter_groups
from dino_head.prototypes import FactoredLogits
from dino_head.schedules import cosine_schedule
from dino_head.seeds import derived_seed

__version__ = "0.1.0"

__all__ = [
    "DINOLoss",
    "DINOProjectionHead",
    "FactoredLogits",
    "IBOTPatchLoss",
    "ProjectionHead",
    "cosine_schedule",
    "derived_seed",
    "diagnose",
    "dino_loss",
    "ibot_patch_loss",
    "koleo_loss",
    "multicrop_forward",
    "parameter_groups",
    "random_block_masks",
]
