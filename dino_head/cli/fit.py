"""Any of the recipes from its YAML file, with Lightning's own command line.

python examples/cli.py fit --config examples/recipes/digits.yaml
python examples/cli.py fit --config examples/recipes/vits16_1gpu.yaml --data.data photos --trainer.max_epochs 50
python examples/cli.py fit --help
"""

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from dino_head.examples.dino_module import DINO

DESCRIPTION = (
    "Trains DINO as a YAML file says (fit --config FILE): model, data, Trainer and callbacks. Any value can be given "
    "here as well, after the file. The model is a dino_module.DINO, which has its own optimizer and no validation; its "
    "backbone may be a backbones.vit and its augmentation an augment.dino_views. The data are an image_data.ImageData "
    "or StreamData, a fit_volumes.Volumes or a fit_digits.Digits. --model.help dino_module.DINO and "
    "--data.help image_data.ImageData list their options."
)


def main() -> LightningCLI:
    """Everything is in the file."""
    return LightningCLI(
        DINO,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,  # the file is kept by whoever wrote it
        parser_kwargs={"description": DESCRIPTION, "fit": {"description": DESCRIPTION}},
    )


if __name__ == "__main__":
    main()
