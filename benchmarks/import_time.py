"""Time of `import dino_head` relative to `import torch`: paired runs in fresh processes, median of their ratios."""

import argparse
import statistics
import subprocess
import sys
import time


def seconds(statement: str) -> float:
    """Wall time of a Python process that runs the statement, including the start of the interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21, help="pairs of runs (%(default)s)")
    rounds = parser.parse_args().rounds
    seconds("import dino_head")  # fill the disk cache
    pairs = [(seconds("import torch"), seconds("import dino_head")) for _ in range(rounds)]
    ratio = statistics.median(ours / torch for torch, ours in pairs)
    base = statistics.median(torch for torch, _ in pairs)
    print(f"import torch {base:.2f} s; import dino_head / import torch: {ratio:.3f} (median of {rounds} pairs)")


if __name__ == "__main__":
    main()
