"""Does it know where things are? Segmentation from attention, and a linear read-out of patch tokens against masks.

    python eval_dense.py runs/dino-demo/last.pt                        # demo.npz has the masks of its shapes
    python eval_dense.py weights/dino-nano4-cifar10.pt --data voc/     # voc/images/x.jpg with voc/masks/x.png

Attention (DINO, arXiv 2104.14294, section 4.2.2 and Figure 4): the CLS token's attention in the last block, of each
head the patches that hold 60 % of the mass, against the mask of everything that is not background: Jaccard index, of
the best head of each image, mean over images. Beside it the same of an untrained network. DINO on VOC12: 45.9, random
22.0.

Read-out: a linear layer (batch-normalised input, as in eval_linear.py; SGD, one rate for all blocks, not tuned) on the
patch tokens after each block predicts the commonest class of the patch; its patches, enlarged, against the mask: IoU of
every class in an image, mean over these and then over images. Trained on the training images, or on nine of ten pairs
where there is one folder.

Masks: palette or grey PNG files whose values are classes, 0 background, 255 left out; masks/a/x.png is that of
images/a/x.jpg, upright as the image is shown. Both are resized and cropped alike. Ours throughout where the paper gives
no protocol (it reports no linear read-out).
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from eval_linear import batches, train_heads
from vit import (
    BROKEN,
    InputError,
    ViT,
    cli,
    decode,
    launch,
    list_images,
    load_encoder,
    load_images,
    positive,
    prepare,
    spaced,
    square,
)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", nargs="?", help="last.pt of a run, a file of weights/, or the authors' weights")
    add("--data", default="demo.npz", help="demo.npz, or a folder with images/ and masks/")
    add("--mass", type=float, default=0.6, help="share of the attention that the mask of a head holds")
    add("--pairs", type=positive, default=1000, help="at most so many images and masks to train on, and to test on")
    add("--img-size", type=positive, help="input of the network, px (what the checkpoint says)")
    add("--device", help="cuda, mps or cpu (the first that is there)")
    p.set_defaults(precision="fp32")
    args = p.parse_args(argv)
    if not args.checkpoint:
        raise InputError("no checkpoint given; `python dino.py` makes one: runs/dino-demo/last.pt")
    return args


# -------------------------------------------------------------------------------------------------------------- pairs


def load_pairs(data, side, count):
    """Images (n, C, S, S) uint8 and masks (n, S, S) int64 of training and test: {"train": (x, m), "test": (x, m)}."""
    path = Path(data)
    if path.name == "demo.npz":
        file = path if path.exists() else Path(__file__).with_name("demo.npz")
        with np.load(file) as z:
            masks = {s: np.unpackbits(z[f"{s}_masks"], axis=1).reshape(-1, 1, 32, 32) for s in ("train", "test")}
        out = {}
        for split, m in masks.items():
            m = F.interpolate(torch.from_numpy(m).float(), size=(side, side), mode="nearest")[:, 0].long()
            out[split] = load_images(str(file), split, side, quiet=True).pixels[:count], m[:count]
        return out
    if not (path / "images").is_dir() or not (path / "masks").is_dir():
        raise InputError(f"--data {data}: no folder with images/ and masks/ (nor demo.npz)")
    named = lambda kind: {os.path.splitext(os.path.relpath(f, path / kind))[0]: f for f in list_images(path / kind)}
    images, masks = named("images"), named("masks")
    pairs = [(f, masks[name]) for name, f in images.items() if name in masks]
    if not pairs:
        raise InputError(f"no file in {path / 'images'} has a mask of the same folder and name in {path / 'masks'}")
    read, skipped = [], 0
    for image, mask in [pairs[i] for i in spaced(len(pairs), count + max(1, count // 9))]:
        try:
            x, m = decode(image, side), read_mask(mask, side)
            if max(abs(a - b) for a, b in zip(x.shape[1:], m.shape, strict=True)) > 2:  # two for rounding
                raise ValueError("its mask has another shape: turned?")
            read.append((square(x), square(m)))
        except BROKEN as e:
            skipped += 1
            print(f"skipped {image} ({type(e).__name__}: {e})", file=sys.stderr)
    if len(read) < 2:
        raise InputError(f"--data {data}: fewer than two pairs can be read ({skipped} were skipped)")
    test = [i for i in range(len(read)) if i % 10 == 9] or [len(read) - 1]
    parts = dict(train=[i for i in range(len(read)) if i not in test], test=test)
    return {s: tuple(torch.stack([read[i][k] for i in index]) for k in (0, 1)) for s, index in parts.items()}


def read_mask(file, side):
    """A mask file as int64 (h, w), classes as stored, its short side resized to `side` px without mixing them."""
    with Image.open(file) as img:
        if img.mode not in ("P", "L", "1", "I", "I;16"):
            raise ValueError(f"mode {img.mode}: a mask is a palette or grey image")
        mask = torch.from_numpy(np.asarray(img).astype(np.int64))
    h, w = mask.shape
    size = (side, max(side, round(w * side / h))) if h <= w else (max(side, round(h * side / w)), side)
    return F.interpolate(mask[None, None].double(), size=size, mode="nearest-exact")[0, 0].long()


# ----------------------------------------------------------------------------------------------------------- attention


def attention_mask(maps, mass=0.6):
    """The patches that hold `mass` of the attention, largest first (Figure 4). maps (..., N) -> bool (..., N)."""
    value, order = (maps / maps.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    keep = value.cumsum(dim=-1) - value < mass  # up to and including the one that reaches it
    return torch.zeros_like(keep).scatter(-1, order, keep)


def jaccard(found, wanted, valid):
    """Intersection over union of bool masks (..., S, S), pixels outside `valid` left out: (...)."""
    both, either = (found & wanted & valid).sum((-2, -1)), ((found | wanted) & valid).sum((-2, -1))
    return both / either.clamp(min=1)


@torch.no_grad()
def from_attention(vit, imgs, masks, config, mass, device):
    """Jaccard index of the best head of each image that has a foreground: (images,)."""
    out, h = [], ViT.grid_of(config["img_size"], vit.patch)[0]
    for x, m in zip(imgs.split(50), masks.split(50), strict=True):
        x, m = prepare(x.to(device), config["img_size"], config["mean"], config["std"]), m.to(device)[:, None]
        keep = attention_mask(vit.attention(x)[:, :, 0, 1:], mass)
        keep = F.interpolate(rearrange(keep, "b n (h w) -> b n h w", h=h).float(), size=m.shape[-2:]) > 0.5
        foreground = (m > 0) & (m != 255)
        best = jaccard(keep, foreground, m != 255).amax(dim=1)
        out.append(best[foreground.flatten(1).any(dim=1)].cpu())
    return torch.cat(out)


# ------------------------------------------------------------------------------------------------------------- read-out


@torch.no_grad()
def by_block(vit, imgs, config, device):
    """Patch tokens after each block, through the final norm: yields (n, N, D), one depth held at a time."""
    size = (config["img_size"], config["mean"], config["std"])
    x = torch.cat([vit.embed(prepare(part.to(device), *size)) for part in imgs.split(50)])
    for block in vit.blocks:
        x = torch.cat([block(part) for part in x.split(50)])
        yield vit.norm(x)[:, 1:].float()


def patch_labels(masks, grid, classes):
    """The commonest class of each patch, (n, S, S) -> (n, N); 255 where every pixel is left out."""
    share = lambda c: F.adaptive_avg_pool2d((masks == c).float(), grid).flatten(1)
    count = torch.stack([share(c) for c in range(classes)], dim=1)
    return count.argmax(dim=1).where(count.sum(dim=1) > 0, 255)


def mean_iou(found, wanted, classes):
    """IoU of every class that is in the found or the wanted mask (S, S), mean over these; 255 is left out."""
    valid = wanted != 255
    seen = [c for c in range(classes) if ((wanted == c) | (found == c))[valid].any()]
    return sum(jaccard(found == c, wanted == c, valid).item() for c in seen) / max(1, len(seen))


def read_out(train, y, test, masks, grid, classes, device):
    """Mean IoU of a linear layer on the patch tokens of one depth: (test images,).

    train, test (n, N, D): tokens. y (n·N,): labels of the training patches. masks (n, S, S): of the test images.
    """
    x = train.flatten(0, 1)
    x, y = x[y != 255], y[y != 255]
    batch = min(1024, len(x))
    total = max(200, 5 * (len(x) // batch))
    steps = ((x[i], y[i]) for i, _ in batches(len(x), batch, 0, total, 0, 0, 1))
    head = train_heads(steps, total, x.shape[1], classes, [0.1], batch, device)
    found = head(test.flatten(0, 1))[0].argmax(dim=-1).cpu()
    found = rearrange(found, "(b h w) -> b 1 h w", h=grid[0], w=grid[1]).float()
    found = F.interpolate(found, size=masks.shape[-2:])[:, 0].long()
    return torch.tensor([mean_iou(f, m, classes) for f, m in zip(found, masks, strict=True)])


@cli
def main(argv=None):
    args = get_args(argv)
    device, _, _ = launch(args)
    vit, config = load_encoder(args.checkpoint, quiet=True)
    config["img_size"] = [args.img_size] * 2 if args.img_size else config["img_size"]
    if config["img_size"][0] != config["img_size"][1]:
        raise InputError(f"{args.checkpoint} takes {config['img_size']} px: give one --img-size, masks are square here")
    if config["in_chans"] != 3:
        raise InputError(f"{args.checkpoint} takes {config['in_chans']} channels, the images here have 3")
    pairs = load_pairs(args.data, config["img_size"][0], args.pairs)
    values = torch.cat([torch.zeros(1).long(), *(m.unique() for _, m in pairs.values())]).unique()
    values = values[values != 255]
    pairs = {s: (x, torch.searchsorted(values, m).where(m != 255, 255)) for s, (x, m) in pairs.items()}  # 0, 1, 2, ...
    classes = len(values)
    if classes > 255:
        raise InputError(f"--data {args.data}: {classes} different values in the masks: classes are meant, 255 at most")
    if classes == 1:
        raise InputError(f"--data {args.data}: nothing but 0 in the masks (255 is left out: mark the object with 1)")
    grid = ViT.grid_of(config["img_size"], vit.patch)
    labels = torch.cat([patch_labels(m, grid, classes) for m in pairs["train"][1].split(50)]).flatten().to(device)
    torch.manual_seed(0)
    nets = {
        "untrained": ViT(**vit.config | dict(img_size=config["img_size"])).to(device).eval(),
        "trained": vit.to(device),
    }
    result = dict(checkpoint=str(args.checkpoint), method=config.get("method"), data=args.data, classes=classes)
    error = lambda v: round(100 * (v.std() / len(v) ** 0.5).item(), 2) if len(v) > 1 else 0.0
    for name, net in nets.items():
        seen = from_attention(net, *pairs["test"], config, args.mass, device)
        tokens = (by_block(net, pairs[split][0], config, device) for split in ("train", "test"))
        by_depth = [
            read_out(a, labels, b, pairs["test"][1], grid, classes, device) for a, b in zip(*tokens, strict=True)
        ]
        numbers = [round(100 * v.mean().item(), 2) for v in (seen, *by_depth)]
        print(f"{name:9}  attention, Jaccard of the best head {numbers[0]:5.2f} ± {error(seen):.2f} %")
        print(f"{'':9}  linear read-out, mean IoU by block: {' '.join(f'{v:5.2f}' for v in numbers[1:])} %")
        prefix = "" if name == "trained" else "untrained_"
        result |= {
            f"{prefix}jaccard": numbers[0],
            f"{prefix}dense_by_block": numbers[1:],
            f"{prefix}dense": numbers[-1],
        }
        result |= {f"{prefix}error": error(by_depth[-1])}
    result |= dict(train=len(pairs["train"][0]), test=len(pairs["test"][0]))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
