"""The example's module for ModelParallelStrategy, which divides weights, gradients and optimizer states among GPUs."""

from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dino_head.examples.dino_module import DINO


class ShardedDINO(DINO):
    """DINO with sharded transformers; the modules of each nn.ModuleList are the blocks."""

    def configure_model(self) -> None:
        """Shard each block of both backbones, so that only one block at a time is gathered."""
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        for side in (self.student, self.teacher):
            blocks = [block for part in side["backbone"].modules() if isinstance(part, nn.ModuleList) for block in part]
            for module in (*blocks, side["backbone"], side["head"]):
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
            register_fsdp_forward_method(side["head"], "factored_logits")
