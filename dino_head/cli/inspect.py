"""`dino-head inspect`: shows the DINO heads in a checkpoint."""

import argparse
from collections.abc import Sequence

from dino_head.checkpoints._report import describe


def inspect(arguments: Sequence[str] | None = None) -> None:
    """Print the heads of a checkpoint; exit with status 1 if `load_head` cannot load one of them."""
    parser = argparse.ArgumentParser(
        prog="dino-head inspect",
        description="Shows the DINO heads in a checkpoint and how load_head maps each key. Does not change the file.",
    )
    parser.add_argument("file", help="file of torch.save, safetensors file, or index.json of sharded safetensors")
    file = parser.parse_args(arguments).file
    try:
        report, is_loadable = describe(file)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    print(report)
    if not is_loadable:
        raise SystemExit(1)
