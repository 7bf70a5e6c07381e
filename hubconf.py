"""torch.hub entry points, each gives (vit, config): one for each file in weights/, and encoder(file) for any other."""

import functools
from pathlib import Path

from vit import load_encoder as encoder

dependencies = ["torch", "torchvision", "einops", "numpy", "PIL", "tqdm"]

for file in sorted((Path(__file__).parent / "weights").glob("*.pt")):
    globals()[file.stem.replace("-", "_")] = functools.partial(encoder, file, quiet=True)
