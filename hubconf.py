"""torch.hub entry points, each gives (vit, config): one for each file in weights/, and encoder(file) for
any other of ours (others': tools/convert.py)."""

import functools
import importlib.util
from pathlib import Path

dependencies = ["torch", "torchvision", "einops", "numpy", "PIL", "tqdm"]

here = Path(__file__).parent
spec = importlib.util.spec_from_file_location("ssl_vit", here / "vit.py")  # not "vit": the caller may have one too
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
encoder = module.load_encoder

for file in sorted((here / "weights").glob("*.pt")):
    globals()[file.stem.replace("-", "_")] = functools.partial(encoder, file)
