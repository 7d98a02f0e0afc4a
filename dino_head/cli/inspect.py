"""`dino-head inspect`: the DINO heads that a checkpoint holds."""

import argparse
from collections.abc import Sequence

from dino_head.checkpoints._report import describe


def inspect(arguments: Sequence[str] | None = None) -> None:
    """Print the heads of a checkpoint; exit with status 1 if `load_head` cannot load one of them."""
    parser = argparse.ArgumentParser(
        prog="dino-head inspect",
        description="Shows which DINO heads a checkpoint holds and how load_head maps each key. Changes nothing.",
    )
    parser.add_argument("file", help="file of torch.save, safetensors, or the index.json of sharded safetensors")
    file = parser.parse_args(arguments).file
    try:
        report, is_loadable = describe(file)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    print(report)
    if not is_loadable:
        raise SystemExit(1)
