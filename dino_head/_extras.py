"""Import errors that name the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS = {  # the packages that each extra of pyproject.toml installs, by their import names
    "train": ("PIL", "datasets", "jsonargparse", "kornia", "matplotlib", "safetensors", "transformers"),
    "volumes": ("monai", "nibabel"),
    "examples": ("sklearn",),
}


@contextmanager
def packages_of_extras(user: str) -> Iterator[None]:
    """Turn a failed import inside the `with` block into an error that names the extra to install.

    Args:
        user: Name of the function or class that needs the packages, such as "dino_head.vision.dino_views".

    Raises:
        ModuleNotFoundError: If a package of an extra is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        for extra, packages in EXTRAS.items():
            if error.name in packages:
                message = f'{user} needs {error.name}: pip install "dino-head[{extra}]"'
                raise ModuleNotFoundError(message, name=error.name) from error
        raise
