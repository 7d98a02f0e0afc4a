"""DINO as a LightningModule, scripts that fit it, and recipes: to be read, run and copied."""
