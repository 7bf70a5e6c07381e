"""Others' checkpoints of Vision Transformers as ours: the authors' (DINO, MAE, PCAE, SiameseIM), timm's, transformers'.

    python tools/convert.py dino_deitsmall16_pretrain.pth                  # writes dino_deitsmall16_pretrain-ours.pt
    python tools/convert.py vit.pth --heads 12 --out runs/theirs.pt
    python tools/convert.py model.safetensors                             # ViTModel, ViTMAE (pip install safetensors)

Evaluations and draw.py read these files themselves; --init takes what this writes. Wrappers' prefixes are stripped. The
vector to evaluate is the CLS token, or the mean patch token where there is no final norm (SiameseIM). Mean and std are
those of ImageNet. The number of attention heads is not in such files: those that are usual for the width are assumed.
What would be computed wrongly is refused: a missing tensor, one of another shape, and parts that our ViT does not have
although they change the output (fc_norm, register tokens, LayerScale, relative positions). Hugging Face's norms add
1e-12 to the variance where ours, like the authors', add 1e-6.
"""

import argparse
import re
import sys
from pathlib import Path, PurePath

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# isort: off
from vit import SIZES, InputError  # 1 network
from vit import note, reading  # 4 images
from vit import build_encoder, load_checkpoint, load_encoder, save_checkpoint  # 6 checkpoints
from vit import cli, options  # 7 runs

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
OTHERS = re.compile(
    r"^(blocks|fc_norm|norm_pre|patch_embed|cls_|reg|storage|dist_)|gamma|register|rel_pos|relative|rope"
)

HUGGING_FACE = (  # their names, of transformers 4 and 5, and ours; in this order
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^layernorm\.", "norm."),
    (r"^layers?\.", "blocks."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)


def from_hugging_face(weights):
    """The weights under timm's names; queries, keys and values become one matrix."""
    renamed = {}
    for name, tensor in weights.items():
        for theirs, ours in HUGGING_FACE:
            name = re.sub(theirs, ours, name)
        renamed[name] = tensor
    for name in [k for k in renamed if ".attn.q." in k]:
        parts = [name.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        renamed[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def load_file(file):
    """What a file of torch.save or of safetensors holds."""
    if not str(file).endswith(".safetensors"):
        return load_checkpoint(file, HARMLESS)
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(f"{file}: pip install safetensors first") from None
    with reading(file, "file of safetensors"):
        return safetensors.torch.load_file(file)


def read_encoder(file, heads=None):
    """The encoder in our file or another's, and its config, as load_encoder gives them: (vit, config)."""
    found = load_file(file)
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
        if any(k.startswith("embeddings.patch_embeddings") for k in weights):
            weights = from_hugging_face(weights)
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
