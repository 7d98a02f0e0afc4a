"""`python -m dino_head.cli` is `dino-head`."""

from dino_head.cli import main

if __name__ == "__main__":  # processes that spawn starts import this file
    main()
