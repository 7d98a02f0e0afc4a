"""The command line: `dino-head fit` trains, `dino-head inspect` shows the heads in a checkpoint."""

import sys
from collections.abc import Sequence

from dino_head._extras import packages_of_extras

HELP = """\
usage: dino-head COMMAND ...

  dino-head fit --config digits                     train on handwritten digits, in a few minutes on a CPU
  dino-head fit --config images --data FOLDER       train a vision transformer on a folder of images
  dino-head inspect FILE                            show the DINO heads in a checkpoint

`dino-head fit --help` lists the recipes and the flags.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: Arguments after `dino-head`; by default, those of the command line.
    """
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command == "fit":
        try:
            with packages_of_extras("dino-head fit"):
                import jsonargparse  # noqa: F401  # which Lightning imports later, when it says less

                from dino_head.cli.fit import main as fit
        except ModuleNotFoundError as error:
            raise SystemExit(f"dino-head: error: {error}") from None
        fit(rest)
    elif command == "inspect":
        from dino_head.cli.inspect import inspect

        inspect(rest)
    elif command in ("-h", "--help"):
        print(HELP, end="")
    else:
        sys.stderr.write(f"dino-head: error: unknown command {command!r}: use fit or inspect\n")
        raise SystemExit(2)
