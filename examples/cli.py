"""Any of the recipes from its YAML file, with Lightning's own command line.

python examples/cli.py fit --config examples/recipes/digits.yaml
python examples/cli.py fit --config examples/recipes/vits16_1gpu.yaml --data.data photos --trainer.max_epochs 50
python examples/cli.py fit --help        # and --model.help dino_module.DINO, --data.help fit_images.ImageData
"""

from dino_module import DINO
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

DESCRIPTION = (
    "Trains DINO as a YAML file says: model, data, Trainer and callbacks. Any value can be given here as well."
)


def main() -> LightningCLI:
    """Everything is in the file."""
    return LightningCLI(
        DINO,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,  # the file is kept by whoever wrote it
        parser_kwargs={"description": DESCRIPTION, "fit": {"description": DESCRIPTION}},
    )


if __name__ == "__main__":
    main()
