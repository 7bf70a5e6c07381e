"""Weighted k-NN on frozen features: how good is an encoder, without training anything?

    python eval_knn.py runs/dino-demo/last.pt                                  # on the data it was trained on
    python eval_knn.py dino_deitsmall16_pretrain.pth --data imagenet/          # the authors' weights
    torchrun --nproc-per-node=2 eval_knn.py runs/dino-demo/last.pt --dump features.npz

A test image gets the label of its k nearest training images, each of which votes with exp(s / T), where s is the cosine
similarity and T = 0.07 (Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294, appendix F.1). Measured for the CLS token
and the mean patch token, and for two baselines that a trained encoder should beat: raw pixels (normalised by channel,
at most 32 x 32 of them), and the same network untrained. All come from one pass over the data. A network of up to 64 px
gets the whole image, a larger one its middle 7/8, as the authors' does. * marks what the method's authors read.

Differs from the authors' code: any number of test images and classes; k is at most the number of training images; no
process group is needed.
"""

from pathlib import Path

import numpy as np
import torch

from eval_linear import EVALUATION, open_encoder, open_labelled, report

# isort: off
from vit import InputError, ViT  # 1 network
from vit import mean_over_processes, processes  # 4 training step
from vit import features, knn, pixels  # 5 evaluation
from vit import COUNT, MANY, PRECISION, cli, launch, options  # 7 runs

OPTIONS = EVALUATION | dict(
    precision=("fp32", *PRECISION[1:]),
    k=((1, 5, 10, 20, 100, 200), "numbers of neighbours", COUNT | MANY),
    temperature=(0.07, "of the votes"),
    baselines=(True, "also measure raw pixels and the untrained network"),
    dump=(None, "write train_cls, train_mean, train_labels, test_..., classes to this .npz", dict(metavar="FILE")),
)


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv)
    if args.temperature <= 0:
        raise InputError(f"--temperature {args.temperature} is not above 0")
    if args.dump and not Path(args.dump).absolute().parent.is_dir():
        raise InputError(f"--dump {args.dump}: no such folder")
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
    found = {s: features(encode, x, *how) for s, x in (("train", train), ("test", test))}
    vectors = {s: dict(zip(names, x.split(widths, dim=1), strict=True)) for s, x in found.items()}
    labels = dict(train=train.labels.to(device), test=test.labels.to(device))

    ks, results, mine = sorted({min(k, len(train)) for k in args.k}), {}, slice(rank, None, world)
    for name in names:  # each process finds the neighbours of its share of the test images
        x, y = vectors["test"][name][mine], labels["test"][mine]
        hits = knn(vectors["train"][name], labels["train"], x, y, ks, args.temperature)
        right = torch.tensor([hits[k][0] for k in ks], device=device) * len(y) * world / len(test)
        results[name] = {k: round(v, 3) for k, v in zip(ks, mean_over_processes(right).tolist(), strict=True)}
    if rank == 0:
        print(f"{'top-1, %':>9}" + "".join(f"{f'k={k}':>8}" for k in ks))
        for name, by_k in results.items():
            print(f"{name:>9}" + "".join(f"{v:8.2f}" for v in by_k.values()) + "  *" * (name == config["feature"]))
        if args.dump:
            dump = {f"{s}_{n}": x[n].cpu().numpy() for s, x in vectors.items() for n in ("cls", "mean")}
            dump |= {f"{s}_labels": y.cpu().numpy() for s, y in labels.items()}
            with open(args.dump, "wb") as f:
                np.savez(f, **dump, classes=train.classes)
    results |= dict(feature=config["feature"], train=len(train), test=len(test))
    return report("knn", args, config, results)


if __name__ == "__main__":
    main()
