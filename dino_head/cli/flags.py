"""The short flags of `dino-head fit`, and the settings of the configuration that each of them sets."""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

BACKBONE, HEAD, LOSS, AUGMENT = (
    f"model.init_args.{part}.init_args" for part in ("backbone", "head", "loss", "augment")
)
PATCH = 16  # pixels


class Flag(NamedTuple):
    """A short flag.

    Args:
        name: Name without dashes.
        metavar: Name of the value in the help.
        parse: Function that converts text to a value; raises ValueError for a wrong value.
        help: One line of the help.
        rewrite: Function that maps a value to paths of the configuration with their values.
    """

    name: str
    metavar: str
    parse: Callable[[str], Any]
    help: str
    rewrite: Callable[[Any], Mapping[str, Any]]


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = "int"  # argparse shows the type in its error
    return parse


def _utf8(text: str) -> str:
    if text.encode("utf-8", "ignore").decode() != text:
        raise argparse.ArgumentTypeError(
            f"must be UTF-8 to be saved in config.yaml, got {text!a}: rename the folder, or pass a link to it (ln -s)"
        )
    return text


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _pixels(text: str) -> int:
    value = int(text)
    if value < PATCH or value % PATCH:
        raise argparse.ArgumentTypeError(f"must be a multiple of {PATCH}, the size of the ViT's patches, got {text}")
    return value


def _time(text: str) -> str:
    if not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", text):
        raise argparse.ArgumentTypeError(f"must be DD:HH:MM:SS (days, hours, minutes, seconds), got {text}")
    return text


def _devices(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _vit_size(text: str) -> str:
    from dino_head.vision.backbones import VIT

    if text not in VIT:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(VIT)}, got {text}")
    return text


def _rewrite_size(size: str) -> dict[str, Any]:
    from dino_head.vision.backbones import VIT

    return {f"{BACKBONE}.size": size, f"{HEAD}.input_dim": VIT[size][0]}


def _rewrite_global_size(size: int) -> dict[str, Any]:
    return {
        f"{AUGMENT}.global_size": size,
        f"{BACKBONE}.image_size": size,
        "data.init_args.image_size": size * 8 // 7,
        "data.init_args.eval_size": size,
    }


def _to(*paths: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: dict.fromkeys(paths, value)


def _rewrite_stream(steps: int) -> dict[str, Any]:
    return {"data.class_path": "dino_head.vision.StreamData", "trainer.limit_train_batches": steps}


FLAGS = (
    Flag(
        "data", "DIR", _utf8, "folder of images or volumes, or a data set's name on the Hub", _to("data.init_args.data")
    ),
    Flag("out", "DIR", _utf8, "folder of the run (default: runs/NAME of the recipe)", _to("trainer.default_root_dir")),
    Flag("epochs", "N", _at_least(1), "passes over the data", _to("trainer.max_epochs")),
    Flag("batch-size", "N", _at_least(2), "samples per step in each process", _to("data.init_args.batch_size")),
    Flag("workers", "N", _at_least(0), "worker processes that read files", _to("data.init_args.workers")),
    Flag("learning-rate", "X", _positive, "learning rate after the warm-up", _to("model.init_args.learning_rate")),
    Flag("prototypes", "N", _at_least(2), "number of prototypes", _to(f"{HEAD}.output_dim", f"{LOSS}.output_dim")),
    Flag("size", "NAME", _vit_size, "size of the ViT: tiny, small, base or large", _rewrite_size),
    Flag("global-size", "PIXELS", _pixels, "height and width of the global views", _rewrite_global_size),
    Flag("local-size", "PIXELS", _pixels, "height and width of the local views", _to(f"{AUGMENT}.local_size")),
    Flag("stream", "STEPS", _at_least(1), "read the images as a stream, with epochs of STEPS steps", _rewrite_stream),
    Flag("precision", "NAME", str, "precision of the Trainer, such as bf16-mixed", _to("trainer.precision")),
    Flag("max-time", "DD:HH:MM:SS", _time, "stop with a checkpoint after this time", _to("trainer.max_time")),
    Flag("devices", "N", _devices, "devices of the Trainer", _to("trainer.devices")),
    Flag(
        "seed",
        "N",
        _at_least(0),
        "seed of weights, order and augmentation",
        _to("seed_everything", "model.init_args.seed", "data.init_args.seed"),
    ),
)


def recipes() -> dict[str, Path]:
    """Files of the shipped recipes, by name."""
    folder = Path(str(resources.files("dino_head.examples") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


class Command(argparse.ArgumentParser):
    """The parser of `dino-head fit`, whose errors are one line."""

    def __init__(self) -> None:
        super().__init__(
            prog="dino-head fit",
            usage="dino-head fit --config NAME_OR_FILE [flags] [--full.path VALUE ...]",
            description="Trains as a recipe describes: model, data, Trainer and callbacks. Writes everything to the "
            "folder of the run.",
            epilog=f"""\
recipes: {", ".join(recipes())}

Set any other value by its full path, after the flags: --trainer.max_steps 100
Options of a class:        dino-head fit --config digits --model.help dino_head.examples.dino_module.DINO
Copy a recipe:             dino-head fit --config digits --print_config > mine.yaml
Resume a stopped run:      dino-head fit --resume --out DIR

Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 and --max-time save a checkpoint and stop (exit code 130, 143, 138, 140, 124).""",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="NAME_OR_FILE", help="name of a recipe, or a YAML file")
        self.add_argument(
            "--resume",
            action="store_true",
            help="resume the run in its folder, with its own settings; start it if there is no checkpoint yet",
        )
        for flag in FLAGS:
            self.add_argument(f"--{flag.name}", metavar=flag.metavar, type=flag.parse, help=flag.help)

    def error(self, message: str) -> NoReturn:
        """Exit with an error of one line."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def config_file(command: Command, name: str) -> Path:
    """File of the recipe of this name, or the file itself."""
    known = recipes()
    file = known.get(name, Path(name))
    if not file.is_file():
        command.error(f"argument --config: {name} is neither a file nor a recipe ({', '.join(known)})")
    return file


def rewritten(args: argparse.Namespace) -> dict[str, str]:
    """The given flags with the configuration in JSON that each sets, in the order of the table."""
    configs = {}
    for flag in FLAGS:
        value = getattr(args, flag.name.replace("-", "_"))
        if value is not None:
            nested: dict[str, Any] = {}
            for path, leaf in flag.rewrite(value).items():
                if not (args.stream and path.endswith(".eval_size")):  # streams have no held-out images
                    _put(nested, path.split("."), leaf)
            configs[f"--{flag.name} {value}"] = json.dumps(nested)
    return configs


def _put(nested: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        nested = nested.setdefault(name, {})
    nested[last] = value
