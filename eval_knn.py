"""Weighted k-NN on frozen features: how good is an encoder, without training anything?

    python eval_knn.py runs/dino-demo/last.pt                                  # on the data it was trained on
    python eval_knn.py dino_deitsmall16_pretrain.pth --data imagenet/          # the authors' weights
    torchrun --nproc-per-node=2 eval_knn.py runs/dino-demo/last.pt --dump features.npz

A test image is labelled by its k nearest training images, cosine similarity s, each voting with exp(s / T), T = 0.07
(Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294, appendix F.1). Measured for the CLS token, the mean patch token,
and two yardsticks that a trained encoder should beat: raw pixels (standardised by channel, at most 32 x 32 of them),
and the same network untrained. A network of up to 64 px gets the whole image, a larger one its middle 7/8, as the
authors' does.

Differs from the authors' code: any number of test images and classes, k is at most the number of training images, no
process group is needed.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from vit import DTYPES, InputError, ViT, cli, knn, launch, load_encoder, load_labelled, positive, shared_features


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", nargs="?", help="last.pt of a run, a file of weights/, or the authors' weights")
    add("--data", help="demo.npz, any .npz, cifar10, cifar100, or a folder of images (what the run was trained on)")
    add("--k", type=positive, nargs="+", default=[1, 5, 10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="of the votes")
    add("--img-size", type=positive, help="input of the network, px (what the checkpoint says)")
    add("--batch", type=positive, default=256, help="images at a time")
    add("--workers", type=int, default=2, help="processes that decode images, where a set does not fit in memory")
    add("--device", help="cuda, mps or cpu (the first that is there)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="fp32",
        help="auto: bf16 if the hardware has it",
    )
    add("--dump", metavar="FILE", help="write train_cls, train_mean, train_labels, test_..., classes to this .npz")
    args = p.parse_args(argv)
    if not args.checkpoint:
        raise InputError("no checkpoint given; `python dino.py` makes one: runs/dino-demo/last.pt")
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature} is not above 0")
    if args.dump and not Path(args.dump).absolute().parent.is_dir():
        raise InputError(f"--dump {args.dump}: no such folder")
    return args


@cli
def main(argv=None):
    args = get_args(argv)
    device, rank, world = launch(args)
    vit, config = load_encoder(args.checkpoint, quiet=rank > 0)
    if args.img_size:
        config["img_size"] = [args.img_size] * 2
    args.data = args.data or config.get("data", "demo.npz")
    side = max(config["img_size"])
    side = side if side <= 64 else round(side * 8 / 7)
    sets = load_labelled(args, config, side, rank, world, "k-NN")
    labels = {s: x.labels.to(device) for s, x in sets.items()}

    ks = sorted({min(k, len(labels["train"])) for k in args.k})
    torch.manual_seed(0)
    untrained = ViT(**vit.config | dict(img_size=config["img_size"])).eval().to(device)

    def vectors(net, feature):
        """Of all images, by split."""
        how = (dict(config, feature=feature), device, DTYPES[args.precision], args.batch, args.workers)
        return {split: shared_features(net, images, *how) for split, images in sets.items()}

    def rows():
        yield "pixels", vectors(None, "mean")
        yield "untrained", vectors(untrained, config["feature"])
        both = vectors(vit.to(device), "both")  # one pass gives both read-outs
        for i, row in enumerate(("cls", "mean")):
            yield row, {s: v.chunk(2, dim=1)[i] for s, v in both.items()}

    def accuracy(x):
        """{k: percent}. Each process finds the neighbours of its share of the test images."""
        share = slice(rank, None, world)
        hits = knn(x["train"], labels["train"], x["test"][share], labels["test"][share], ks, args.temperature)
        right = torch.tensor([hits[k][0] for k in ks], dtype=torch.float64) * len(labels["test"][share])
        if dist.is_initialized():
            dist.all_reduce(right := right.to(device))
        return {k: round(v, 3) for k, v in zip(ks, (right / len(labels["test"])).tolist(), strict=True)}

    result, dump = {}, {}
    for row, x in rows():
        result[row] = accuracy(x)
        if args.dump and row in ("cls", "mean"):
            dump |= {f"{s}_{row}": v.float().cpu().numpy() for s, v in x.items()}
    if rank == 0:
        print(f"{'top-1, %':>9}" + "".join(f"{f'k={k}':>8}" for k in ks))
        for row, by_k in result.items():
            print(f"{row:>9}" + "".join(f"{v:8.2f}" for v in by_k.values()))
        if args.dump:
            dump |= {f"{s}_labels": v.cpu().numpy() for s, v in labels.items()}
            with open(args.dump, "wb") as f:
                np.savez(f, **dump, classes=sets["train"].classes)
        settings = dict(
            checkpoint=str(args.checkpoint), data=args.data, temperature=args.temperature, feature=config["feature"]
        )
        settings |= dict(img_size=config["img_size"], train=len(labels["train"]), test=len(labels["test"]))
        print(json.dumps(dict(knn=result, **settings)))
    return result


if __name__ == "__main__":
    main()
