"""Linear probe of a frozen encoder, and fine-tuning end to end, with or without dropping tokens on the way.

    python eval_linear.py runs/dino-demo/last.pt                              # seconds: features are computed once
    python eval_linear.py runs/dino-demo/last.pt --feature both --layers 4    # CLS and mean patch token, last 4 blocks
    python eval_linear.py runs/dino-demo/last.pt --labels 0.1                 # few labels
    python eval_linear.py runs/dino-demo/last.pt --finetune --epochs 20
    python eval_linear.py runs/dino-demo/last.pt --finetune --epochs 20 --scratch   # the same, from random weights
    python eval_linear.py runs/dino-demo/last.pt --finetune --drop-ratio 0.3  # PCAE's token dropping
    torchrun --nproc-per-node=2 eval_linear.py runs/dino-demo/last.pt

Probe: BatchNorm without affine, then one linear layer (MAE, arXiv 2111.06377, appendix A.1); a head for each learning
rate, all trained side by side on the same features, the rate chosen on a tenth of the training images (more of very
small sets), and that head trained again on all of them. The test images are read once. Fine-tuning: AdamW, learning
rates that fall with depth (layer decay), crops, flips, mixup, label smoothing, drop path; MAE's appendix A.1 and A.2.

Token dropping (PCAE, ICLR 2023, Table 5): inside three blocks, evenly spaced (blocks 3, 6, 9 of 12, counted from 0),
between attention and MLP, a share of the patch tokens goes: those most similar to their mean. CLS always stays, means
are over what is left. The paper does not say where it drops; this schedule comes nearest to its MACs.

Differs from the authors' code (MAE's): SGD with momentum in place of LARS; no RandAugment, random erasing or cutmix;
from scratch without layer decay; mixup draws a weight for each image and mixes neighbours in the batch.
"""

import argparse
import json
import math
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from vit import (
    DTYPES,
    InputError,
    ViT,
    cli,
    drop_path,
    every,
    in_order,
    launch,
    load_encoder,
    load_labelled,
    pooled,
    positive,
    prepare,
    shared_features,
    stream,
)


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("checkpoint", nargs="?", help="last.pt of a run, a file of weights/, or the authors' weights")
    add("--data", help="demo.npz, any .npz, cifar10, cifar100, or a folder of images (what the run was trained on)")
    add("--feature", choices=("cls", "mean", "both"), help="CLS token, mean patch token, or both (as the method says)")
    add("--labels", type=float, default=1.0, help="share of the training images that is used: fixed, evenly by class")
    add("--epochs", type=positive, help="length of the run; the schedules follow it")
    add("--batch", type=positive, default=256, help="images in an optimiser step, over all processes")
    add("--img-size", type=positive, help="input of the network, px (what the checkpoint says)")
    add("--workers", type=int, default=2, help="processes that decode images, where a set does not fit in memory")
    add("--device", help="cuda, mps or cpu (the first that is there)")
    add(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="auto: bf16 if the hardware has it",
    )
    add("--seed", type=int, default=0, help="of weights, order, crops, colours and masks")
    add("--crop-scale", type=float, nargs=2, default=[0.35, 1.0], help="area of the crop, share of image")
    add = p.add_argument_group("probe (90 epochs)").add_argument
    probe_only = [
        add("--layers", type=positive, default=1, help="the features of so many last blocks, side by side"),
        add("--augment", action="store_true", help="new crops and flips in each epoch; features are not kept: slower"),
        add(
            "--rates",
            type=float,
            nargs="+",
            default=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0],
            help="learning rates tried, for batch 256; scaled with the batch",
        ),
    ]
    add = p.add_argument_group("fine-tuning (100 epochs)").add_argument
    add("--finetune", action="store_true", help="train the whole network, not only a linear layer")
    finetune_only = [
        add(
            "--scratch", action="store_true", help="from random weights: the checkpoint tells shape, data and read-out"
        ),
        add("--drop-ratio", type=float, default=0.0, help="share of the patch tokens dropped at each of 3 stages"),
        add("--lr", type=float, default=1e-3, help="learning rate for batch 256; scaled with the batch"),
        add("--layer-decay", type=float, help="each block's learning rate over the next one's (0.75; from scratch 1)"),
        add("--drop-path", type=float, default=0.1, help="stochastic depth, in training"),
        add("--mixup", type=float, default=0.8, help="alpha of the Beta distribution of weights, 0: none"),
        add("--smoothing", type=float, default=0.1, help="of labels: the share spread over all classes"),
        add("--weight-decay", type=float, default=0.05, help="not of biases and norms"),
    ]
    args = p.parse_args(argv)
    if not args.checkpoint:
        raise InputError("no checkpoint given; `python dino.py` makes one: runs/dino-demo/last.pt")
    foreign = probe_only if args.finetune else finetune_only
    given = [a.option_strings[0] for a in foreign if getattr(args, a.dest) != a.default]
    if given:
        raise InputError(f"{', '.join(given)}: of {'the probe alone' if args.finetune else '--finetune; add it'}")
    for name in ("drop_ratio", "drop_path", "smoothing"):
        if not 0 <= getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be in [0, 1)")
    if not 0 < args.labels <= 1:
        raise InputError("--labels must be in (0, 1]")
    if args.seed < 0 or args.mixup < 0 or (args.layer_decay is not None and args.layer_decay <= 0):
        raise InputError("--seed and --mixup must be 0 or more, --layer-decay more than 0")
    args.epochs = args.epochs or (100 if args.finetune else 90)
    args.layer_decay = args.layer_decay or (1.0 if args.scratch else 0.75)
    return args


def share_of_labels(labels, share):
    """Indices of a fixed share of the images, evenly by class and at least one of each, in a fixed random order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    if share < 1:
        members = [order[labels[order] == c] for c in labels.unique()]
        chosen = torch.cat([m[: max(1, round(share * len(m)))] for m in members])
        order = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    return order


# --------------------------------------------------------------------------------------------------------------- probe


class Reader:
    """What features() asks: encode(imgs, feature) -> (B, width), for several blocks and both kinds of feature."""

    def __init__(self, vit, layers):
        if layers > len(vit.blocks):
            raise InputError(f"--layers {layers}: this encoder has {len(vit.blocks)} blocks")
        self.vit, self.layers = vit, layers

    def encode(self, imgs, feature):
        if self.layers == 1:
            return self.vit.encode(imgs, feature)
        return torch.cat([pooled(x, feature) for x in self.vit.layers(imgs)[-self.layers :]], dim=1)


def train_heads(pairs, total, width, classes, rates, batch, device):
    """Linear layers on batch-normalised features, one for each learning rate, trained side by side by SGD.

    pairs: `total` times (features (B, width), labels (B,)). Returns logits(x): (M, width) -> (rates, M, classes).
    The gradient of each head is that of its own loss, so it ends where it would end alone.
    """
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6).to(device)
    weight = torch.zeros(len(rates), width, classes, device=device, requires_grad=True)
    bias = torch.zeros(len(rates), 1, classes, device=device, requires_grad=True)
    scale = torch.tensor(rates, device=device).view(-1, 1, 1) * batch / 256
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)  # linear in gradients: they may carry the rates
    for step, (x, y) in enumerate(pairs):
        logits = norm(x) @ weight + bias
        F.cross_entropy(logits.flatten(0, 1), y.repeat(len(rates)), reduction="sum").div(len(y)).backward()
        for p in (weight, bias):
            p.grad *= scale
        optimizer.param_groups[0]["lr"] = cosine(step, total, 1.0, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    norm.eval()
    return lambda x: (norm(x) @ weight + bias).detach()


def probe(args, vit, sets, config, device, rank, world):
    """Linear accuracy, percent. The rate is chosen on the last tenth of the training images in their fixed order."""
    reader, dtype = Reader(vit.to(device).eval(), args.layers), DTYPES[args.precision]
    config, test = dict(config, feature=args.feature or config["feature"]), sets["test"]
    train = sets["train"].pick(share_of_labels(sets["train"].labels, args.labels).tolist())
    y, mean, std = train.labels.to(device), *statistics(config, device)

    all_features = lambda images: shared_features(reader, images, config, device, dtype, 256, args.workers)

    def pairs(n, batch, total):  # features and labels of the batches of a run over the first n images
        plan = lambda *share: batches(n, batch, 0, total, args.seed, *share)
        if not args.augment:
            yield from ((x[i], y[i]) for i, _ in plan(0, 1))
            return
        imgs = stream(train, plan(rank, world), device, args.workers)
        for step, ((index, _), mine) in enumerate(zip(plan(0, 1), imgs, strict=True)):
            draws = my_rows(draw_mixes(args, step, batch), rank, world, device)
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                crops = crop_resize(mine.float() / 255, draws["box"], draws["flip"], config["img_size"])
                found = reader.encode((crops - mean) / std, config["feature"]).float()
            yield torch.cat(every(found)), y[index]

    def fit(n, rates):
        batch = min(args.batch, n) // world * world
        if batch < 2:
            raise InputError(f"{n} training images, --batch {args.batch}: BatchNorm needs two in a batch")
        total = args.epochs * (n // batch)
        return train_heads(pairs(n, batch, total), total, test_x.shape[1], len(train.classes), rates, batch, device)

    test_x, x = all_features(test), None if args.augment else all_features(train)
    tried, n = {}, len(train)
    kept = n - max(n // 10, min(len(train.classes), n // 2))  # a tenth, but as many as classes, and at most half
    if 1 < kept < n and len(args.rates) > 1:
        held = all_features(train.pick(range(kept, n))) if x is None else x[kept:]
        tried = dict(zip(args.rates, accuracies(fit(kept, args.rates)(held), y[kept:]), strict=True))
    rate = max(tried, key=tried.get) if tried else args.rates[len(args.rates) // 2]
    accuracy = accuracies(fit(n, [rate])(test_x), test.labels.to(device))[0]
    tried = {f"{k:g}": round(v, 2) for k, v in tried.items()}
    return dict(linear=round(accuracy, 2), rate=rate, tried=tried, feature=config["feature"], layers=args.layers)


def accuracies(logits, labels):
    """Percent, of logits (R, M, classes): a list of R."""
    return (100 * (logits.argmax(dim=-1) == labels).float().mean(dim=1)).tolist()


# --------------------------------------------------------------------------------------------------------- fine-tuning


def drop_tokens(x, ratio):
    """CLS and the patch tokens least like their mean, (B, 1+N, D) -> (B, 1+n, D) with n = int(N (1 - ratio))."""
    cls, x = x[:, :1], x[:, 1:]
    n = max(1, int(x.shape[1] * (1 - ratio) + 1e-6))
    like = F.cosine_similarity(x.float(), x.float().mean(dim=1, keepdim=True), dim=-1)
    index = like.topk(n, dim=1, largest=False)[1]
    return torch.cat([cls, x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))], dim=1)


def stages_of(depth):
    """The blocks, counted from 0, inside which tokens are dropped: 3, 6 and 9 of 12."""
    return [depth * i // 4 for i in (1, 2, 3)]


class Classifier(nn.Module):
    """A ViT, its read-out (CLS, mean patch token, or both) and a linear layer. ratio: tokens dropped at each stage."""

    def __init__(self, vit, classes, feature, ratio=0.0):
        super().__init__()
        self.vit, self.feature, self.ratio = vit, feature, ratio
        self.head = nn.Linear(vit.dim * (1 + (feature == "both")), classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, imgs):
        """(B, C, height, width) -> logits (B, classes)."""
        x, stages = self.vit.embed(imgs), stages_of(len(self.vit.blocks)) if self.ratio else ()
        for i, block in enumerate(self.vit.blocks):
            p = block.drop_path if self.training else 0
            x = x + drop_path(block.attn(block.norm1(x)), p)
            if i in stages:
                x = drop_tokens(x, self.ratio)
            x = x + drop_path(block.mlp(block.norm2(x)), p)
        return self.head(pooled(self.vit.norm(x), self.feature))


def macs(config, img_size, ratio=0.0, classes=0):
    """Multiply-accumulates for an image of img_size (height, width): patches, blocks with attention, head."""
    n, d = math.prod(ViT.grid_of(img_size, config["patch"])), config["dim"]
    total = n * d * config["patch"] ** 2 * config["in_chans"] + d * classes
    for i in range(config["depth"]):
        total += (1 + n) * 4 * d * d + 2 * (1 + n) ** 2 * d
        if i in stages_of(config["depth"]):
            n = max(1, int(n * (1 - ratio) + 1e-6))
        total += (1 + n) * 8 * d * d
    return total


def layer_groups(net, decay, weight_decay):
    """Optimiser groups: a rate's factor is decay ** (layers above, the head among them). Only matrices decay."""
    depth, groups = len(net.vit.blocks), {}
    for name, p in net.named_parameters():
        if p.requires_grad:
            block = int(name.split(".")[2]) + 1 if name.startswith("vit.blocks.") else 0
            layer = block if name.startswith(("vit.blocks", "vit.patch", "vit.cls", "vit.pos")) else depth + 1
            key = (decay ** (depth + 1 - layer), weight_decay if p.ndim == 2 or p.ndim == 4 else 0.0)
            groups.setdefault(key, []).append(p)
    return [dict(params=p, factor=factor, weight_decay=wd) for (factor, wd), p in groups.items()]


def mixed_loss(net, imgs, labels, weight, smoothing):
    """Cross-entropy of weight · image + (1 - weight) · its neighbour, with both labels (Zhang et al., 1710.09412)."""
    other = torch.arange(len(imgs), device=imgs.device) ^ 1
    imgs = torch.lerp(imgs[other], imgs, weight.view(-1, 1, 1, 1))
    logits = net(imgs).float()
    loss = lambda y: F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")
    return (weight * loss(labels) + (1 - weight) * loss(labels[other])).mean()


def finetune(args, vit, sets, config, device, rank, world):
    """Accuracy after fine-tuning, percent, with the speed and the MACs of what was trained."""
    train, test = sets["train"].pick(share_of_labels(sets["train"].labels, args.labels).tolist()), sets["test"]
    for block, rate in zip(vit.blocks, torch.linspace(0, args.drop_path, len(vit.blocks)).tolist(), strict=True):
        block.drop_path = rate
    torch.manual_seed(args.seed)
    net = Classifier(vit, len(train.classes), args.feature or config["feature"], args.drop_ratio).to(device)
    optimizer = torch.optim.AdamW(layer_groups(net, args.layer_decay, args.weight_decay), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    dtype, (mean, std) = DTYPES[args.precision], statistics(config, device)
    batch = min(args.batch, len(train)) // (2 * world) * 2 * world
    if not batch:
        few = f"--batch {args.batch} of {len(train)} training images"
        raise InputError(f"{few} is too few for {world} process(es): a pair for each, for mixup")
    if rank == 0 and batch < min(args.batch, len(train)):
        print(f"batch {batch}, not {args.batch}: pairs for mixup, as many in each process", file=sys.stderr)
    per_epoch = len(train) // batch
    total, warmup, seconds = args.epochs * per_epoch, min(5, args.epochs / 10) * per_epoch, time.perf_counter()
    plan = lambda: batches(len(train), batch, 0, total, args.seed, rank, world)
    net.train()
    for step, ((index, _), imgs) in enumerate(zip(plan(), stream(train, plan(), device, args.workers), strict=True)):
        draws = my_rows(draw_mixes(args, step, batch), rank, world, device)
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)  # for drop path
        x = (crop_resize(imgs.float() / 255, draws["box"], draws["flip"], config["img_size"]) - mean) / std
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = mixed_loss(net, x, train.labels[index].to(device), draws["weight"], args.smoothing)
        scaler.scale(loss).backward()
        if world > 1:
            for p in net.parameters():
                if p.grad is not None:
                    p.grad.copy_(mean_over_processes(p.grad))
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * cosine(step, total, args.lr * batch / 256, 1e-6, warmup)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if (step + 1) % per_epoch == 0:
            if not loss.isfinite() or loss > 100 * math.log(len(train.classes)):
                raise InputError(f"the loss is {loss.item():.3g}: lower --lr")
            if rank == 0:
                print(f"epoch {(step + 1) // per_epoch}: loss {loss.item():.3f}", file=sys.stderr)
    seconds = time.perf_counter() - seconds
    net.eval()
    right = torch.zeros((), device=device)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        mine = test.pick(range(rank, len(test), world))
        keys = in_order(mine, 256)
        for (index, _), imgs in zip(keys, stream(mine, keys, device, args.workers), strict=True):
            logits = net(prepare(imgs, config["img_size"], config["mean"], config["std"]))
            right += (logits.argmax(dim=1) == mine.labels[index].to(device)).sum()
        gmacs = round(macs(vit.config, config["img_size"], args.drop_ratio, len(train.classes)) / 1e9, 4)
        result = dict(finetuned=round(100 * mean_over_processes(right).item() * world / len(test), 2))
        result.update(scratch=args.scratch, drop_ratio=args.drop_ratio, gmacs=gmacs)
        result.update(training_images_per_s=round(total * batch / seconds, 1), minutes=round(seconds / 60, 2))
        if args.drop_ratio:
            imgs = torch.stack([test[i, 0.5] for i in range(min(256, len(test)))]).to(device)
            result["speed"] = speed(net, prepare(imgs, config["img_size"], config["mean"], config["std"]))
    return result | dict(feature=net.feature)


def speed(net, imgs, turns=9):
    """Images per second with dropping over those without, measured in turns: the median ratio."""
    ratio, ratios = net.ratio, []
    for _ in range(turns):
        taken = []
        for net.ratio in (0.0, ratio):
            if imgs.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            net(imgs).sum().item()  # waits for the device
            taken.append(time.perf_counter() - start)
        ratios.append(taken[0] / taken[1])
    return round(float(np.median(ratios)), 3)


# -------------------------------------------------------------------------------------------------------------- common


def statistics(config, device):
    """Mean and standard deviation as (C, 1, 1) tensors."""
    return (torch.tensor(config[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))


def draw_mixes(args, step, batch):
    """All random numbers of a step, for the whole batch: a crop, a flip, and mixup's weight, at least one half."""
    g = seeded(args.seed, step)
    weight = torch.ones(batch, dtype=torch.float64)
    if args.mixup:
        weight = torch.from_numpy(np.random.default_rng([args.seed, step]).beta(args.mixup, args.mixup, batch))
    return dict(
        box=draw_boxes((batch, 1), args.canvas, args.crop_scale, args.aspect, g),
        flip=torch.rand((batch, 1), generator=g) < 0.5,
        weight=torch.maximum(weight, 1 - weight).float(),
    )


@cli
def main(argv=None):
    args = get_args(argv)
    device, rank, world = launch(args)
    vit, config = load_encoder(args.checkpoint, quiet=rank > 0)
    if args.img_size:
        config["img_size"] = [args.img_size] * 2
    if args.scratch:
        torch.manual_seed(args.seed)
        vit = ViT(**vit.config)
    args.data = args.data or config.get("data", "demo.npz")
    side = max(config["img_size"])
    args.canvas = side if side <= 64 else round(side * 8 / 7)
    args.aspect = config["img_size"][1] / config["img_size"][0]
    sets = load_labelled(args, config, args.canvas, rank, world, "a read-out")
    how = finetune if args.finetune else probe
    result = how(args, vit, sets, config, device, rank, world)
    settings = dict(
        checkpoint=str(args.checkpoint),
        method=config.get("method"),
        data=args.data,
        labels=args.labels,
        epochs=args.epochs,
    )
    result |= settings | dict(seed=args.seed, train=len(sets["train"]), test=len(sets["test"]))
    if rank == 0:
        print(json.dumps(result))
    return result


# ------------------------------------------------------------------------------ the same in every script, word for word


def draw_boxes(shape, side, scale, aspect, g):
    """Boxes y, x, height, width (*shape, 4) in px of a square image: RandomResizedCrop's rule for many at once.

    Area uniform in `scale`, log aspect ratio uniform in 3/4 to 4/3 (times that of the output); of ten tries the first
    that fits, else the whole image.
    """
    area = side**2 * torch.empty(*shape, 10).uniform_(*sorted(scale), generator=g)
    ratio = aspect * torch.empty(*shape, 10).uniform_(math.log(3 / 4), math.log(4 / 3), generator=g).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h >= 1) & (h <= side) & (w >= 1) & (w <= side)
    first = fits.int().argmax(-1, keepdim=True)
    h, w = (torch.where(fits, t, side).gather(-1, first)[..., 0] for t in (h, w))
    y, x = ((torch.rand(shape, generator=g) * (side - t + 1)).floor() for t in (h, w))
    return torch.stack([y, x, h, w], dim=-1)


def resize_weights(start, length, flip, out, side):
    """Rows that resample [start, start+length) of `side` pixels to `out`: (..., out, side), bicubic, antialiased.

    The cubic kernel has a = -0.5 and is stretched where the crop shrinks, as in Pillow and F.interpolate(antialias).
    """
    i = torch.arange(out, device=start.device)
    i = torch.where(flip[..., None], out - 1 - i, i)
    scale = (length / out)[..., None]
    center = start[..., None] + (i + 0.5) * scale
    pixel = torch.arange(side, device=start.device) + 0.5
    x = ((pixel - center[..., None]) / scale.clamp(min=1)[..., None]).abs()
    w = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, (((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2))
    start, length = start[..., None, None], length[..., None, None]
    w = w * ((pixel > start) & (pixel < start + length))
    return w / w.sum(dim=-1, keepdim=True)


def crop_resize(imgs, box, flip, size):
    """Crops (B, V, 4) of images (B, C, S, S), resized to `size`, some flipped: (V·B, C, h, w). Wy @ img @ Wxᵀ."""
    (y, x, h, w), side, c = box.unbind(-1), imgs.shape[-1], imgs.shape[1]
    wy = resize_weights(y, h, torch.zeros_like(flip), size[0], side)  # (B, V, h, S)
    wx = resize_weights(x, w, flip, size[1], side)  # (B, V, w, S)
    rows = rearrange(wy, "b v i s -> b (v i) s") @ rearrange(imgs, "b c s t -> b s (c t)")
    rows = rearrange(rows, "b (v i) (c t) -> (b v) (c i) t", c=c, i=size[0])
    crops = rows @ rearrange(wx, "b v j t -> (b v) t j")
    return rearrange(crops, "(b v) (c i) j -> (v b) c i j", v=box.shape[1], c=c).clamp(0, 1)


def cosine(step, total, start, end, warmup=0):
    """Linear from 0 to `start` over `warmup` steps, reached in the last of them, then a cosine to `end`."""
    warmup = round(warmup)
    if step < warmup:
        return start * step / max(1, warmup - 1)
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def seeded(seed, step):
    """The CPU generator of a step's random numbers, but drop path's: the same for any processes, workers, restarts."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)


def batches(n, batch, first, stop, seed, rank, world):
    """This process's image indices and places of squares, for the steps first to stop - 1; a new order each epoch."""
    for step in range(first, stop):
        epoch, at = divmod(step, n // batch)
        if step == first or at == 0:
            order = torch.randperm(n, generator=seeded(seed, -1 - epoch))
        mine = slice(rank * batch // world, (rank + 1) * batch // world)
        place = torch.rand(batch, generator=seeded(seed + 1, step))
        yield order[at * batch : (at + 1) * batch][mine].tolist(), place[mine].tolist()


def my_rows(draws, rank, world, device):
    """This process's rows of the whole batch's random numbers, on the device."""
    return {k: v.chunk(world)[rank].to(device, non_blocking=True) for k, v in draws.items()}


def mean_over_processes(x):
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


if __name__ == "__main__":
    main()
