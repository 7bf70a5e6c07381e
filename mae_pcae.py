"""MAE reconstructs the pixels of hidden patches; PCAE predicts a momentum encoder's features, at few places.

MAE: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
PCAE: Li et al., "Progressively Compressed Auto-Encoder for Self-supervised Representation Learning", ICLR 2023,
openreview 8T4qmZbTkW7.

    python mae_pcae.py                                        # MAE on the images that come with it; minutes on a laptop
    python mae_pcae.py --method pcae
    python mae_pcae.py --data cifar10 --epochs 400            # downloads; or a folder of images
    torchrun --nproc-per-node=2 mae_pcae.py --data photos/    # several processes, the same batch
    python mae_pcae.py --reconstruct cat.jpg                  # what the first of these makes of a picture of yours

Measured (n = 3 seeds): `python mae_pcae.py`, k-NN 69.8 ± 1.7 % in 2.7 minutes on 2 CPU cores; with --method pcae
56.1 ± 1.2 % in 4.2; untrained 29.9, raw pixels 25.1 (RESULTS.md).

The idea of MAE. Hide most patches (three quarters; half in the demo); the encoder sees only the rest, so it is cheap; a
small decoder gets its output and a mask token for each hidden patch, and must paint what was there. Recognising what is
seen makes that easier.

The idea of PCAE. Predict features in place of pixels, those of a momentum encoder that sees exactly the patches the
student does not. Tokens of an image are redundant: the momentum encoder drops, stage by stage, those most like the mean
token, whose content attention has by then spread to others. The student predicts the few that are left.

Differs from the authors' code:
- Crops and flips run on the device, for the whole batch, without rounding to 8 bits; images above 64 px come as random
  squares, --canvas px wide. Mean and std are those of the data at hand.
- The encoder's linear layers start from a truncated normal of 0.02, its patches from PyTorch's (theirs: Xavier-uniform,
  which the decoder has here too: with small weights it takes long to look beyond positions). --norm-pix is on.
- The decoder's last block computes the predicted places alone, as nothing else is read. The output is the same.
- PCAE: the paper's criterion, cosine to the mean token (theirs: to the mean of unit vectors, --criterion unit). The
  teacher always starts as a copy of the student and moves once in an optimiser step (theirs: copied only when
  distributed, moved in every micro-batch). Predictions have the encoder's width (theirs: that of a patch's pixels).
  No drop path, and never in the decoder (theirs: up to .25 in the encoder, .25 in every decoder block).
- A non-finite gradient skips the step. --batch counts all processes and micro-batches.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.utils import make_grid, save_image

from vit import (
    DTYPES,
    SIZES,
    Block,
    InputError,
    Linear,
    Run,
    ViT,
    check_plan,
    cli,
    common_options,
    launch,
    load_checkpoint,
    load_splits,
    positive,
    prepare,
    read_square,
    resolve,
    sincos,
    start_from,
    stream,
)

# --------------------------------------------------------------------------------------------------- options, presets

PRESETS = {  # chosen by the size of the images; "224": the defaults of the authors' code, for ViT-B/16
    "demo": dict(size="nano", patch=4, img_size=32, epochs=16, warmup=2, batch=64, lr=8e-3, mask_ratio=0.5,
                 decoder_dim=64, decoder_depth=2, decoder_heads=4, drop_path=0.0, momentum=0.998, keep=0.8),
    "32": dict(size="tiny", patch=4, img_size=None, epochs=400, warmup=20, batch=512, lr=1e-3, mask_ratio=0.75,
               decoder_dim=128, decoder_depth=4, decoder_heads=4, drop_path=0.0, momentum=0.996, keep=0.5),
    "96": dict(size="small", patch=8, img_size=96, epochs=400, warmup=20, batch=512, lr=3e-4, mask_ratio=0.75,
               decoder_dim=256, decoder_depth=4, decoder_heads=8, drop_path=0.0, momentum=0.996, keep=0.5),
    "224": dict(size="base", patch=16, img_size=224, epochs=400, warmup=40, batch=4096, lr=1.5e-4, mask_ratio=0.75,
                decoder_dim=512, decoder_depth=8, decoder_heads=16, drop_path=0.0, momentum=0.9999, keep=0.5),
}  # fmt: skip
PCAE_PRESETS = {"demo": dict(epochs=24, batch=32)}  # where it wants other values than MAE


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(p, PRESETS)
    add = p.add_argument
    add("--method", choices=METHODS, default="mae", help="mae: pixels; pcae: features of a momentum encoder")
    add("--mask-ratio", type=float, help="* share of the patches that the encoder does not see")
    add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="MAE: each patch's pixels standardised")
    add("--decoder-dim", type=positive, help="* width of the decoder")
    add("--decoder-depth", type=positive, help="* blocks of the decoder")
    add("--decoder-heads", type=positive, help="* attention heads of the decoder")
    add("--stages", type=int, nargs="*", help="PCAE: blocks, from 0, to drop tokens after (0, 1/3, 2/3; empty: none)")
    add("--keep", type=float, help="* PCAE: share of the tokens that a stage keeps")
    add("--criterion", choices=CRITERIA, default="mean", help="PCAE: drops those most like the mean, or at random")
    add("--momentum", type=float, help="* of the teacher at the beginning, 1 at the end; short runs want less")
    add("--clip", type=float, default=0.0, help="gradient norm limit, 0: none (DINO, hybrid: of each tensor)")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end of its cosine")
    add(
        "--weight-decay",
        type=float,
        nargs=2,
        default=[0.05, 0.05],
        help="not of biases and norms; from, to, by a cosine",
    )
    add("--crop-scale", type=float, nargs=2, default=[0.2, 1.0], help="area of the crop, share of image")
    add("--reconstruct", nargs="+", metavar="IMAGE", help="draw what the run in --out makes of these files, and stop")
    args = p.parse_args(argv)
    differ = PCAE_PRESETS if args.method == "pcae" else {}
    args = resolve(args, {name: preset | differ.get(name, {}) for name, preset in PRESETS.items()}, args.method)
    n = math.prod(ViT.grid_of(args.img_size, args.patch))
    if not 0 < int(n * (1 - args.mask_ratio)) < n:
        raise InputError(f"--mask-ratio {args.mask_ratio} leaves all or none of {n} patches visible")
    if not 0 < args.keep <= 1:
        raise InputError(f"--keep {args.keep} is not a share of the tokens, above 0 and up to 1")
    if any(not 0 <= i < SIZES[args.size]["depth"] for i in args.stages or ()):
        raise InputError(f"--stages {args.stages}: blocks are numbered 0 to {SIZES[args.size]['depth'] - 1}")
    return args


# --------------------------------------------------------------------------------------------------- views and masks


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


def draw_numbers(args, step):
    """All random numbers of a step, for the whole batch: a crop, a flip, and noise that orders the patches (B, N)."""
    g, (h, w) = seeded(args.seed, step), args.img_size
    return dict(
        box=draw_boxes((args.batch, 1), args.canvas, args.crop_scale, w / h, g),
        flip=torch.rand((args.batch, 1), generator=g) < 0.5,
        noise=torch.rand((args.batch, h * w // args.patch**2), generator=g),
    )


def random_masking(noise, ratio):
    """Splits the patches of each image by its own noise (B, N): the smallest stay visible (MAE, section 3).

    Returns the indices of visible patches (B, n), n = int(N (1 - ratio)), and of hidden ones (B, N - n).
    """
    order = noise.argsort(dim=1)
    return order.tensor_split([int(noise.shape[1] * (1 - ratio))], dim=1)


def take(x, index):
    """Tokens x (B, N, D) at index (B, n): (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def patchify(imgs, patch):
    """(B, C, h·P, w·P) -> (B, h·w, P·P·C), channels last, as MAE's."""
    return rearrange(imgs, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(x, patch, grid):
    """The inverse of patchify, for a grid (h, w) of patches."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch, q=patch)


# ----------------------------------------------------------------------------------------------------- models, losses


def standardise(x):
    """Every token to mean 0 and variance 1 over its entries (MAE's normalised pixels; PCAE's target)."""
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6).sqrt()


class MAE(nn.Module):
    """Encoder on visible patches, light decoder on all (MAE, Figure 1). shape: the ViT's arguments; args: options."""

    picture = "reconstruction.png"

    def __init__(self, shape, args, drop_path=0.0, out=None, pos="sincos"):
        super().__init__()
        self.vit = ViT(**shape, pos=pos, drop_path=drop_path)
        self.patch, self.mask_ratio, self.norm_pix, dim = args.patch, args.mask_ratio, args.norm_pix, args.decoder_dim
        y, x = torch.meshgrid(*map(torch.arange, self.vit.grid), indexing="ij")
        places = F.pad(sincos(y.flatten(), x.flatten(), dim), (0, 0, 1, 0))[None]  # CLS: zeros
        self.decoder_embed = Linear(self.vit.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(places, requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(dim, args.decoder_heads) for _ in range(args.decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = Linear(dim, out or args.patch**2 * shape["in_chans"])
        for m in [self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred]:
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def encode(self, imgs, visible):
        """(B, C, height, width), visible (B, n) -> (B, 1+n, D)."""
        x = self.vit.embed(imgs, visible)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x)

    def decode(self, latent, visible, wanted):
        """latent (B, 1+n, D) of patches `visible` (B, n) -> predictions for patches `wanted` (B, m): (B, m, out)."""
        pos = self.decoder_pos_embed.expand(len(latent), -1, -1)
        here = torch.cat([pos[:, :1], take(pos[:, 1:], visible)], dim=1)
        x = torch.cat([self.mask_token + take(pos[:, 1:], wanted), self.decoder_embed(latent) + here], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, queries=wanted.shape[1])  # those come first; nothing else is read
        return self.decoder_pred(self.decoder_norm(x))

    def forward(self, imgs, noise):
        """Mean squared error on hidden patches (section 3). Returns loss, and spread of prediction and of target."""
        visible, hidden = random_masking(noise, self.mask_ratio)
        latent = self.encode(imgs, visible)
        pred = self.decode(latent, visible, hidden).float()
        target = take(patchify(imgs, self.patch), hidden)
        target = standardise(target) if self.norm_pix else target
        return (pred - target).square().mean(), spread(pred), spread(target)

    def start_teacher(self):
        """Nothing to do: MAE has no teacher."""

    def after_step(self, momentum, ok):
        """Nothing to do: MAE has no teacher."""


CRITERIA = dict(  # redundancy of each token of x (B, N, D), as (B, N): the most redundant are dropped
    mean=lambda x: F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1),  # the paper's sim(X, mean of X)
    unit=lambda x: (F.normalize(x, dim=-1) * F.normalize(x, dim=-1).mean(dim=1, keepdim=True)).sum(
        dim=-1
    ),  # the code's
    random=lambda x: torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]),  # random_masking's random order
)


class PCAE(MAE):
    """The same encoder and decoder; the target is a momentum encoder's features at the few patches that it keeps."""

    picture = "tokens.png"

    def __init__(self, shape, args, drop_path=0.0):
        super().__init__(shape, args, drop_path, out=shape["dim"])
        self.teacher = ViT(**shape, pos="sincos").requires_grad_(False)
        depth = shape["depth"]
        self.stages = args.stages if args.stages is not None else [depth // 3 * i for i in range(3)]
        self.keep, self.redundancy = args.keep, CRITERIA[args.criterion]
        self.start_teacher()

    def start_teacher(self):
        self.teacher.load_state_dict(self.vit.state_dict())

    @torch.no_grad()
    def compress(self, imgs, index):
        """The teacher on the patches `index` (B, m), without CLS. Tokens left at the end (B, r, D), and a list of the
        indices left after each stage, (B, m_1), (B, m_2), ...; the last are the tokens' own.
        """
        x, left = self.teacher.embed(imgs, index)[:, 1:], []
        for i, block in enumerate(self.teacher.blocks):
            x = block(x)
            if i in self.stages:
                best = self.redundancy(x.float()).topk(max(1, int(x.shape[1] * self.keep)), dim=1, largest=False)[1]
                x, index = take(x, best), index.gather(1, best)
                left.append(index)
        return self.teacher.norm(x), left

    def forward(self, imgs, noise):
        """1 - cosine of prediction and standardised features. Returns loss, spread of prediction and of raw target."""
        visible, hidden = random_masking(noise, self.mask_ratio)
        target, left = self.compress(imgs, hidden)  # the teacher sees exactly what the student does not
        target = target.float()
        latent = self.encode(imgs, visible)
        pred = self.decode(latent, visible, left[-1] if left else hidden).float()
        loss = 1 - F.cosine_similarity(pred, standardise(target), dim=-1).mean()
        return loss, spread(pred), spread(target)

    def after_step(self, momentum, ok):
        ema_update(self.teacher, self.vit, (1 - momentum) * ok)


METHODS = dict(mae=MAE, pcae=PCAE)


def spread(x):
    """Std over tokens and images, mean over entries: 0 if all are alike, not if places differ. (B, n, D) -> ()."""
    return x.detach().flatten(0, 1).std(dim=0).mean()


def train_step(net, update, imgs, draws, args, momentum, mean, std):
    """One optimiser step. imgs: uint8 (B, C, S, S). draws: what draw_numbers gave. update: an Update.

    Returns (4,): loss, spread of prediction and of target, gradient norm, still on the device: nothing waits for them.
    """
    total = 0
    for x, d in zip(split_rows(imgs, args.accumulate), split_rows(draws, args.accumulate), strict=True):
        x = (crop_resize(x.float() / 255, d["box"], d["flip"], args.img_size) - mean) / std
        with update.autocast():
            loss, pred, target = net(x, d["noise"])
        update.backward(loss / args.accumulate)
        total += torch.stack([loss.detach(), pred, target]) / args.accumulate
    ok, norm = update.step(clip_all=args.clip)  # ok is 0 where the gradient was not finite: then nothing moves
    net.after_step(momentum, ok)
    return torch.cat([total, norm[None]])


# ------------------------------------------------------------------------------------------------------------ pictures


@torch.no_grad()
def draw(net, x, config, file, tile=96):
    """For each of x (B, C, h, w), MAE: masked, reconstructed, original; PCAE: original, visible, hidden, each stage."""
    net.eval()
    noise = torch.rand((len(x), math.prod(net.vit.grid)), generator=seeded(0, 0)).to(x.device)
    visible, hidden = random_masking(noise, net.mask_ratio)
    patches = patchify(x, net.patch)
    mean, std = (torch.tensor(config[k], device=x.device).view(-1, 1, 1) for k in ("mean", "std"))

    def shown(index):  # only these patches, the rest grey
        mask = torch.zeros(patches.shape[:2], device=x.device).scatter(1, index, 1.0)[..., None]
        return unpatchify(patches * mask, net.patch, net.vit.grid)

    if isinstance(net, PCAE):
        columns = [x, shown(visible), shown(hidden), *(shown(index) for index in net.compress(x, hidden)[1])]
    else:
        pred, target = net.decode(net.encode(x, visible), visible, hidden).float(), take(patches, hidden)
        if net.norm_pix:  # back to pixels, by the mean and variance of the patch itself
            pred = pred * (target.var(dim=-1, keepdim=True) + 1e-6).sqrt() + target.mean(dim=-1, keepdim=True)
        painted = patches.scatter(1, hidden[..., None].expand(-1, -1, patches.shape[-1]), pred)
        columns = [shown(visible), unpatchify(painted, net.patch, net.vit.grid), x]
    rows = (torch.stack(columns, dim=1).flatten(0, 1) * std + mean).clamp(0, 1)
    rows = rows[:, [0, 1, 2] if rows.shape[1] == 3 else [0, 0, 0]]
    size = [tile * s // max(x.shape[-2:]) for s in x.shape[-2:]]
    save_image(make_grid(F.interpolate(rows, size=size).cpu(), nrow=len(columns), padding=2, pad_value=1), file)
    net.train()


def reconstruct_files(args, device):
    """--reconstruct: the pictures for image files of the user's, from the run in --out."""
    file = Path(args.out) / "last.pt"
    state = load_checkpoint(file)
    if "net" not in state or "decoder_pred.weight" not in state["net"]:
        raise InputError(f"{file} has no decoder, so it cannot reconstruct: give the --out of a run of this script")
    config = state["config"]
    options = argparse.Namespace(**state["options"])  # those it was trained with
    net = METHODS[config["method"]](shape_of(options, config["in_chans"]), options).to(device)
    net.load_state_dict(state["net"])
    for name in args.reconstruct:
        img = read_square(name, max(config["img_size"]), config["in_chans"]).to(device)
        out = Path(args.out) / f"reconstruction-{Path(name).stem}.png"
        draw(net, prepare(img, config["img_size"], config["mean"], config["std"]), config, out)
        print(out)


# ---------------------------------------------------------------------------------------------------------------- main


def shape_of(args, in_chans):
    return dict(SIZES[args.size], img_size=args.img_size, patch=args.patch, in_chans=in_chans)


def check_momentum(args, total):
    """Warns when much of the initial teacher would remain to the end (.9999: 37 % after 20,000 steps)."""
    remains = math.prod(cosine(s, total, args.momentum, 1.0) for s in range(total))
    if remains > 0.1:
        print(f"warning: {remains:.0%} of the initial teacher would remain after {total} steps: lower --momentum")


@cli
def main(argv=None):
    args = get_args(argv)
    device, rank, world = launch(args)
    if args.reconstruct:
        return reconstruct_files(args, device)
    run = Run(args, rank, world)
    train, test = load_splits(args, rank)
    check_plan(args, len(train), world, rank)

    torch.manual_seed(args.seed)
    net = METHODS[args.method](shape_of(args, train.channels), args, args.drop_path).to(device)
    config = dict(net.vit.config, method=args.method, data=args.data, feature="mean")
    config["mean"], config["std"] = train.stats()
    if args.init:
        start_from(args.init, dict(net=net), net.vit, config)
        net.start_teacher()

    mean, std = (torch.tensor(config[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))
    update = Update([net], device, args.precision, betas=(0.9, 0.95))
    parts = dict(net=net, update=update)
    run.begin(parts, net.vit, config, train, test, device)
    if rank == 0 and args.method == "pcae":
        check_momentum(args, run.total)
    if args.compile:
        net.compile(dynamic=False)

    keys = batches(len(train), args.batch, run.first, run.stop, args.seed, rank, world)
    for step, imgs in run.steps(stream(train, keys, device, args.workers)):
        lr = cosine(step, run.total, args.lr * args.batch / 256, args.min_lr, args.warmup * run.steps_per_epoch)
        update.set(lr, cosine(step, run.total, *args.weight_decay))
        momentum = cosine(step, run.total, args.momentum, 1.0)
        draws = my_rows(draw_numbers(args, step), rank, world, device)
        stats = train_step(net, update, imgs, draws, args, momentum, mean, std)

        if run.log_due(step):  # here alone the host waits for the device
            loss, pred, target, norm = mean_over_processes(stats).tolist()
            row = dict(loss=loss, pred_std=pred, target_std=target, grad_norm=norm, lr=lr)
            flat = "COLLAPSED: predictions or targets no longer differ" if min(pred, target) < 1e-3 else None
            warm = step >= args.warmup * run.steps_per_epoch
            run.log(step, row, update.skipped.tolist(), flat if warm else None)
        if run.save_due(step):
            run.save(step)
            if rank == 0:
                sample = prepare(run.sample, args.img_size, config["mean"], config["std"])
                draw(net, sample, config, run.out / net.picture)
    return run.finish()


# ------------------------------------------------------------------------------ the same in every script, word for word


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


def split_rows(x, n):
    """Micro-batches of a tensor, or of a dict of tensors."""
    if torch.is_tensor(x):
        return x.chunk(n)
    return [dict(zip(x, rows, strict=True)) for rows in zip(*(v.chunk(n) for v in x.values()), strict=True)]


def mean_over_processes(x):
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


@torch.no_grad()
def ema_update(teacher, student, weight):
    """teacher += weight (student - teacher), in three kernels. weight: tensor (), 0 in a skipped step."""
    old, new = list(teacher.parameters()), list(student.parameters())
    change = torch._foreach_sub(new, old)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(old, change)


class Update:
    """AdamW and what surrounds it: precision, processes, clipping, and steps skipped where a gradient is not finite."""

    def __init__(self, modules, device, precision, betas=(0.9, 0.999)):
        params = [p for m in modules for p in m.parameters() if p.requires_grad]
        decay, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]  # rest: biases and norms
        groups = [dict(params=decay), dict(params=rest, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.dtype = DTYPES[precision]
        self.device, self.skipped = device, torch.zeros(2, device=device)  # skipped steps: in all, and in a row

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def set(self, lr, weight_decay):
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.param_groups[0]["weight_decay"] = weight_decay

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    @torch.no_grad()
    def step(self, clip_each=0, clip_all=0):
        """Clips (each tensor's norm, or that of all) and steps. Returns ok, 0 or 1, and the norm before clipping."""
        grads = [p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        if dist.is_initialized():
            flat = mean_over_processes(torch.cat([g.flatten() for g in grads]))
            torch._foreach_copy_(
                grads, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
            )
        self.scaler.unscale_(self.optimizer)
        norms = torch.stack(torch._foreach_norm(grads))
        norm = norms.norm()
        if clip_each or clip_all:
            scale = clip_each / (norms + 1e-6) if clip_each else clip_all / (norm + 1e-6).expand(len(norms))
            torch._foreach_mul_(grads, list(scale.clamp(max=1).unbind()))
        ok = norm.isfinite().float()
        self.optimizer.found_inf = 1 - ok  # the fused kernels then leave weights, moments and step counts as they are
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler.update()
        self.skipped = (self.skipped + 1 - ok) * torch.stack([torch.ones_like(ok), 1 - ok])
        return ok, norm.where(ok > 0, 0.0)

    def state_dict(self):
        return dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), skipped=self.skipped)

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"].to(self.device)


if __name__ == "__main__":
    main()
