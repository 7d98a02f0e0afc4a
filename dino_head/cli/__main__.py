"""`python -m dino_head.cli` runs `dino-head`."""

from dino_head.cli import main

if __name__ == "__main__":  # spawned processes import this file
    main()
