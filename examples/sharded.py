"""The example's module for ModelParallelStrategy: weights, gradients and optimizer states are divided among GPUs."""

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dino_head.examples.dino_module import DINO


class ShardedDINO(DINO):
    """DINO whose transformers are sharded block by block; each module in an nn.ModuleList is a block."""

    def configure_model(self) -> None:
        """Shard both sides alike, each block of the backbone separately, so that only one is gathered at a time."""
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for side in (self.student, self.teacher):
            blocks = [block for part in side["backbone"].modules() if isinstance(part, nn.ModuleList) for block in part]
            for module in (*blocks, side["backbone"], side["head"]):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
            register_fsdp_forward_method(side["head"], "factored_logits")
