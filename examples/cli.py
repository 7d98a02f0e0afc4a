"""The digits from a YAML file, with Lightning's own command line.

python examples/cli.py fit --config examples/digits.yaml
python examples/cli.py fit --config examples/digits.yaml --trainer.max_epochs 2 --model.learning_rate 1e-3
"""

from dino_module import DINO
from fit_digits import Digits
from lightning.pytorch.cli import LightningCLI


def main() -> LightningCLI:
    """Everything is in the file: model, data, Trainer and callbacks."""
    return LightningCLI(DINO, Digits, save_config_callback=None)  # the file is kept by whoever wrote it


if __name__ == "__main__":
    main()
