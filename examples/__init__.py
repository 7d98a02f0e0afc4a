"""DINO as a LightningModule, scripts that train it, and recipes: to read, run and copy."""
