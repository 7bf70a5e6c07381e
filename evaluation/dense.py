"""Does it know where things are? Segmentation from attention, and by a linear layer on patch tokens, against masks.

    python evaluation/dense.py runs/dino-demo/last.pt                        # demo.npz has the masks of its shapes
    python evaluation/dense.py weights/dino-nano4-cifar10.pt --data voc/     # voc/images/x.jpg with voc/masks/x.png
    python evaluation/dense.py runs/dino-demo/last.pt --train voc/train --test voc/val    # official splits

Attention (DINO, arXiv 2104.14294, section 4.2.2 and Figure 4): in the last block, the patches that hold 60 % of a
head's CLS attention are compared with the foreground (nothing is trained). Reported: Jaccard index of each image's best
head, mean over images with a foreground (training and test, or --test alone); the same of an untrained network. DINO
ViT-S/16 on the validation images of VOC12: 45.9, random 22.0.

Linear features: after each block a linear layer (batch-normalised input, SGD, the rate chosen on a tenth of the
training patches) predicts the commonest class of each patch. The enlarged prediction is compared with the mask. miou:
mean over classes of the IoU summed over all test images. dense: mean IoU of each image, then over images. Without
official splits every tenth pair is for testing.

Masks: palette or grey PNG files whose values are classes, 0 background, 255 left out; masks/a/x.png is that of
images/a/x.jpg, upright as the image is shown. Both are resized and cropped alike. The linear part is our protocol: the
paper reports none.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_knn import EVALUATION, open_encoder, report
from linear import RATES, accuracies, train_heads

# isort: off
from vit import InputError, ViT  # 1 network
from vit import batches, decode, list_images, open_images, prepare, reading, square  # 4 images
from vit import attention_mask  # 5 evaluation
from vit import SHARE, cli, launch, options  # 7 runs

OPTIONS = {k: row for k, row in EVALUATION.items() if k not in ("batch", "workers", "precision")} | dict(
    data=(None, "demo.npz, or a folder with images/ and masks/ (demo.npz)"),
    train=(None, "the folder to train on, with images/ and masks/, together with --test"),
    test=(None, "the folder to test on"),
    limit=(1000, "at most so many pairs of each split (of --data: twice as many, then split)", dict(type=int)),
    mass=(0.6, "share of the attention that the mask of a head holds", SHARE),
)

# pairs of images and masks -------------------------------------------------------------------------------------------


def load_demo(side, count):
    """The demo set's images (n, C, S, S) and masks (n, S, S), of training and test."""
    with np.load(Path(__file__).resolve().parents[1] / "demo.npz") as z:
        for split, images in zip(("train", "test"), open_images(), strict=True):
            mask = torch.from_numpy(np.unpackbits(z[f"{split}_masks"], axis=1).reshape(-1, 1, 32, 32))
            mask = F.interpolate(mask.float(), size=(side, side), mode="nearest")[:, 0].long()
            images = images.at(side)
            yield torch.stack([images.read(i) for i in range(min(count, len(images)))]), mask[:count]


def load_pairs(folder, side, count):
    """At most `count` images (n, C, S, S) uint8 and masks (n, S, S) int64 of a folder with images/ and masks/."""
    path = Path(folder)
    if not (path / "images").is_dir() or not (path / "masks").is_dir():
        raise InputError(f"{folder}: no folder with images/ and masks/ (nor demo.npz)")
    stem = lambda file, kind: os.path.splitext(os.path.relpath(file, path / kind))[0]
    images, masks = ({stem(f, kind): f for f in list_images(path / kind)} for kind in ("images", "masks"))
    pairs = [(f, masks[name]) for name, f in images.items() if name in masks]
    if not pairs:
        raise InputError(f"no file in {path / 'images'} has a mask of the same folder and name in {path / 'masks'}")
    read = []
    chosen = np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)
    for image, mask in (pairs[i] for i in chosen):
        try:
            x, m = decode(image, side), read_mask(mask, side)
            differ = [abs(a - b) for a, b in zip(x.shape[1:], m.shape, strict=True)]
            if max(differ) > 2:  # two for rounding
                raise InputError(f"{image}: its mask has another shape: turned?")
            read.append((square(x), square(m)))
        except InputError as e:
            print(f"skipped {e}", file=sys.stderr)
    if len(read) < 2:
        raise InputError(f"{folder}: fewer than two pairs can be read")
    return tuple(torch.stack(part) for part in zip(*read, strict=True))


def read_mask(file, side):
    """A mask file as int64 (h, w), classes as stored, its short side resized to `side` px without mixing them."""
    with reading(file, "mask"), Image.open(file) as img:
        if img.mode not in ("P", "L", "1", "I", "I;16"):
            raise InputError(f"{file} has mode {img.mode}: a mask is a palette or grey image")
        mask = torch.from_numpy(np.asarray(img).astype(np.int64))
        if mask.min() < 0:
            raise InputError(f"{file} has values below 0: those of a mask are classes, 0 background, 255 left out")
        size = [max(side, round(s * side / min(mask.shape))) for s in mask.shape]
        return F.interpolate(mask[None, None].double(), size=size, mode="nearest-exact")[0, 0].long()


def load_splits(args, side):
    """Training and test pairs, classes numbered from 0 (255: left out), and the number of classes."""
    if args.train or args.test:
        if not (args.train and args.test) or args.data:
            raise InputError("--train and --test: give both, or --data")
        pairs = [load_pairs(folder, side, args.limit) for folder in (args.train, args.test)]
    elif Path(args.data or "demo.npz").name == "demo.npz":
        pairs = list(load_demo(side, args.limit))
    else:
        x, m = load_pairs(args.data, side, 2 * args.limit)
        every = min(10, len(x))
        test = torch.arange(len(x)) % every == every - 1
        pairs = [(x[~test], m[~test]), (x[test], m[test])]
    values = torch.cat([m.unique() for _, m in pairs])
    values = torch.tensor(sorted({0, *values.tolist()} - {255}))
    if values.tolist() == [0] and any((m == 255).any() for _, m in pairs):
        raise InputError("masks of 0 and 255 alone: 255 is left out of all measures, store the foreground as 1")
    if not 1 < len(values) <= 255:
        raise InputError(f"{len(values)} classes besides 255 in masks of {args.data or args.train}: 2 to 255 needed")
    number = lambda m: torch.searchsorted(values, m).where(m != 255, 255)
    return [(x, number(m)) for x, m in pairs], len(values)


# attention -----------------------------------------------------------------------------------------------------------


def overlaps(found, wanted, valid):
    """Intersection and union of bool masks (..., S, S), pixels outside `valid` left out: two (...)."""
    both, either = found & wanted & valid, (found | wanted) & valid
    return both.sum((-2, -1)), either.sum((-2, -1))


@torch.no_grad()
def from_attention(vit, imgs, masks, config, mass, device):
    """Jaccard index of the best head of each image that has a foreground: (images,)."""
    out = []
    for x, m in zip(imgs.split(50), masks.split(50), strict=True):
        x, m = prepare(x.to(device), config), m.to(device)[:, None]
        maps = vit.attention(x, queries=1)[:, :, 0, 1:]  # (B, H, N)
        kept = attention_mask(maps, mass).unflatten(2, vit.grid)
        kept = F.interpolate(kept.float(), size=m.shape[-2:]) > 0.5
        foreground = (m > 0) & (m != 255)
        both, either = overlaps(kept, foreground, m != 255)
        best = (both / either.clamp(min=1)).amax(dim=1)
        out.append(best[foreground.flatten(1).any(dim=1)].cpu())
    return torch.cat(out)


# linear features -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_block(vit, imgs, config, device):
    """Yields the tokens (n, 1+N, D) after each block, before the final norm: the same tensor, overwritten each time."""
    x = torch.cat([vit.embed(prepare(part.to(device), config)) for part in imgs.split(50)])
    for block in vit.blocks:
        for part in x.split(50):
            part.copy_(block(part))
        yield x


def patch_labels(masks, grid, classes):
    """The commonest class of each patch, (n, S, S) -> (n, N); 255 where every pixel is left out."""
    share = lambda c: F.adaptive_avg_pool2d((masks == c).float(), grid).flatten(1)
    count = torch.stack([share(c) for c in range(classes)], dim=1)
    return count.argmax(dim=1).where(count.sum(dim=1) > 0, 255)


def mean_iou(both, either):
    """Mean IoU over the classes that occur, of intersections and unions (..., classes): (...)."""
    seen = either > 0
    iou = both.double() / either.clamp(min=1)
    return (iou * seen).sum(-1) / seen.sum(-1).clamp(min=1)


def class_overlaps(predicted, masks, classes):
    """Intersection and union of each class in each image: two (n, classes). predicted (n, h, w), masks (n, S, S)."""
    c, parts = torch.arange(classes).view(1, -1, 1, 1), []
    for p, m in zip(predicted[:, None].split(20), masks[:, None].split(20), strict=True):
        p = F.interpolate(p.float(), size=m.shape[-2:])
        parts.append(overlaps(p == c, m == c, m != 255))
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def linear_features(vit, train, y, test, masks, classes, device):
    """Mean IoU of a linear layer on the patch tokens of one depth: of each test image (n,), of all images (float).

    train, test (n, 1+N, D): tokens. y (n·N,): labels of the training patches. masks (n, S, S): of the test images.
    """
    tokens, dim = train.shape[1:]
    labelled = (y != 255).nonzero()[:, 0]
    n = len(labelled)
    if n < 10:
        raise InputError(f"{n} patches of the training masks are not 255: too few to train on")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    labelled = labelled[order.to(device)]
    kept = n - n // 10

    def take(rows):  # normed tokens and labels of some patches: copying all at once would double the memory
        place = rows + rows // (tokens - 1) + 1  # each image has a CLS token before its patches
        return vit.norm(train.view(-1, dim)[place]).float(), y[rows]

    def fit(n, rates):  # on the first n labelled patches
        batch = min(1024, n)
        total = max(200, 5 * (n // batch))
        pairs = (take(labelled[i]) for i in batches(n, batch, 0, total, 0))
        return train_heads(pairs, total, dim, classes, rates, batch, device)

    norm, weight, bias = fit(kept, RATES)
    x, wanted = take(labelled[kept:])
    tried = accuracies(norm(x) @ weight + bias, wanted)
    best = RATES[tried.index(max(tried))]

    norm, weight, bias = fit(n, [best])
    predicted = []
    for x in test:
        logits = norm(vit.norm(x[1:]).float()) @ weight[0] + bias[0]  # (N, classes)
        predicted.append(logits.argmax(dim=-1).cpu().view(vit.grid))
    both, either = class_overlaps(torch.stack(predicted), masks, classes)
    return mean_iou(both, either), mean_iou(both.sum(0), either.sum(0)).item()


def percent(x):
    return round(100 * float(x), 2)


def standard_error(x):
    """Of the mean of x (n,), in percent."""
    return percent(x.std() / len(x) ** 0.5) if len(x) > 1 else 0.0


def measure(net, train, test, labels, classes, config, args, device):
    """All numbers of one network, as a dict. labels: of the training patches."""
    pairs = [test] if args.test else [train, test]
    jaccard = torch.cat([from_attention(net, *pair, config, args.mass, device) for pair in pairs])
    found = dict(jaccard=percent(jaccard.mean()), jaccard_error=standard_error(jaccard), jaccard_images=len(jaccard))
    by_image, of_all = [], []
    blocks = zip(by_block(net, train[0], config, device), by_block(net, test[0], config, device), strict=True)
    for tokens, test_tokens in blocks:
        ious, miou = linear_features(net, tokens, labels, test_tokens, test[1], classes, device)
        by_image.append(percent(ious.mean()))
        of_all.append(percent(miou))
    found |= dict(dense_by_block=by_image, miou_by_block=of_all, dense=by_image[-1], miou=of_all[-1])
    return found | dict(error=standard_error(ious))


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv, precision="fp32")
    if args.limit < 2 or not args.mass:
        raise InputError("--limit must be 2 or more, --mass above 0")
    device = launch(args, alone=True)
    vit, config = open_encoder(args)
    if config["in_chans"] != 3:
        raise InputError(f"{args.checkpoint} takes {config['in_chans']} channels, the images here have 3")
    (train, test), classes = load_splits(args, config["img_size"][0])
    args.data = args.data or args.test or "demo.npz"
    labels = torch.cat([patch_labels(m, vit.grid, classes) for m in train[1].split(50)])
    labels = labels.flatten().to(device)
    torch.manual_seed(args.seed)
    nets = dict(untrained=ViT(**vit.config).to(device).eval(), trained=vit.to(device))
    results = dict(classes=classes, train=len(train[0]), test=len(test[0]))
    for name, net in nets.items():
        found = measure(net.requires_grad_(False), train, test, labels, classes, config, args, device)
        print(f"{name:9}  attention, Jaccard of the best head {found['jaccard']:5.2f} ± {found['jaccard_error']:.2f} %")
        for key, what in dict(dense="by image", miou="of all").items():
            numbers = " ".join(f"{v:5.2f}" for v in found[f"{key}_by_block"])
            print(f"{'':9}  linear, mean IoU {what}, by block: {numbers} %")
        results |= {k if name == "trained" else f"untrained_{k}": v for k, v in found.items()}
    return report("dense", args, config, results)


if __name__ == "__main__":
    main()
