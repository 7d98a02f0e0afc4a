"""Small volumes that are made: enough to see that features tell shapes apart."""

import torch
from torch import Tensor


def make_volumes(number: int, size: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy volumes (number, 1, size, size, size) in [0, 1] of four kinds, anywhere, of any radius; and the kinds."""
    random = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, size)] * 3, indexing="ij"))
    volumes, kinds = [], torch.arange(number) % 4
    for kind in kinds.tolist():
        offset = (torch.rand(3, 1, 1, 1, generator=random) - 0.5) * 0.8
        radius = 0.25 + 0.25 * torch.rand(1, generator=random)
        x, y, z = grid - offset
        distance = (x**2 + y**2 + z**2).sqrt()
        inside = [
            distance < radius,
            torch.stack([x, y, z]).abs().amax(dim=0) < 0.8 * radius,
            ((x**2 + y**2).sqrt() < 0.6 * radius) & (z.abs() < 1.6 * radius),
            (distance < radius) & (distance > 0.6 * radius),
        ][kind]
        brightness = 0.5 + 0.3 * torch.rand(1, generator=random)
        volumes.append(brightness * inside + 0.1 * torch.randn(inside.shape, generator=random).abs())
    return torch.stack(volumes)[:, None].clamp(0, 1), kinds
