"""torch.hub entry points, each gives (vit, config): one for each file in weights/, and encoder(file) for any other."""

import functools
from pathlib import Path

from vit import load_encoder

dependencies = ["torch", "torchvision", "einops", "numpy", "PIL", "tqdm"]


def encoder(file, **options):
    """The encoder in a checkpoint, ours, the authors' or timm's, and its config; see vit.load_encoder."""
    return load_encoder(file, **options)


for file in sorted((Path(__file__).parent / "weights").glob("*.pt")):
    globals()[file.stem.replace("-", "_")] = functools.partial(encoder, file, quiet=True)
del file
