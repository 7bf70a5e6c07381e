"""Linear probe of a frozen encoder, and fine-tuning end to end, with or without dropping tokens on the way.

    python eval_linear.py runs/dino-demo/last.pt                              # seconds: features are computed once
    python eval_linear.py runs/dino-demo/last.pt --feature both --layers 4    # CLS and mean patch token, last 4 blocks
    python eval_linear.py runs/dino-demo/last.pt --labels 0.1 --seeds 3       # few labels, three draws of them
    python eval_linear.py runs/dino-demo/last.pt --finetune --epochs 20
    python eval_linear.py runs/dino-demo/last.pt --finetune --epochs 20 --scratch     # the same from random weights
    python eval_linear.py runs/dino-demo/last.pt --finetune --drop-ratio 0.3  # PCAE's token dropping
    python eval_linear.py runs/finetune-dino-demo/classifier.pt --data photos/  # what was trained, on other images
    torchrun --nproc-per-node=2 eval_linear.py runs/dino-demo/last.pt

Probe: BatchNorm without affine parameters, then one linear layer (MAE, arXiv 2111.06377, appendix A.1). One head for
each learning rate is trained on the same features, side by side; the rate is chosen on a tenth of the training images
(more of very small sets), and that head is trained again on all of them. Test images are used once. --out saves it.
Fine-tuning: AdamW, learning rates that fall with depth (layer decay), crops, flips, mixup, label smoothing, drop path,
trained positions (MAE, appendix A.1). Mean tokens get a fresh LayerNorm (fc_norm) instead of the encoder's final one.
Its folder (runs/finetune-NAME) has last.pt, to resume from, classifier.pt, log.jsonl and curve.png.

Token dropping (PCAE, ICLR 2023, Table 5): inside three blocks, evenly spaced (blocks 3, 6, 9 of 12, counted from 0),
between attention and MLP, a share of the patch tokens is dropped: those most similar to their mean. CLS always stays,
means are over what is left. The paper does not say where it drops; this schedule comes nearest to its MACs.

A classifier is applied to another data set by the names of its classes. Predictions are limited to the classes that the
new data set has, as is usual for ImageNet-A and -R.

Differs from the authors' code (MAE's). Probe: SGD with momentum instead of LARS, no warm-up, no crops and flips unless
with --augment. Fine-tuning: no RandAugment, random erasing and cutmix; crops of .35 to 1 of the image (theirs: .08 to
1); mixup draws a weight for each image and mixes neighbours in the batch; the linear layer starts from a standard
deviation of .01 (theirs: 2e-5). --scratch is this recipe without layer decay, not theirs for training from scratch.
"""

import math
import time
import timeit
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tools.convert import read_encoder

# isort: off
from vit import InputError, ViT, drop_path, gather_tokens, pooled  # 1 network
from vit import batches, mean_and_std, open_images, prepare, resize_side, seeded, stream  # 2 images
from vit import crop_resize, sample_boxes  # 3 views
from vit import autocast, cosine, mean_over_processes, my_rows, optimizer_step, processes  # 4 training step
from vit import features, gather, pixels  # 5 evaluation
from vit import load_checkpoint, reading, save_checkpoint  # 6 checkpoints
from vit import COUNT, DATA_HELP, DEVICE, PRECISION, SHARE, Run, cli, launch, options, to_json  # 7 runs

RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
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
    out=(None, "folder for classifier.pt (probe: none; fine-tuning: runs/finetune-NAME)"),
    feature=(None, "what the linear layer sees (as the method's authors)", dict(choices=("cls", "mean", "both"))),
    labels=(1.0, "share of the training images that is used, evenly by class", SHARE),
    seeds=(1, "probe: so many seeds from --seed on, each with labels of its own; mean and standard deviation", COUNT),
    epochs=(None, "length of the run (probe 90, fine-tuning 100)", COUNT),
    crop_scale=((0.35, 1.0), "area of the crops, share of the image"),
    layers=(1, "probe: the features of so many last blocks, side by side", COUNT),
    augment=(False, "probe: new crops and flips in each epoch; features are not kept: slower"),
    baselines=(True, "also measure raw pixels and the untrained network"),
    rates=(RATES, "probe: learning rates tried, for batch 256", dict(nargs="+")),
    finetune=(False, "train the whole network, not only a linear layer"),
    scratch=(False, "fine-tuning: from random weights; the checkpoint tells shape, data and feature"),
    drop_ratio=(0.0, "fine-tuning: share of the patch tokens dropped at each of 3 stages", SHARE),
    lr=(1e-3, "fine-tuning: learning rate for batch 256; scaled with the batch"),
    layer_decay=(None, "fine-tuning: each block's rate over the next one's (0.75; from scratch 1)", dict(type=float)),
    drop_path=(0.1, "fine-tuning: stochastic depth", SHARE),
    mixup=(0.8, "fine-tuning: alpha of the Beta distribution of weights; 0 turns mixup off"),
    smoothing=(0.1, "fine-tuning: of labels, the share spread over all classes", SHARE),
    weight_decay=(0.05, "fine-tuning: of weight matrices only"),
)
PROBE_ONLY = ("seeds", "layers", "augment", "rates", "baselines")
FINETUNE_ONLY = ("scratch", "drop_ratio", "lr", "layer_decay", "drop_path", "mixup", "smoothing", "weight_decay")

# what every evaluation does ------------------------------------------------------------------------------------------


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
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise InputError(f"--json {args.json}: no such folder")
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


def report(task, args, config, results):
    """Prints the last line: one JSON object with the same keys for every evaluation; also to --json FILE."""
    result = dict(task=task, checkpoint=args.checkpoint, method=config.get("method"), data=args.data)
    result |= dict(args=vars(args), results=results)
    if processes()[0] == 0:
        print(to_json(result), flush=True)
        if args.json:
            Path(args.json).write_text(to_json(result) + "\n")
    return result


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


def sample_mixes(args, step, side):
    """All random numbers of a step, for the whole batch: a crop, a flip, and mixup's weight, at least one half."""
    g, weight = seeded(args.seed, step), torch.ones(args.batch, dtype=torch.float64)
    if args.mixup:
        weight = torch.from_numpy(np.random.default_rng([args.seed, step]).beta(args.mixup, args.mixup, args.batch))
    box = sample_boxes((args.batch, 1), side, args.crop_scale, g)
    flip = torch.rand((args.batch, 1), generator=g) < 0.5
    return dict(box=box, flip=flip, weight=torch.maximum(weight, 1 - weight).float())


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
    fine-tuned mean tokens, in place of the encoder's final norm; "none". ratio: of tokens dropped at each stage.
    """

    def __init__(self, vit, classes, feature, layers=1, norm="none", ratio=0.0):
        super().__init__()
        if layers > len(vit.blocks):
            raise InputError(f"--layers {layers}: this encoder has {len(vit.blocks)} blocks")
        self.config = dict(feature=feature, layers=layers, norm=norm, ratio=ratio)
        self.vit, self.feature, self.layers, self.ratio = vit, feature, layers, ratio
        width = vit.dim * layers * (1 + (feature == "both"))
        norms = dict(batch=lambda: nn.BatchNorm1d(width, affine=False, eps=1e-6), none=nn.Identity)
        self.norm = norms.get(norm, lambda: nn.LayerNorm(width, eps=1e-6))()
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


def apply(args, vit, config, device):
    """Accuracy of a classifier, percent, on test images of another set, by the names of the classes."""
    state, classes = load_checkpoint(args.checkpoint), config["classes"]
    with reading(args.checkpoint, "classifier"):
        net = Classifier(vit, len(classes), **state["how"])
        net.load_state_dict(state["classifier"])
    _, test = open_labelled(args, config, whole=True)
    unknown = [c for c in test.classes if c not in classes]
    if unknown:
        raise InputError(f"--data {args.data} has classes that were not trained: {', '.join(unknown[:5])}")
    own = [classes.index(c) for c in test.classes]
    logits = features(net.to(device).eval(), test, config, device, args.precision, args.batch, args.workers)[:, own]
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

    encode: network input (B, C, h, w) -> vectors (B, D).
    """
    rank, world = processes()
    classes, how = len(train.classes), (config, device, args.precision, args.batch, args.workers)
    y, test_x = train.labels.to(device), features(encode, test, *how)
    x = None if args.augment else features(encode, train, *how)

    def pairs(n, batch, total):  # features and labels of the batches of a run over the first n images
        if not args.augment:
            yield from ((x[i], y[i]) for i, _ in batches(n, batch, 0, total, args.seed, whole=True))
            return
        keys, small = list(batches(n, batch, 0, total, args.seed)), SimpleNamespace(**vars(args) | dict(batch=batch))
        mean, std = mean_and_std(config, device)
        for step, ((index, _), imgs) in enumerate(zip(keys, stream(train, keys, device, args.workers), strict=True)):
            draws = my_rows(sample_mixes(small, step, train.side), device)
            with torch.no_grad(), autocast(device, args.precision):
                crops = crop_resize(imgs.float() / 255, draws["box"], draws["flip"], config["img_size"][0])
                found = encode((crops - mean) / std).float()
            yield torch.cat(gather(found)), torch.cat(gather(y[index]))

    def fit(n, rates):
        batch = min(args.batch, n) // world * world
        if batch < 2:
            raise InputError(f"{n} training images, --batch {args.batch}: BatchNorm needs two in a batch")
        total = args.epochs * (n // batch)
        return train_heads(pairs(n, batch, total), total, test_x.shape[1], classes, rates, batch, device)

    tried, n = {}, len(train)
    kept = n - max(n // 10, min(classes, n // 2))  # held out: a tenth, but as many as classes, and at most half
    if 1 < kept < n and len(args.rates) > 1:
        held = features(encode, train.pick(range(kept, n)), *how) if x is None else x[kept:]
        norm, weight, bias = fit(kept, args.rates)
        tried = dict(zip(args.rates, accuracies(norm(held) @ weight + bias, y[kept:]), strict=True))
    rate = max(tried, key=tried.get) if tried else args.rates[len(args.rates) // 2]
    if rank == 0 and tried and rate in (args.rates[0], args.rates[-1]):
        print(f"warning: the best of the --rates, {rate:g}, is the first or the last: try a wider range")
    norm, weight, bias = fit(n, [rate])
    linear = round(accuracies(norm(test_x) @ weight + bias, test.labels.to(device))[0], 2)
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


# fine-tuning ---------------------------------------------------------------------------------------------------------


def macs(config, img_size, ratio=0.0, classes=0):
    """Multiply-accumulates for an image of img_size (h, w): patches, blocks with attention, head."""
    n, d = math.prod(ViT.grid_of(img_size, config["patch"])), config["dim"]
    total = n * d * config["patch"] ** 2 * config["in_chans"] + d * classes
    for i in range(config["depth"]):
        total += (1 + n) * 4 * d * d + 2 * (1 + n) ** 2 * d
        if i in stages_of(config["depth"]):
            n = max(1, int(n * (1 - ratio) + 1e-6))
        total += (1 + n) * 8 * d * d
    return total


def layer_groups(net, decay, weight_decay):
    """Optimiser groups: a layer's rate is `decay` times that of the next. Weight decay: of matrices only."""
    depth, groups = len(net.vit.blocks), {}
    for name, p in net.named_parameters():
        block = int(name.split(".")[2]) + 1 if name.startswith("vit.blocks.") else 0
        layer = block if name.startswith(("vit.blocks", "vit.patch", "vit.cls", "vit.pos")) else depth + 1
        key = (decay ** (depth + 1 - layer), weight_decay if p.ndim in (2, 4) else 0.0)
        groups.setdefault(key, []).append(p)
    return [dict(params=p, factor=factor, weight_decay=wd) for (factor, wd), p in groups.items()]


def mixed_loss(net, imgs, labels, weight, smoothing):
    """Cross-entropy of weight · image + (1 - weight) · its neighbour, with both labels (Zhang et al., 1710.09412)."""
    other = torch.arange(len(imgs), device=imgs.device) ^ 1
    imgs = torch.lerp(imgs[other], imgs, weight.view(-1, 1, 1, 1))
    logits = net(imgs).float()
    loss = lambda y: F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")
    return (weight * loss(labels) + (1 - weight) * loss(labels[other])).mean()


def finetune_step(net, optimizer, scaler, imgs, labels, draws, lr, size, args):
    """One optimiser step. Returns the loss, (), still on the device."""
    x = (crop_resize(imgs.float() / 255, draws["box"], draws["flip"], size) - net.mean) / net.std
    with autocast(x.device, args.precision):
        loss = mixed_loss(net, x, labels, draws["weight"], args.smoothing)
    scaler.scale(loss).backward()
    optimizer_step(optimizer, scaler, lr, None, clip=0)
    return loss.detach()


def finetune(args, vit, train, test, config, device):
    """Accuracy after fine-tuning, percent, with the speed and the MACs of what was trained."""
    rank, world = processes()
    train = train.pick(share_of_labels(train.labels, args.labels, args.seed)) if args.labels < 1 else train
    feature = config["feature"]
    torch.manual_seed(args.seed)
    vit = ViT(**vit.config) if args.scratch else vit
    args.encoder = sum(p.detach().double().abs().sum().item() for p in vit.parameters())  # compared on resume
    vit.pos_embed.requires_grad_(True)
    for block, rate in zip(vit.blocks, torch.linspace(0, args.drop_path, len(vit.blocks)).tolist(), strict=True):
        block.drop_path = rate
    norm = "layer" if feature == "mean" else "none"
    net = Classifier(vit, len(train.classes), feature, norm=norm, ratio=args.drop_ratio).to(device)
    net.mean, net.std = mean_and_std(config, device)
    optimizer = torch.optim.AdamW(layer_groups(net, args.layer_decay, args.weight_decay), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    batch = min(args.batch, len(train)) // (2 * world) * 2 * world
    if not batch:
        few = f"--batch {args.batch} of {len(train)} training images"
        raise InputError(f"{few} is too few for {world} process(es): a pair for each, for mixup")
    if rank == 0 and batch < args.batch:
        print(f"warning: --batch {batch}, not {args.batch}: pairs for mixup, as many in each process")
    args.batch, args.method, args.steps = batch, "finetune", None
    name = Path(args.checkpoint).parent.name if Path(args.checkpoint).stem == "last" else Path(args.checkpoint).stem
    name += "-scratch" * args.scratch + f"-drop{args.drop_ratio}" * (args.drop_ratio > 0)
    args.out = args.out or f"runs/finetune-{name}"
    run = Run(args, net, vit, optimizer, scaler, train, None, __file__)
    run.resume()
    net.train()

    labels, start, first = train.labels.to(device), time.perf_counter(), run.first
    warmup = min(5, args.epochs / 10) * run.steps_per_epoch
    for step, imgs in run.steps(train):
        lr = cosine(step, run.total, args.lr * batch / 256, 1e-6, warmup)
        draws = my_rows(sample_mixes(args, step, train.side), device)
        y = labels[torch.as_tensor(run.index).to(device, non_blocking=True)]
        loss = finetune_step(net, optimizer, scaler, imgs, y, draws, lr, config["img_size"][0], args)
        if run.log_due(step):
            value = mean_over_processes(loss).item()
            run.log(step, loss=value, lr=lr)
            if not value < 100 * math.log(len(train.classes)):
                raise InputError(f"the loss is {value:.3g}: lower --lr")
        if (step + 1) % run.steps_per_epoch == 0:
            paused = time.perf_counter()
            logits = features(net.eval(), test, config, device, args.precision, args.batch, args.workers)
            net.train()
            accuracy = round(accuracies(logits[None], test.labels.to(device))[0], 2)
            run.write(step=step + 1, epoch=(step + 1) // run.steps_per_epoch, accuracy=accuracy)
            run.since += time.perf_counter() - paused
        if run.save_due(step):
            run.save(step)
            run.draw_curve("accuracy")
    seconds = time.perf_counter() - start
    if rank == 0:
        save_classifier(run.out / "classifier.pt", net.eval(), config, train.classes)
    run.bar.close()
    gmacs = macs(vit.config, config["img_size"], args.drop_ratio, len(train.classes)) / 1e9
    last = run.last("accuracy", "seconds") if rank == 0 else dict(accuracy=None, seconds=0)
    result = dict(finetuned=last["accuracy"], scratch=args.scratch, drop_ratio=args.drop_ratio, gmacs=round(gmacs, 4))
    result |= dict(feature=feature, norm=norm, train=len(train), test=len(test), minutes=round(last["seconds"] / 60, 2))
    if run.stop > first:
        result["training_images_per_s"] = round((run.stop - first) * batch / seconds, 1)
    if args.drop_ratio:
        some = test.subset(256)
        imgs = torch.stack([some[i, 0.5] for i in range(len(some))]).to(device)
        result["speed"] = speed(net.eval(), prepare(imgs, config), args.drop_ratio)
    return result | dict(classifier=str(run.out / "classifier.pt"))


@torch.no_grad()
def speed(net, imgs, ratio, turns=9):
    """Images per second with dropping over those without, measured in turns: the median ratio."""

    def seconds(ratio):
        net.ratio = ratio
        return timeit.timeit(lambda: net(imgs).sum().item(), number=1)  # waits for the device

    return round(float(np.median([seconds(0.0) / seconds(ratio) for _ in range(turns)])), 3)


def check(args):
    """Refuses options that would be ignored, or that make no sense together."""
    foreign = PROBE_ONLY if args.finetune else FINETUNE_ONLY
    given = [f"--{k.replace('_', '-')}" for k in foreign if getattr(args, k) != OPTIONS[k][0]]
    if given:
        raise InputError(f"{', '.join(given)}: for {'the probe' if args.finetune else '--finetune'} only")
    if args.labels == 0 or args.drop_ratio == 1 or args.drop_path == 1 or args.smoothing == 1:
        raise InputError("--labels must be above 0; --drop-ratio, --drop-path and --smoothing below 1")
    if args.seed < 0 or args.mixup < 0 or (args.layer_decay is not None and args.layer_decay <= 0):
        raise InputError("--seed and --mixup must be 0 or more, --layer-decay above 0")
    if args.crop_scale != OPTIONS["crop_scale"][0] and not (args.finetune or args.augment):
        raise InputError("--crop-scale: for --finetune and --augment only")
    if min(args.rates) <= 0 or not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise InputError("--rates must be above 0, --crop-scale two shares of the image, the smaller one first")
    args.epochs = args.epochs or (100 if args.finetune else 90)
    args.layer_decay = args.layer_decay or (1.0 if args.scratch else 0.75)
    args.rates, args.crop_scale = sorted(args.rates), list(args.crop_scale)


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv)
    check(args)
    device = launch(args)
    vit, config = open_encoder(args)
    if "classes" in config:  # save_classifier wrote it
        if args.finetune or args.labels < 1 or args.out or args.feature:
            raise InputError(f"{args.checkpoint} is a classifier, which is applied: leave options of training out")
        return report("classifier", args, config, apply(args, vit, config, device))
    train, test = open_labelled(args, config)
    config["feature"] = args.feature or config["feature"]
    if args.finetune:
        return report("finetune", args, config, finetune(args, vit, train, test, config, device))
    return report("linear", args, config, probe_seeds(args, vit, train, test, config, device))


if __name__ == "__main__":
    main()
