"""Vectors of your own image files from any checkpoint, for search or clustering; or their classes, from a classifier.

    python tools/embed.py weights/dino-cifar10.pt photos/ --out vectors.npz
    python tools/embed.py weights/mae-cifar10.pt photos/ --out vectors.npz --feature both --layers 4
    python tools/embed.py probe/classifier.pt photos/ --out classes.csv     # of evaluation/linear.py or finetune.py

FILE.npz holds `vectors`, float32 (N, D); `files`, the N files below the folder that they belong to, in the same order;
and `unreadable`, the files that could not be read. Vectors are compared by their cosine. FILE.csv has the columns file,
class, probability.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))
from eval_knn import EVALUATION, open_encoder  # noqa: E402
from linear import Classifier, load_classifier  # noqa: E402
from vit import Images, InputError, cli, features, launch, list_images, options, resize_side  # noqa: E402

OPTIONS = {k: row for k, row in EVALUATION.items() if k not in ("data", "limit", "json", "seed")} | dict(
    folder=(None, "a folder of image files, at any depth", dict(flag="folder")),
    out=("vectors.npz", "the file to write: .npz, or .csv for the classes of a classifier"),
    feature=(None, "the vector (what the method's authors evaluate)", dict(choices=("cls", "mean", "both"))),
    layers=(1, "those of so many last blocks, side by side", dict(type=int)),
)
PART = 1000  # files that are decoded at a time


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv, json=None)
    device = launch(args, alone=True)
    vit, config = open_encoder(args)
    files = list_images(args.folder)
    if not files:
        raise InputError(f"no images in {args.folder}")
    if config["in_chans"] != 3:
        raise InputError(f"images have 3 channels, but the network takes {config['in_chans']}")
    if not Path(args.out).absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: no such folder")
    classify, classes = args.out.endswith(".csv"), config.get("classes")
    if classify and not classes:
        raise InputError(f"--out {args.out}: a .csv needs a classifier, which evaluation/linear.py --out makes")
    if classify:
        net = load_classifier(args.checkpoint, vit, classes).to(device)
        encode = lambda x: net(x).float().softmax(dim=-1)
    else:
        encode = Classifier(vit, 1, args.feature or config["feature"], args.layers).to(device).eval().encode
    side, vectors, found = resize_side(config["img_size"]), [], []
    for i in tqdm(range(0, len(files), PART), "files", unit=f"{PART}", disable=None):
        try:
            images = Images(files[i : i + PART], side=side).at(side, quiet=True)
        except InputError:  # none of them can be read
            continue
        vectors.append(features(encode, images, config, device, args.precision, args.batch).cpu())
        found += images.files
    if not found:
        raise InputError(f"none of the {len(files)} images in {args.folder} can be read")
    vectors, unreadable = torch.cat(vectors).numpy(), sorted(set(files) - set(found))
    if classify:
        what = f"{len(found)} files' classes"
        rows = [(file, classes[p.argmax()], f"{p.max():.4f}") for file, p in zip(found, vectors, strict=True)]
        with open(args.out, "w", newline="") as f:
            csv.writer(f).writerows([("file", "class", "probability"), *rows])
    else:
        what = f"{len(found)} vectors of length {vectors.shape[1]}"
        with open(args.out, "wb") as f:
            np.savez(f, vectors=vectors, files=found, unreadable=np.array(unreadable, dtype=str))
    print(f"{what} -> {args.out}; {len(unreadable)} files could not be read")
    return dict(files=found, unreadable=unreadable)


if __name__ == "__main__":
    main()
