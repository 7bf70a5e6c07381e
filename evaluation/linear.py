"""Linear probe: how much does one linear layer on the features of a frozen encoder know?

    python evaluation/linear.py runs/dino-demo/last.pt                              # features are computed once
    python evaluation/linear.py runs/dino-demo/last.pt --feature both --layers 4    # CLS and mean token, last 4 blocks
    python evaluation/linear.py runs/dino-demo/last.pt --labels 0.1 --seeds 3       # few labels, three draws of them
    python evaluation/linear.py runs/dino-demo/last.pt --out probe                  # saves probe/classifier.pt
    python evaluation/linear.py probe/classifier.pt --data photos/                  # and applies it to other images
    torchrun --nproc-per-node=2 evaluation/linear.py runs/dino-demo/last.pt

BatchNorm without affine parameters, then one linear layer (MAE, arXiv 2111.06377, appendix A.1). One head for each
learning rate is trained on the same features, side by side; the rate is chosen on a tenth of the training images (more
of very small sets), and that head is trained again on all of them. Test images are used once. The same is done with the
features of the untrained network, and with raw pixels, which a trained encoder should beat.

A classifier is applied to another data set by the names of its classes. Predictions are limited to the classes that the
new data set has, as is usual for ImageNet-A and -R.

Differs from the authors' code (MAE's): SGD with momentum instead of LARS, no warm-up, no crops and flips, so that
features are computed once.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_knn import EVALUATION, open_encoder, open_labelled, report, shared_features

# isort: off
from vit import InputError, ViT, drop_path, gather_tokens, pooled  # 1 network
from vit import cosine, processes  # 3 training step
from vit import batches, reading  # 4 images
from vit import pixels  # 5 evaluation
from vit import load_checkpoint, save_checkpoint  # 6 checkpoints
from vit import COUNT, SHARE, cli, launch, options  # 7 runs

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
WITH_LABELS = EVALUATION | dict(
    feature=(None, "what the linear layer sees (as the method's authors)", dict(choices=("cls", "mean", "both"))),
    labels=(1.0, "share of the training images that is used, evenly by class", SHARE),
)
OPTIONS = WITH_LABELS | dict(
    out=(None, "folder for classifier.pt (none)"),
    epochs=(90, "length of the training", COUNT),
    seeds=(1, "so many seeds from --seed on, each with labels of its own; mean and standard deviation", COUNT),
    layers=(1, "the features of so many last blocks, side by side", COUNT),
    rates=(RATES, "learning rates tried, for batch 256", dict(nargs="+")),
    baselines=(True, "also measure raw pixels and the untrained network"),
)


def accuracies(logits, labels):
    """Percent, of logits (R, M, classes): a list of R."""
    return (100 * (logits.argmax(dim=-1) == labels).float().mean(dim=1)).tolist()


def share_of_labels(labels, share, seed=0):
    """Indices of a share of the images, evenly by class and at least one of each, in random order; one draw a seed."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=g)
    if share < 1:
        members = [order[labels[order] == c] for c in labels.unique()]
        chosen = torch.cat([m[: max(1, round(share * len(m)))] for m in members])
        order = chosen[torch.randperm(len(chosen), generator=g)]
    return order.tolist()


# classifier ----------------------------------------------------------------------------------------------------------


def drop_tokens(x, ratio):
    """CLS and the patch tokens least like their mean, (B, 1+N, D) -> (B, 1+n, D) with n = int(N (1 - ratio))."""
    cls, x = x[:, :1], x[:, 1:]
    n = max(1, int(x.shape[1] * (1 - ratio) + 1e-6))
    like = F.cosine_similarity(x.float(), x.float().mean(dim=1, keepdim=True), dim=-1)
    index = like.topk(n, dim=1, largest=False)[1]
    return torch.cat([cls, gather_tokens(x, index)], dim=1)


def stages_of(depth):
    """The blocks, counted from 0, inside which tokens are dropped: 3, 6 and 9 of 12."""
    return [depth * i // 4 for i in (1, 2, 3)]


class Classifier(nn.Module):
    """An encoder, a norm and a linear layer.

    feature, layers: "cls", "mean" or "both" of the last so many blocks. norm: "batch" for the probe; "layer" for
    fine-tuned mean tokens, in place of the encoder's final norm, which is taken out of vit and its config; "none".
    ratio: of tokens dropped at each stage.
    """

    def __init__(self, vit, classes, feature, layers=1, norm="none", ratio=0.0):
        super().__init__()
        if layers > len(vit.blocks):
            raise InputError(f"--layers {layers}: this encoder has {len(vit.blocks)} blocks")
        self.config = dict(feature=feature, layers=layers, norm=norm, ratio=ratio)
        self.vit, self.feature, self.layers, self.ratio = vit, feature, layers, ratio
        width = vit.dim * layers * (1 + (feature == "both"))
        norms = dict(batch=nn.BatchNorm1d(width, affine=False, eps=1e-6), layer=nn.LayerNorm(width, eps=1e-6))
        self.norm = (norms | dict(none=nn.Identity()))[norm]
        if norm == "layer":
            vit.norm, vit.config["norm"] = nn.Identity(), False
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def encode(self, imgs):
        """(B, C, h, w) -> (B, width)."""
        x, out, depth = self.vit.embed(imgs), [], len(self.vit.blocks)
        for i, block in enumerate(self.vit.blocks):
            p = block.drop_path if self.training else 0
            x = x + drop_path(block.attn(block.norm1(x)), p)
            if self.ratio and i in stages_of(depth):
                x = drop_tokens(x, self.ratio)
            x = x + drop_path(block.mlp(block.norm2(x)), p)
            if i >= depth - self.layers:
                out.append(pooled(self.vit.norm(x), self.feature))
        return torch.cat(out, dim=1)

    def forward(self, imgs):
        """(B, C, h, w) -> logits (B, classes)."""
        return self.head(self.norm(self.encode(imgs)))


def save_classifier(file, net, config, classes):
    """What apply() needs: encoder, norm and linear layer with their config, and the names of the classes."""
    state = dict(classifier=net.state_dict(), how=net.config, encoder=net.vit.state_dict())
    save_checkpoint(file, state | dict(config=config | net.vit.config | dict(classes=classes)))


def load_classifier(file, vit, classes):
    """The Classifier that save_classifier wrote; vit: its encoder, as open_encoder read it."""
    state = load_checkpoint(file)
    with reading(file, "classifier"):
        net = Classifier(vit, len(classes), **state["how"])
        net.load_state_dict(state["classifier"])
    return net.eval()


def apply(args, vit, config, device):
    """Accuracy of a classifier, percent, on test images of another set, by the names of the classes."""
    classes = config["classes"]
    net = load_classifier(args.checkpoint, vit, classes).to(device)
    _, test = open_labelled(args, config, whole=True)
    unknown = [c for c in test.classes if c not in classes]
    if unknown:
        raise InputError(f"--data {args.data} has classes that were not trained: {', '.join(unknown[:5])}")
    own = [classes.index(c) for c in test.classes]
    how = (config, device, args.precision, args.batch, args.workers)
    logits = shared_features(net, test, *how)[:, own]
    accuracy = round(accuracies(logits[None], test.labels.to(device))[0], 2)
    return dict(accuracy=accuracy, test=len(test), classes=len(own))


# probe ---------------------------------------------------------------------------------------------------------------


def train_heads(pairs, total, width, classes, rates, batch, device):
    """Linear layers on batch-normalised features, one for each learning rate, trained side by side by SGD.

    pairs: `total` times (features (B, width), labels (B,)). The gradient of each head is that of its own loss, so it
    ends where it would end alone. Returns the norm, weights (rates, width, classes) and biases (rates, 1, classes).
    """
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device)
    weight = torch.zeros(len(rates), width, classes, device=device, requires_grad=True)
    bias = torch.zeros(len(rates), 1, classes, device=device, requires_grad=True)
    scale = torch.tensor(rates, device=device).view(-1, 1, 1) * batch / 256
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)  # a scaled gradient equals a scaled rate
    for step, (x, y) in enumerate(pairs):
        logits = norm(x) @ weight + bias
        F.cross_entropy(logits.flatten(0, 1), y.repeat(len(rates)), reduction="sum").div(len(y)).backward()
        for p in (weight, bias):
            p.grad *= scale
        optimizer.param_groups[0]["lr"] = cosine(step, total, 1.0, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    return norm.eval(), weight.detach(), bias.detach()


def probe(args, encode, train, test, config, device):
    """One draw of labels: a dict, and what was trained. The rate is chosen on the last tenth of the training images.

    encode: network input (B, C, h, w) -> vectors (B, D). All processes encode, and then train the same heads.
    """
    classes, how = len(train.classes), (config, device, args.precision, args.batch, args.workers)
    test_x, test_y = shared_features(encode, test, *how), test.labels.to(device)
    x, y = shared_features(encode, train, *how), train.labels.to(device)

    def fit(n, rates):  # on the first n images
        batch = min(args.batch, n)
        if batch < 2:
            raise InputError(f"{n} training images, --batch {args.batch}: BatchNorm needs two in a batch")
        total = args.epochs * (n // batch)
        pairs = ((x[i], y[i]) for i in batches(n, batch, 0, total, args.seed, whole=True))
        return train_heads(pairs, total, x.shape[1], classes, rates, batch, device)

    tried, n = {}, len(train)
    kept = n - max(n // 10, min(classes, n // 2))  # held out: a tenth, but as many as classes, and at most half
    if 1 < kept < n and len(args.rates) > 1:
        norm, weight, bias = fit(kept, args.rates)
        found = accuracies(norm(x[kept:]) @ weight + bias, y[kept:])
        tried = dict(zip(args.rates, found, strict=True))
    rate = max(tried, key=tried.get) if tried else args.rates[len(args.rates) // 2]
    if processes()[0] == 0 and tried and rate in (args.rates[0], args.rates[-1]):
        print(f"warning: the best of the --rates, {rate:g}, is the first or the last: try a wider range")
    norm, weight, bias = fit(n, [rate])
    linear = round(accuracies(norm(test_x) @ weight + bias, test_y)[0], 2)
    result = dict(linear=linear, rate=rate, train=n, tried={f"{k:g}": round(v, 2) for k, v in tried.items()})
    return result, (norm, weight, bias)


def probe_seeds(args, vit, train, test, config, device):
    """probe() for --seeds draws of labels: mean, standard deviation, and each."""
    net = Classifier(vit, len(train.classes), config["feature"], args.layers, norm="batch").to(device).eval()
    found = []
    for seed in range(args.seed, args.seed + args.seeds):
        some = train.pick(share_of_labels(train.labels, args.labels, seed))
        own = SimpleNamespace(**vars(args) | dict(seed=seed))
        result, (norm, weight, bias) = probe(own, net.encode, some, test, config, device)
        found.append(result)
        net.norm.load_state_dict(norm.state_dict())
        net.head.weight.data, net.head.bias.data = weight[0].T.contiguous(), bias[0, 0]
        if args.out and seed == args.seed and processes()[0] == 0:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            save_classifier(Path(args.out) / "classifier.pt", net, config, train.classes)
    values = [f["linear"] for f in found]
    result = dict(found[0], linear=round(float(np.mean(values)), 2), feature=config["feature"], test=len(test))
    if args.baselines:
        torch.manual_seed(args.seed)
        untrained = Classifier(ViT(**vit.config), 1, config["feature"], args.layers).to(device).eval()
        first = train.pick(share_of_labels(train.labels, args.labels, args.seed))
        for name, encode in dict(untrained=untrained.encode, pixels=pixels).items():
            result[name] = probe(args, encode, first, test, config, device)[0]["linear"]
        if processes()[0] == 0:
            others = ", ".join(f"{name} {result[name]:.1f}" for name in ("untrained", "pixels"))
            print(f"linear probe {result['linear']:.1f} %, {others}; {len(test)} test images")
    if len(values) > 1:
        result |= dict(linear_sd=round(float(np.std(values, ddof=1)), 2), linear_each=values)
    return result


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv)
    args.rates = sorted(args.rates)
    if args.labels == 0 or args.rates[0] <= 0:
        raise InputError("--labels and --rates must be above 0")
    device = launch(args)
    vit, config = open_encoder(args)
    if "classes" in config:  # save_classifier wrote it
        if args.labels < 1 or args.out or args.feature:
            raise InputError(f"{args.checkpoint} is a classifier, which is applied: leave options of training out")
        return report("classifier", args, config, apply(args, vit, config, device))
    train, test = open_labelled(args, config)
    config["feature"] = args.feature or config["feature"]
    return report("linear", args, config, probe_seeds(args, vit, train, test, config, device))


if __name__ == "__main__":
    main()
