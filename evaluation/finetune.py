"""Fine-tuning: the whole network is trained with labels, with or without dropping tokens on the way.

    python evaluation/finetune.py runs/dino-demo/last.pt --epochs 20
    python evaluation/finetune.py runs/dino-demo/last.pt --epochs 20 --scratch      # the same from random weights
    python evaluation/finetune.py runs/dino-demo/last.pt --drop-ratio 0.3           # PCAE's token dropping
    python evaluation/linear.py runs/finetune-dino-demo/classifier.pt --data photos/  # what was trained, elsewhere
    torchrun --nproc-per-node=2 evaluation/finetune.py runs/dino-demo/last.pt

AdamW, learning rates that fall with depth (layer decay), crops, flips, mixup, label smoothing, drop path, trained
positions (MAE, arXiv 2111.06377, appendix A.1). Mean tokens get a fresh LayerNorm (fc_norm) instead of the encoder's
final one. The folder (runs/finetune-NAME, after the run's folder or the file) has last.pt, to resume from,
classifier.pt, log.jsonl and curve.png.

Token dropping (PCAE, ICLR 2023, Table 5): inside three blocks, evenly spaced (blocks 3, 6, 9 of 12, counted from 0),
between attention and MLP, a share of the patch tokens is dropped: those most similar to their mean. CLS always stays,
means are over what is left. The paper does not say where it drops; this schedule comes nearest to its MACs.

Differs from the authors' code (MAE's): no RandAugment, random erasing and cutmix; crops of .35 to 1 of the image
(theirs: .08 to 1); mixup draws a weight for each image and mixes neighbours in the batch; the linear layer starts from
a standard deviation of .01 (theirs: 2e-5). --scratch is this recipe without layer decay, not theirs for training from
scratch.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_knn import open_encoder, open_labelled, report, shared_features
from linear import WITH_LABELS, Classifier, accuracies, save_classifier, share_of_labels, stages_of

# isort: off
from vit import InputError, ViT  # 1 network
from vit import crop_resize, sample_boxes  # 2 views
from vit import autocast, cosine, distribute, mean_over_processes, optimizer_step, processes, seeded  # 3 training step
from vit import shard, unwrap
from vit import batches, mean_and_std  # 4 images
from vit import COUNT, SHARE, Log, cli, describe, launch, options, resume, save, steps  # 7 runs

OPTIONS = WITH_LABELS | dict(
    out=(None, "folder for classifier.pt and the run (runs/finetune-NAME)"),
    epochs=(100, "length of the training", COUNT),
    scratch=(False, "from random weights; the checkpoint tells shape, data and feature"),
    drop_ratio=(0.0, "share of the patch tokens dropped at each of 3 stages", SHARE),
    lr=(1e-3, "learning rate for batch 256; scaled with the batch"),
    layer_decay=(None, "each block's rate over the next one's (0.75; from scratch 1)", dict(type=float)),
    drop_path=(0.1, "stochastic depth", SHARE),
    crop_scale=((0.35, 1.0), "area of the crops, share of the image"),
    mixup=(0.8, "alpha of the Beta distribution of weights; 0 turns mixup off"),
    smoothing=(0.1, "of labels, the share spread over all classes", SHARE),
    weight_decay=(0.05, "of weight matrices only"),
)


def sample_mixes(args, step, side):
    """All random numbers of a step, for the whole batch: a crop, a flip, and mixup's weight, at least one half."""
    g = seeded(args.seed, step)
    box, flip = sample_boxes((args.batch, 1), side, args.crop_scale, g), torch.rand((args.batch, 1), generator=g) < 0.5
    weight = torch.ones(args.batch, dtype=torch.float64)
    if args.mixup:  # by numpy, as torch's Beta takes no generator
        weight = torch.from_numpy(np.random.default_rng([args.seed, step]).beta(args.mixup, args.mixup, args.batch))
    weight = torch.maximum(weight, 1 - weight).float()  # an image weighs at least as much as its neighbour
    return dict(box=box, flip=flip, weight=weight)


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
        layer = depth + 1  # the last norm and the head
        if name.startswith("vit.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("vit.patch_embed", "vit.cls_token", "vit.pos_embed")):
            layer = 0
        decayed = p.ndim in (2, 4)  # linear layers and the convolution; cls_token and pos_embed have 3 dimensions
        key = (decay ** (depth + 1 - layer), weight_decay if decayed else 0.0)
        groups.setdefault(key, []).append(p)
    return [dict(params=p, factor=factor, weight_decay=wd) for (factor, wd), p in groups.items()]


def mixed_loss(net, imgs, labels, weight, smoothing):
    """Cross-entropy of weight · image + (1 - weight) · its neighbour, with both labels (Zhang et al., 1710.09412)."""
    other = torch.arange(len(imgs), device=imgs.device) ^ 1
    imgs = torch.lerp(imgs[other], imgs, weight.view(-1, 1, 1, 1))
    logits = net(imgs).float()
    loss = lambda y: F.cross_entropy(logits, y, label_smoothing=smoothing, reduction="none")
    return (weight * loss(labels) + (1 - weight) * loss(labels[other])).mean()


def finetune_step(model, optimizer, scaler, imgs, labels, draws, lr, size, args):
    """One optimiser step. Returns the loss, (), still on the device."""
    net = unwrap(model)
    x = (crop_resize(imgs.float() / 255, draws["box"], draws["flip"], size) - net.mean) / net.std
    with autocast(x.device, args.precision):
        loss = mixed_loss(model, x, labels, draws["weight"], args.smoothing)
    scaler.scale(loss).backward()
    optimizer_step(optimizer, scaler, lr, weight_decay=None, clip=0)  # each group keeps its own decay
    return loss.detach()


def finetune(args, vit, train, test, config, device):
    """Accuracy after fine-tuning, percent, and the MACs of what was trained; nothing on processes but the first."""
    (rank, world), feature = processes(), config["feature"]
    if args.labels < 1:
        train = train.pick(share_of_labels(train.labels, args.labels, args.seed))
    torch.manual_seed(args.seed)
    vit = ViT(**vit.config) if args.scratch else vit
    # No option, but compared like one: resume refuses a run that began with another encoder.
    args.encoder = sum(p.detach().double().abs().sum().item() for p in vit.parameters())
    vit.pos_embed.requires_grad_(True)
    for block, rate in zip(vit.blocks, torch.linspace(0, args.drop_path, len(vit.blocks)).tolist(), strict=True):
        block.drop_path = rate
    norm = "layer" if feature == "mean" else "none"
    net = Classifier(vit, len(train.classes), feature, norm=norm, ratio=args.drop_ratio).to(device)
    net.mean, net.std = mean_and_std(config, device)  # read by finetune_step
    optimizer = torch.optim.AdamW(layer_groups(net, args.layer_decay, args.weight_decay), lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    batch = min(args.batch, len(train)) // (2 * world) * 2 * world
    if not batch:
        few = f"--batch {args.batch} of {len(train)} training images"
        raise InputError(f"{few} is too few for {world} process(es): a pair for each, for mixup")
    if rank == 0 and batch < args.batch:
        print(f"warning: --batch {batch}, not {args.batch}: pairs for mixup, as many in each process")
    args.batch, args.method = batch, "finetune"
    name = Path(args.checkpoint).parent.name if Path(args.checkpoint).stem == "last" else Path(args.checkpoint).stem
    name += "-scratch" * args.scratch + f"-drop{args.drop_ratio}" * (args.drop_ratio > 0)
    args.out = args.out or f"runs/finetune-{name}"
    state, per_epoch = dict(net=net, optimizer=optimizer, scaler=scaler), len(train) // batch
    total, size = args.epochs * per_epoch, config["img_size"][0]
    describe(args, train, vit)
    first, lines = resume(args, state, len(train), total, __file__)
    log = Log(args, lines, first, total, optimizer)
    model = distribute(net.train())

    labels, peak, warmup = train.labels.to(device), args.lr * batch / 256, min(5, args.epochs / 10) * per_epoch
    indices = batches(len(train), batch, first, total, args.seed)  # of the images that steps() gives, for their labels
    for (step, imgs, leaving), index in zip(steps(train, args, log, device), indices, strict=True):
        lr = cosine(step, total, peak, 1e-6, warmup)
        draws = shard(sample_mixes(args, step, train.side), device)
        y = labels[torch.as_tensor(index).to(device, non_blocking=True)]
        loss = finetune_step(model, optimizer, scaler, imgs, y, draws, lr, size, args)
        if log.due(step, leaving):
            value = mean_over_processes(loss).item()
            log.step(step, loss=value, lr=lr)
            if not value < 100 * math.log(len(train.classes)):
                raise InputError(f"the loss is {value:.3g}: lower --lr")
        if (step + 1) % per_epoch == 0 and (step + 1 == total or not leaving):
            logits = shared_features(net.eval(), test, config, device, args.precision, args.batch, args.workers)
            net.train()
            accuracy = round(accuracies(logits[None], test.labels.to(device))[0], 2)
            log.accuracy(step, f"accuracy {accuracy:.1f} %", accuracy=accuracy)
        if log.save_due(step, leaving):
            save(args, state, vit, config | vit.config, step, log)  # its final norm may be gone, see Classifier
            log.draw_curve("accuracy")
    if rank > 0:
        return {}
    file, last = Path(args.out, "classifier.pt"), log.latest("accuracy", "seconds")
    save_classifier(file, net.eval(), config, train.classes)
    minutes = last["seconds"] / 60
    gmacs = macs(vit.config, config["img_size"], args.drop_ratio, len(train.classes)) / 1e9
    print(f"fine-tuned {last['accuracy']:.1f} %, {len(test)} test images, {minutes:.1f} minutes; saved in {file}")
    result = dict(finetuned=last["accuracy"], scratch=args.scratch, drop_ratio=args.drop_ratio, gmacs=round(gmacs, 4))
    result |= dict(feature=feature, norm=norm, train=len(train), test=len(test), minutes=round(minutes, 2))
    return result | dict(classifier=str(file))


def check(args):
    """Refuses options that make no sense; fills in --layer-decay."""
    if args.labels == 0 or args.drop_ratio == 1 or args.drop_path == 1 or args.smoothing == 1:
        raise InputError("--labels must be above 0; --drop-ratio, --drop-path and --smoothing below 1")
    if args.seed < 0 or args.mixup < 0 or (args.layer_decay is not None and args.layer_decay <= 0):
        raise InputError("--seed and --mixup must be 0 or more, --layer-decay above 0")
    if not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        raise InputError("--crop-scale must be two shares of the image, the smaller one first")
    args.layer_decay = args.layer_decay or (1.0 if args.scratch else 0.75)
    args.crop_scale = list(args.crop_scale)  # as resume finds it in last.pt


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv)
    check(args)
    device = launch(args)
    vit, config = open_encoder(args)
    if "classes" in config:
        raise InputError(f"{args.checkpoint} is a classifier: evaluation/linear.py applies it")
    train, test = open_labelled(args, config)
    config["feature"] = args.feature or config["feature"]
    return report("finetune", args, config, finetune(args, vit, train, test, config, device))


if __name__ == "__main__":
    main()
