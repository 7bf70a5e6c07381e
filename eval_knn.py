"""Weighted k-NN on frozen features: how good is an encoder, without training anything?

    python eval_knn.py runs/dino-demo/last.pt                                  # on the data it was trained on
    python eval_knn.py dino_deitsmall16_pretrain.pth --data imagenet/          # the authors' weights
    torchrun --nproc-per-node=2 eval_knn.py runs/dino-demo/last.pt
    python eval_knn.py a.pt --hits a.npz; python eval_knn.py b.pt --against a.npz      # is b better than by chance?

A test image gets the label of its k nearest training images, each of which votes with exp(s / T), where s is the cosine
similarity and T = 0.07 (Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294, appendix F.1). Measured for the CLS token
and the mean patch token, and for two baselines that a trained encoder should beat: raw pixels (normalised by channel,
at most 32 x 32 of them), and the same network untrained. All come from one pass over the data. A network of up to 64 px
gets the whole image, a larger one its middle 7/8, as the authors' does. * marks what the method's authors read.

Differs from the authors' code: any number of test images and classes; k is at most the number of training images; no
process group is needed.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tools.convert import read_encoder

# isort: off
from vit import InputError, ViT  # 1 network
from vit import processes  # 3 training step
from vit import open_images, reading, resize_side  # 4 images
from vit import accuracy_error, features, knn_hits, pixels  # 5 evaluation
from vit import COUNT, DATA_HELP, DEVICE, MANY, PRECISION, cli, launch, options, to_json  # 7 runs

EVALUATION = dict(  # the options of every evaluation
    checkpoint=(None, "last.pt of a run, a file of weights/, the authors', timm's", dict(flag="checkpoint", nargs="?")),
    data=(None, f"{DATA_HELP} (what the run was trained on)"),
    img_size=(None, "input of the network, px (what the checkpoint says)", COUNT),
    heads=(None, "attention heads, for files of others, which do not tell", COUNT),
    batch=(256, "images at a time; in training, over all processes", COUNT),
    workers=(2, "processes that decode images, where a set does not fit into memory"),
    device=DEVICE,
    precision=PRECISION,
    seed=(0, "of weights, order, crops and of the choice of labels", dict(type=int)),
    limit=(None, "use at most so many training images, and as many test images", COUNT),
    json=(None, "also write the result, the last line, to this file", dict(metavar="FILE")),
)
OPTIONS = EVALUATION | dict(
    precision=("fp32", *PRECISION[1:]),
    k=((1, 5, 10, 20, 100, 200), "numbers of neighbours", COUNT | MANY),
    temperature=(0.07, "of the votes"),
    baselines=(True, "also measure raw pixels and the untrained network"),
    hits=(None, "write which test images were right to this .npz, for k = 20 (or the first k)", dict(metavar="FILE")),
    against=(None, "compare with such a file of another encoder, by McNemar's test", dict(metavar="FILE")),
)


def check_folders(args, *names):
    """Refuses files to write, options of these names, whose folder is not there."""
    for name in names:
        file = getattr(args, name)
        if file and not Path(file).absolute().parent.is_dir():
            raise InputError(f"--{name} {file}: no such folder")


def open_encoder(args):
    """The encoder in args.checkpoint and its config, with --img-size."""
    if not args.checkpoint:
        raise InputError("no checkpoint given; `python dino.py` makes one: runs/dino-demo/last.pt")
    vit, config = read_encoder(args.checkpoint, args.heads)
    if args.img_size:  # positions are interpolated once, and what is saved later has this size
        config["img_size"] = vit.config["img_size"] = [args.img_size] * 2
        grid = ViT.grid_of(config["img_size"], vit.patch)
        vit.pos_embed.data, vit.grid = vit.positions(grid).data.clone(), grid
    if len(set(config["img_size"])) > 1:
        raise InputError(f"{args.checkpoint} takes {config['img_size']} px, but images are cut square: give --img-size")
    check_folders(args, "json")
    return vit, config


def open_labelled(args, config, whole=False):
    """Labelled training and test images of the size that the network needs; fills in args.data. whole: open_images."""
    args.data = args.data or config.get("data", "demo.npz")
    sets = open_images(args.data, whole=whole)
    if any(s is None or s.labels is None for s in sets):
        needs = "two class folders, or labels in the .npz, and images enough to hold some out for testing"
        raise InputError(f"--data {args.data} cannot be tested on: this needs {needs}")
    if sets[0].channels != config["in_chans"]:
        raise InputError(f"{args.checkpoint} takes {config['in_chans']} channels, {args.data} has {sets[0].channels}")
    side, quiet = resize_side(config["img_size"]), processes()[0] > 0
    return [s.subset(args.limit or len(s)).at(side, quiet) for s in sets]


def shared_features(encode, images, *how):
    """vit.features, encoded by all processes, each its share. All must call this, and all get all rows."""
    rank, world = processes()
    if world == 1:
        return features(encode, images, *how)
    if len(images) < world:
        raise InputError(f"{len(images)} images are too few for {world} processes")
    return collect(features(encode, images.pick(range(rank, len(images), world)), *how), len(images))


def collect(mine, n):
    """All n rows, of which each process has every world-th from its rank on."""
    world = processes()[1]
    if world == 1:
        return mine
    mine = F.pad(mine, (0, 0) * (mine.ndim - 1) + (0, -(-n // world) - len(mine)))  # shares differ by one
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)[:n]


def mcnemar(a, b):
    """McNemar's exact test of two bool arrays (N,) over the same images: how often a alone and b alone are right, and
    the probability of a difference as large, or larger, if both were equally good.
    """
    alone = [int((a & ~b).sum()), int((b & ~a).sum())]
    tail = sum(math.comb(sum(alone), i) for i in range(min(alone) + 1))
    return *alone, min(1.0, 2 * tail / 2 ** sum(alone))


def report(task, args, config, results):
    """Prints the last line: one JSON object with the same keys for every evaluation; also to --json FILE."""
    result = dict(task=task, checkpoint=args.checkpoint, method=config.get("method"), data=args.data)
    result |= dict(args=vars(args), results=results)
    if processes()[0] == 0:
        print(to_json(result), flush=True)
        if args.json:
            Path(args.json).write_text(to_json(result) + "\n")
    return result


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv)
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature} is not above 0")
    check_folders(args, "hits")
    device, (rank, world) = launch(args), processes()
    vit, config = open_encoder(args)
    train, test = open_labelled(args, config)
    torch.manual_seed(args.seed)
    untrained, vit = ViT(**vit.config).eval().to(device), vit.to(device)

    def encode(x):  # all vectors of an image side by side
        parts = [pixels(x).float(), untrained.encode(x, config["feature"]).float()] if args.baselines else []
        widths[:] = [part.shape[1] for part in parts] + [vit.dim] * 2
        return torch.cat([*parts, vit.encode(x, "both").float()], dim=1)

    widths, names = [], ["pixels", "untrained"] * args.baselines + ["cls", "mean"]
    how = (config, device, args.precision, args.batch, args.workers)
    found = {s: shared_features(encode, x, *how) for s, x in (("train", train), ("test", test))}
    vectors = {s: dict(zip(names, x.split(widths, dim=1), strict=True)) for s, x in found.items()}
    labels, feature = dict(train=train.labels.to(device), test=test.labels.to(device)), config["feature"]
    if feature == "both":
        names.append(feature)
        for x in vectors.values():
            x["both"] = torch.cat([x["cls"], x["mean"]], dim=1)

    ks, results, mine = sorted({min(k, len(train)) for k in args.k}), {}, slice(rank, None, world)
    k, right = 20 if 20 in ks else ks[0], {}
    for name in names:  # each process finds the neighbours of its share of the test images
        x, y = vectors["test"][name][mine], labels["test"][mine]
        hits = knn_hits(vectors["train"][name], labels["train"], x, y, ks, args.temperature)
        hits = {k: collect(h[:, 0].byte(), len(test)).bool().cpu().numpy() for k, h in hits.items()}
        results[name], right[name] = {k: round(100 * h.mean(), 3) for k, h in hits.items()}, hits[k]
    if rank == 0:
        print(f"{'top-1, %':>9}" + "".join(f"{f'k={k}':>8}" for k in ks))
        for name, by_k in results.items():
            print(f"{name:>9}" + "".join(f"{v:8.2f}" for v in by_k.values()) + "  *" * (name == feature))
        accuracy = results[feature][k]
        error = accuracy_error(accuracy, len(test))
        print(f"this encoder (*) at k = {k}: {accuracy:.1f} ± {error:.1f} % of {len(test)} test images")
        if args.hits:
            with open(args.hits, "wb") as f:  # np.savez would add .npz to the name
                np.savez(f, **right, best=right[feature], labels=test.labels.numpy(), k=k)
    if args.against:
        with reading(args.against, "file of --hits"), np.load(args.against) as z:
            if int(z["k"]) != k or not np.array_equal(z["labels"], test.labels.numpy()):
                raise InputError(f"--against {args.against} is of other test images, or of k = {z['k']}")
            ours, theirs, p = mcnemar(right[feature], z["best"])
        results["against"] = dict(file=args.against, right_alone=ours, other_right_alone=theirs, p=p)
        if rank == 0:
            print(f"right alone: {ours}, {args.against} right alone: {theirs}; by chance with p = {p:.2g} (McNemar)")
    results |= dict(feature=feature, train=len(train), test=len(test))
    return report("knn", args, config, results)


if __name__ == "__main__":
    main()
