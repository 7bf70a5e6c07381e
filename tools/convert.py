"""Others' checkpoints of Vision Transformers as ours: the authors' (DINO, MAE, PCAE, SiameseIM) and timm's.

    python tools/convert.py dino_deitsmall16_pretrain.pth                  # writes dino_deitsmall16_pretrain-ours.pt
    python tools/convert.py vit.pth --heads 12 --out runs/theirs.pt

Evaluations and draw.py read these files themselves; --init takes what this writes. Wrappers' prefixes are stripped. The
vector to evaluate is the CLS token, or the mean patch token where there is no final norm (SiameseIM). Mean and std are
those of ImageNet. The number of attention heads is not in such files: those that are usual for the width are assumed.
What would be computed wrongly is refused: a missing tensor, one of another shape, and parts that our ViT does not have
although they change the output (fc_norm, register tokens, LayerScale, relative positions).
"""

import argparse
import re
import sys
from pathlib import Path, PurePath

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from vit import (  # noqa: E402  # noqa: E402
    SIZES,
    InputError,
    build_encoder,
    cli,
    load_checkpoint,
    load_encoder,
    note,
    options,
    reading,
    save_checkpoint,
)

OPTIONS = dict(
    checkpoint=(None, "the file to convert", dict(flag="checkpoint")),
    out=(None, "the file to write (beside it)"),
    heads=(None, "attention heads (what is usual for the width)", dict(type=int)),
)
NUMPY = [np.float64().__reduce__()[0], np.zeros(1).__reduce__()[0]]  # what makes a number and an array from bytes
HARMLESS = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(k)) for k in "?bBhHiIlLqQefd")]
HARMLESS += [(f, f"numpy.{core}.multiarray.{f.__name__}") for core in ("core", "_core") for f in NUMPY]
HARMLESS += [(PurePath, f"pathlib.{name}Path") for name in ("Posix", "Windows", "_local.Posix")]
KEYS = ("encoder", "model", "model_state_dict", "state_dict", "teacher", "student", "net", "model_ema")
PREFIXES = re.compile(r"^((module|backbone|_orig_mod|teacher|student|encoder|model|vit|net|base_encoder)\.)+")
OTHERS = re.compile(r"^(blocks|fc_norm|norm_pre|patch_embed|cls_|reg|storage|dist_)|gamma|rel_pos|relative|rope")


def read_encoder(file, heads=None):
    """The encoder in our file or another's, and its config, as load_encoder gives them: (vit, config)."""
    found = load_checkpoint(file, HARMLESS)
    if isinstance(found, dict) and {"encoder", "config"} <= found.keys():
        return load_encoder(file)
    with reading(file, "ViT"):
        keys = list(found) if isinstance(found, dict) else []
        for key in KEYS:
            found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
        tensors = {k: v for k, v in found.items() if torch.is_tensor(v) and not v.is_complex()} if keys else {}
        weights = {PREFIXES.sub("", str(k)): v for k, v in tensors.items()}
        if len(weights) < len(tensors):
            raise InputError(f"{file} holds several networks whose names differ by a prefix: save one of them alone")
        if not {"pos_embed", "patch_embed.proj.weight"} <= weights.keys():
            what = f"no ViT: no pos_embed and patch_embed.proj.weight; its keys: {', '.join(map(str, keys[:8]))}"
            raise InputError(f"{file} holds {what}. Save its weights alone, torch.save(model.state_dict(), FILE)")
        config = read_shape(weights, heads)
        vit = build_encoder(file, weights, config)
        unused = sorted(weights.keys() - vit.state_dict().keys())
        wrong = [k for k in unused if OTHERS.search(k)]
        if wrong:
            raise InputError(f"{file}: {len(wrong)} tensors are of a network that is not this ViT: {wrong[:4]}")
    left = ", ".join(unused)[:200] or "nothing"
    note(f"{file}: all {len(vit.state_dict())} tensors of the ViT found; not used: {left}")
    note(f"  {config['heads']} attention heads assumed; --heads gives another number")
    return vit, config


def read_shape(weights, heads=None):
    """The config of a ViT, read off its weights."""
    dim, in_chans, patch, _ = weights["patch_embed.proj.weight"].shape
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch
    depth = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
    norm = "norm.weight" in weights
    heads = heads or next((s["heads"] for s in SIZES.values() if s["dim"] == dim), dim // 64)
    config = dict(img_size=[side, side], patch=patch, in_chans=in_chans, dim=dim, depth=depth, heads=heads)
    imagenet = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    return config | imagenet | dict(pos="learned", norm=norm, feature="cls" if norm else "mean")


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv)
    vit, config = read_encoder(args.checkpoint, args.heads)
    file = args.out or str(Path(args.checkpoint).with_suffix("")) + "-ours.pt"
    save_checkpoint(file, dict(encoder=vit.state_dict(), config=config))
    print(file)
    return file


if __name__ == "__main__":
    main()
