"""Weighted k-NN on frozen features: how good is an encoder, without training anything?

    python eval_knn.py runs/dino-demo/last.pt                                  # on the data it was trained on
    python eval_knn.py dino_deitsmall16_pretrain.pth --data imagenet/          # the authors' weights
    torchrun --nproc-per-node=2 eval_knn.py runs/dino-demo/last.pt --dump features.npz

A test image is labelled by its k nearest training images, cosine similarity s, each voting with exp(s / T), T = 0.07
(Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294, appendix F.1). Measured for the CLS token, the mean patch token,
and two yardsticks that a trained encoder should beat: raw centred pixels, and the same network untrained.

Differs from the authors' code: any number of test images and classes, k is at most the number of training images, no
process group is needed; images above 64 px are resized to 8/7 of the input and cropped in the middle, as 256 to 224.
"""

import argparse
import json

import numpy as np
import torch
import torch.distributed as dist

from vit import DTYPES, InputError, ViT, cli, features, knn, launch, load_encoder, load_labelled


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", nargs="?", help="last.pt of a run, a file of weights/, or the authors' weights")
    add("--data", help="demo.npz, any .npz, cifar10, cifar100, or a folder of images (what the run was trained on)")
    add("--k", type=int, nargs="+", default=[1, 5, 10, 20, 100, 200], help="numbers of neighbours")
    add("--temperature", type=float, default=0.07, help="of the votes")
    add("--img-size", type=int, help="input of the network, px (what the checkpoint says)")
    add("--batch", type=int, default=256, help="images at a time")
    add("--workers", type=int, default=2, help="processes that decode images, where a set does not fit in memory")
    add("--device", help="cuda, mps or cpu (the first that is there)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="fp32",
        help="auto: bf16 if the hardware has it",
    )
    add("--dump", metavar="FILE", help="write features and labels to this .npz")
    args = p.parse_args(argv)
    if not args.checkpoint:
        raise InputError("no checkpoint given; `python dino.py` makes one: runs/dino-demo/last.pt")
    return args


def every(x):
    """A tensor of each process, all of one shape: a list."""
    if not dist.is_initialized():
        return [x]
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def gathered(rows, n):
    """Rows i, i + world, ... of every process, put back in order: (n, D). With one process: as they are."""
    if dist.is_initialized():
        rows = torch.cat([rows, rows[:1].expand(-(-n // dist.get_world_size()) - len(rows), -1)])
    return torch.stack(every(rows), dim=1).flatten(0, 1)[:n]


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

    torch.manual_seed(0)
    untrained = ViT(**vit.config | dict(img_size=config["img_size"])).eval().to(device)
    encoders = dict(pixels=(None, "mean"), untrained=(untrained, config["feature"]), trained=(vit.to(device), "both"))
    dtype = DTYPES[args.precision]
    result, dump, share = {}, {}, slice(rank, None, world)
    for name, (net, feature) in encoders.items():
        x = {}
        for split, images in sets.items():
            mine = images.pick(range(rank, len(images), world))
            found = features(net, mine, dict(config, feature=feature), device, dtype, args.batch, args.workers)
            x[split] = gathered(found, len(images))
        rows = {name: x}
        if name == "trained":  # one pass gives both read-outs
            rows = {row: {s: v.chunk(2, dim=1)[i] for s, v in x.items()} for i, row in enumerate(("cls", "mean"))}
            dump = {f"{s}_{row}": v.float().cpu().numpy() for row, x in rows.items() for s, v in x.items()}
        for row, x in rows.items():
            hits = knn(x["train"], labels["train"], x["test"][share], labels["test"][share], args.k, args.temperature)
            counts = torch.tensor([hits[k][0] for k in args.k], dtype=torch.float64) * len(labels["test"][share])
            if dist.is_initialized():
                dist.all_reduce(counts := counts.to(device))
            result[row] = {k: round(v, 3) for k, v in zip(args.k, (counts / len(labels["test"])).tolist(), strict=True)}
    if rank == 0:
        width = max(map(len, result))
        print(f"{'top-1, %':>{width}}" + "".join(f"  k={k:<5}" for k in args.k))
        for row, by_k in result.items():
            print(f"{row:>{max(width, 8)}}" + "".join(f"{v:8.2f}" for v in by_k.values()))
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
