"""DINO: a student network learns to give every crop of an image the output that its own moving average gives another.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv 2104.14294.

    python dino.py                                      # the images that come with it; minutes on a laptop
    python dino.py --data cifar10 --epochs 100          # downloads; or a folder of images, with or without classes
    torchrun --nproc-per-node=2 dino.py --data photos/  # several processes, the same batch
    python dino.py --ablate no-centering                # watch it collapse
    python dino.py --attention cat.jpg                  # where the first of these runs looks in a picture

Measured: `python dino.py`, k-NN 67.0 ± 2.6 % (n = 3 seeds) in 3.7 minutes on 2 CPU cores; untrained 35.2, raw pixels
25.1 (RESULTS.md).

The idea. Two networks of one architecture see different crops of an image; the student is trained to match the
teacher's distribution over K prototypes, and the teacher is an exponential moving average of the student. Small crops
go to the student only, so it learns to infer the whole from a part. Two opposite forces prevent a constant output:
centring keeps any one prototype from winning always, sharpening keeps the distribution from becoming uniform.

Differs from the authors' code:
- Augmentation runs on the device, in batch: colour operations in a fixed order (torchvision draws the order for each
  image), no rounding to 8 bits in between, a true Gaussian blur (Pillow's: box blurs), sigma in px of a 224 px image.
- Images come as squares of --canvas px, at a random place if oblong, and crops are taken from these (theirs: from the
  image).
- Positions are interpolated to an explicit size (see vit.py); mean and std are those of the data at hand.
- The last block computes the CLS token alone, as nothing else is read. The output is the same.
- A non-finite gradient skips the step (theirs: a non-finite loss ends the run).
- --batch counts all processes and micro-batches; precision is bf16 where the hardware has it (theirs: fp16).
- The teacher's temperature warms up by the step (theirs: by the epoch).
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
    InputError,
    Linear,
    Run,
    ViT,
    check_plan,
    cli,
    common_options,
    launch,
    linear,
    load_encoder,
    load_splits,
    prepare,
    read_square,
    resolve,
    start_from,
    stream,
)

# --------------------------------------------------------------------------------------------------- options, presets

PRESETS = {  # chosen by the size of the images; "224" is the authors' 100 epochs of ViT-S/16
    "demo": dict(size="nano", patch=4, img_size=32, epochs=8, warmup=1, batch=64, lr=2e-3, prototypes=256, hidden=512,
                 global_scale=[0.5, 1.0], local_crops=2, local_size=16, local_scale=[0.25, 0.5], color=0.0,
                 momentum=0.98, center_momentum=0.5, teacher_temp=0.02, drop_path=0.0),
    "32": dict(size="tiny", patch=4, img_size=None, epochs=100, warmup=10, batch=256, lr=1e-3, prototypes=4096,
               hidden=2048, global_scale=[0.4, 1.0], local_crops=6, local_size=16, local_scale=[0.1, 0.4], color=1.0,
               momentum=0.99, center_momentum=0.9, teacher_temp=0.04, drop_path=0.1),
    "96": dict(size="small", patch=8, img_size=96, epochs=100, warmup=10, batch=256, lr=5e-4, prototypes=8192,
               hidden=2048, global_scale=[0.4, 1.0], local_crops=6, local_size=48, local_scale=[0.05, 0.4], color=1.0,
               momentum=0.996, center_momentum=0.9, teacher_temp=0.04, drop_path=0.1),
    "224": dict(size="small", patch=16, img_size=224, epochs=100, warmup=10, batch=512, lr=5e-4, prototypes=65536,
                hidden=2048, global_scale=[0.4, 1.0], local_crops=8, local_size=96, local_scale=[0.05, 0.4], color=1.0,
                momentum=0.996, center_momentum=0.9, teacher_temp=0.04, drop_path=0.1),
}  # fmt: skip
ABLATIONS = ("no-centering", "no-sharpening", "no-momentum", "no-multicrop", "mse", "infonce")


def get_args(argv=None, presets=PRESETS, method="dino"):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(p, presets)
    add = p.add_argument
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end of its cosine")
    add(
        "--weight-decay",
        type=float,
        nargs=2,
        default=[0.04, 0.4],
        help="not of biases and norms; from, to, by a cosine",
    )
    add("--clip", type=float, default=3.0, help="gradient norm limit, 0: none (DINO, hybrid: of each tensor)")
    add("--prototypes", type=int, help="* K, outputs of the head; small data wants fewer")
    add("--hidden", type=int, help="* width of the head's hidden layers")
    add("--norm-last-layer", action=argparse.BooleanOptionalAction, default=True, help="unit prototypes: more stable")
    add("--freeze-last-layer", type=int, default=1, help="epochs in which prototypes stay fixed; more if loss rises")
    add("--local-crops", type=int, help="* small crops of an image, seen by the student only")
    add("--local-size", type=int, help="* their side, px")
    add("--global-scale", type=float, nargs=2, help="* area of the two large crops, share of image; alone: .14 1")
    add("--local-scale", type=float, nargs=2, help="* area of the small crops, share of image")
    add("--color", type=float, help="* strength of jitter, grey and solarization; 1 as published")
    add("--momentum", type=float, help="* of the teacher at the beginning, 1 at the end; short runs want less")
    add("--momentum-end", type=float, default=1.0, help="of the teacher at the end")
    add("--center-momentum", type=float, help="* of the centre; less if one prototype wins and then another")
    add("--student-temp", type=float, default=0.1, help="temperature of the student's softmax")
    add("--teacher-temp", type=float, help="* of the teacher's; lower it if the loss stays at ln K")
    add("--teacher-temp-start", type=float, help="teacher's temperature in the first step (--teacher-temp)")
    add("--teacher-temp-epochs", type=float, default=30, help="epochs from --teacher-temp-start to the other")
    add("--ablate", choices=ABLATIONS, help="take a part of the method away, to see what it was there for")
    add("--attention", nargs="+", metavar="IMAGE", help="draw what the run in --out looks at in these files, and stop")
    args = resolve(p.parse_args(argv), presets, method)
    if args.local_crops and args.local_size % args.patch:
        raise InputError(
            f"--local-size {args.local_size} is not a multiple of --patch {args.patch}: change one of them"
        )
    return args


# ------------------------------------------------------------------------------------------- views: crops and colours


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


def draw_views(batch, views, side, size, scale, blur, solarize, color, g):
    """All random numbers of `views` crops of each image, a dict of (batch, views, ...): BYOL's augmentation (DINO, §3).

    blur, solarize: probability for each view. color: strength, 1 as published. Sigma: 0.1 to 2 px of a 224 px image.
    """
    shape = (batch, views)
    rand = lambda: torch.rand(shape, generator=g)
    draws = dict(box=draw_boxes(shape, side, scale, size[1] / size[0], g), flip=rand() < 0.5)
    jitter = rand() < 0.8  # one coin for all four
    factor = lambda neutral, width: torch.where(jitter, neutral + color * width * (2 * rand() - 1), neutral)
    draws |= dict(brightness=factor(1.0, 0.4), contrast=factor(1.0, 0.4), saturation=factor(1.0, 0.2))
    draws |= dict(hue=factor(0.0, 0.1), gray=(rand() >= 0.2 * color).float())  # gray: 0 makes it grey
    sigma = 0.1 + 1.9 * rand()
    draws["sigma"] = sigma.where(rand() < torch.tensor(blur), 0.0)
    draws["solarize"] = rand() < color * torch.tensor(solarize)
    return draws


def draw_crops(args, step):
    """All random numbers of a step, for the whole batch: those of the two global views, and of the local ones."""
    g, side, local = seeded(args.seed, step), args.canvas, [args.local_size] * 2
    return (
        draw_views(
            args.batch,
            2,
            side,
            args.img_size,
            args.global_scale,
            blur=[1.0, 0.1],
            solarize=[0.0, 0.2],
            color=args.color,
            g=g,
        ),
        draw_views(
            args.batch,
            args.local_crops,
            side,
            local,
            args.local_scale,
            blur=[0.5],
            solarize=[0.0],
            color=args.color,
            g=g,
        ),
    )


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


def gray(x):  # (B, 3, h, w) -> (B, 1, h, w), luma of ITU-R 601
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def blend(x, other, factor):  # other + factor (x - other): brightness, contrast and saturation are all this
    return torch.lerp(other, x, factor).clamp(0, 1)


def shift_hue(x, shift):
    """Hue turned by `shift` (B, 1, 1, 1), a share of the circle; HSV's value and saturation stay."""
    top, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    chroma = top - low
    r, g, b = x.split(1, dim=1)
    sector = torch.where(top == r, (g - b), torch.where(top == g, (b - r), (r - g)))
    offset = torch.where(top == r, 0.0, torch.where(top == g, 2.0, 4.0))
    hue = sector / chroma.clamp(min=1e-8) + offset + 6 * shift
    k = (hue + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6  # 5, 3, 1 for red, green, blue
    return top - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, radius):
    """Blur with sigma (B,) px, kernel 2 radius + 1, reflected borders: two small matrix products, as for crops."""

    def matrix(n):
        r = min(radius, n - 1)
        k = torch.arange(-r, r + 1, device=x.device)
        weight = torch.exp(-0.5 * (k / sigma[:, None].clamp(min=1e-3)) ** 2)
        source = (torch.arange(n, device=x.device)[:, None] + k).abs()  # pixel i takes weight k from pixel i + k,
        source = torch.where(source < n, source, 2 * n - 2 - source)  # reflected at the borders
        spread = F.one_hot(source, n).to(x)  # (n, 2r+1, n)
        return torch.einsum("bk,ikj->bij", weight / weight.sum(dim=1, keepdim=True), spread)[:, None]

    return matrix(x.shape[-2]) @ x @ matrix(x.shape[-1]).transpose(-2, -1)


def augment(imgs, draws, size, unit, mean, std):
    """uint8 (B, C, S, S) and draw_views' numbers -> normalised views (V·B, C, h, w), view by view.

    unit: px of these views per px of a 224 px image, for blur. mean, std: (C, 1, 1), on the device. Jitter and grey
    need three channels, or are left out.
    """
    x = crop_resize(imgs.float() / 255, draws["box"], draws["flip"], size)
    d = {k: rearrange(v, "b v -> (v b) 1 1 1") for k, v in draws.items() if k != "box"}
    if x.shape[1] == 3:
        x = (x * d["brightness"]).clamp(0, 1)
        x = blend(x, gray(x).mean(dim=(2, 3), keepdim=True), d["contrast"])
        x = blend(x, gray(x), d["saturation"])
        x = shift_hue(x, d["hue"])
        x = blend(x, gray(x), d["gray"])
    x = gaussian_blur(x, d["sigma"].flatten() * unit, radius=math.ceil(6 * unit))
    x = torch.where(d["solarize"] & (x >= 0.5), 1 - x, x)
    return (x - mean) / std


# ------------------------------------------------------------------------------------------------------ model and loss


class DINOHead(nn.Module):
    """Projection head (appendix C): three layers, L2 bottleneck, K prototypes of unit norm. (B, D) -> (B, K)."""

    def __init__(self, dim, prototypes, hidden=2048, bottleneck=256, norm_last_layer=True):
        super().__init__()
        self.mlp = nn.Sequential(
            Linear(dim, hidden), nn.GELU(), Linear(hidden, hidden), nn.GELU(), Linear(hidden, bottleneck)
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(
            torch.empty(prototypes, bottleneck).uniform_(-(bottleneck**-0.5), bottleneck**-0.5)
        )
        self.length = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)
        self.norm_last_layer = norm_last_layer

    def freeze_last_layer(self, frozen):
        self.prototypes.requires_grad_(not frozen)
        self.length.requires_grad_(not frozen and not self.norm_last_layer)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        scale = self.length[:, 0] / self.prototypes.norm(dim=1)  # weight normalisation, without a copy of the weights
        return linear(x, self.prototypes) * scale


class DINO(nn.Module):
    """Backbone and head, for student and teacher. Takes views of several sizes: a list of (V_i·B, C, h, w)."""

    def __init__(self, vit, head):
        super().__init__()
        self.vit, self.head = vit, head

    def forward(self, views):  # -> (V·B, K)
        return self.head(torch.cat([self.vit.cls(x) for x in views]))


def dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04):
    """Cross-entropy H(P_t(x), P_s(x')), mean over images and pairs of different views (section 3).

    student (V, B, K), teacher (2, B, K): outputs before softmax, the two global views first; center (K,).
    Returns the loss, the teacher's entropy h(P_t), and loss - h = KL(P_t || P_s), 0 in a collapse (section 5.3).
    As q sums to one, a pair's cross-entropy is logsumexp(z) - q·z, and a sum over pairs needs only the sum of all z.
    """
    t, z = (teacher - center) / teacher_temp, student / student_temp
    q, lse, pairs = t.softmax(dim=-1), z.logsumexp(dim=-1), len(t) * (len(z) - 1)
    agreement = (q * (z.sum(dim=0) - z[: len(t)])).sum(dim=(0, 2))  # q_i·z_j over all pairs i != j
    normalisers = len(t) * lse.sum(dim=0) - lse[: len(t)].sum(dim=0)  # logsumexp(z_j) over the same
    loss = (normalisers - agreement).mean() / pairs
    entropy = (t.logsumexp(dim=-1) - (q * t).sum(dim=-1)).mean()
    return loss, entropy, loss.detach() - entropy


def train_step(
    student, teacher, center, update, imgs, draws, args, teacher_temp, momentum, mean, std, loss_fn=dino_loss
):
    """One optimiser step (section 3): V views of each image, the two global ones first, in micro-batches.

    imgs: uint8 (B, C, S, S). draws: what draw_views gave for the global and for the local views. update: an Update.
    Returns (4,): loss, teacher's entropy, KL and gradient norm, still on the device, so that nothing waits for them.
    """
    total, batch_mean = 0, 0
    micro_batches = [split_rows(t, args.accumulate) for t in (imgs, *draws)]
    for x, d_global, d_local in zip(*micro_batches, strict=True):
        unit = max(args.img_size) / 224
        views = [augment(x, d_global, args.img_size, unit, mean, std)]  # (2·B, C, h, w)
        if args.local_crops:
            views.append(augment(x, d_local, [args.local_size] * 2, unit, mean, std))
        with update.autocast():
            with torch.no_grad():
                t = teacher(views[:1]).float().unflatten(0, (2, len(x)))  # (2, B, K)
            s = student(views).float().unflatten(0, (-1, len(x)))  # (V, B, K)
        loss, entropy, kl = loss_fn(s, t, center, args.student_temp, teacher_temp)
        update.backward(loss / args.accumulate)
        total += torch.stack([loss.detach(), entropy, kl]) / args.accumulate
        batch_mean += t.mean(dim=(0, 1)) / args.accumulate
    ok, norm = update.step(clip_each=args.clip)  # ok is 0 where the gradient was not finite: then nothing moves
    ema_update(teacher, student, (1 - momentum) * ok)
    moved = center.lerp(mean_over_processes(batch_mean), 1 - args.center_momentum)
    center.copy_(torch.where(ok > 0, moved, center))
    return torch.cat([total, norm[None]])


# ------------------------------------------------------------------------------- ablations: what each part is there for


def mse_loss(student, teacher, center, *temps):
    """Squared distance of L2-normalised outputs in place of the cross-entropy (Table 7, row 5)."""
    return pairwise(student, teacher, center, temps, lambda s, t: (s - t).square().sum(dim=-1).mean())


def infonce_loss(student, teacher, center, *temps):
    """InfoNCE (temperature 0.1) against the rest of a process's micro-batch, as MoCo, instead (Table 7, row 8)."""
    same = torch.arange(student.shape[1], device=student.device)
    return pairwise(student, teacher, center, temps, lambda s, t: F.cross_entropy(s @ t.T / 0.1, same))


def pairwise(student, teacher, center, temps, loss):
    s, t = F.normalize(student, dim=-1), F.normalize(teacher - center, dim=-1)
    pairs = [loss(s[i], t[j]) for j in range(len(t)) for i in range(len(s)) if i != j]
    return sum(pairs) / len(pairs), *dino_loss(student.detach(), teacher, center, *temps)[1:]


def ablate(args):
    """Changes the options so that one part of the method is gone; returns the loss to train with."""
    changes = {
        "no-centering": dict(center_momentum=1.0),  # the centre stays at zero: one prototype wins, entropy -> 0
        "no-sharpening": dict(
            teacher_temp=args.student_temp, teacher_temp_start=None
        ),  # as soft as the student: entropy -> ln K
        "no-momentum": dict(momentum=0.0, momentum_end=0.0),  # the teacher is the student itself
        "no-multicrop": dict(local_crops=0),
    }
    vars(args).update(changes.get(args.ablate, {}))
    return dict(mse=mse_loss, infonce=infonce_loss).get(args.ablate, dino_loss)


# ------------------------------------------------------------------------------------------------------------ pictures


def attention_mask(maps, mass=0.6):
    """The patches that hold `mass` of the attention, largest first (Figure 4). maps (..., N) -> bool (..., N)."""
    value, order = (maps / maps.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    keep = value.cumsum(dim=-1) - value < mass  # up to and including the one that reaches it
    return torch.zeros_like(keep).scatter(-1, order, keep)


@torch.no_grad()
def draw_attention(vit, x, config, file, tile=96):
    """Two rows for each of x (B, C, h, w): the CLS token's attention in the last block, and its 60 % mask, by head."""
    maps = vit.attention(x)[:, :, 0, 1:]  # (B, H, N)
    size = [tile * s // max(x.shape[-2:]) for s in x.shape[-2:]]
    grid = lambda t: rearrange(t.float(), "b h (i j) -> b h i j", i=x.shape[-2] // vit.patch)
    zoom = lambda t, mode: F.interpolate(t, size=size, mode=mode)
    mean, std = (torch.tensor(config[k], device=x.device).view(-1, 1, 1) for k in ("mean", "std"))
    img = zoom((x * std + mean).clamp(0, 1)[:, [0, 1, 2] if x.shape[1] == 3 else [0, 0, 0]], "bicubic").clamp(0, 1)
    heat = zoom(grid(maps / maps.amax(dim=-1, keepdim=True)), "bicubic").clamp(0, 1)[:, :, None]
    heat = torch.cat([(3 * heat - k).clamp(0, 1) for k in range(3)], dim=2)  # black, red, yellow, white
    mask = zoom(grid(attention_mask(maps)), "nearest")[:, :, None]
    masked = img[:, None] * (0.15 + 0.85 * mask)
    rows = torch.stack([torch.cat([img[:, None], t], dim=1) for t in (heat, masked)], dim=1)  # (B, 2, 1+H, 3, h, w)
    save_image(make_grid(rows.flatten(0, 2).cpu(), nrow=1 + maps.shape[1], padding=2, pad_value=1), file)


def attention_files(args, device):
    """--attention: the pictures for image files of the user's, from the encoder in --out."""
    vit, config = load_encoder(Path(args.out) / "last.pt")
    for name in args.attention:
        img = read_square(name, max(config["img_size"]) * 2, config["in_chans"]).to(device)
        file = Path(args.out) / f"attention-{Path(name).stem}.png"
        draw_attention(vit.to(device), prepare(img, config["img_size"], config["mean"], config["std"]), config, file)
        print(file)


# ---------------------------------------------------------------------------------------------------------------- main


def schedules(step, total, steps_per_epoch, args):
    """Learning rate, weight decay, teacher momentum and temperature (section 3.2), from the step alone."""
    start = args.teacher_temp_start or args.teacher_temp
    warm = min(1, step / max(1, min(args.teacher_temp_epochs, args.epochs) * steps_per_epoch - 1))
    return (
        cosine(step, total, args.lr * args.batch / 256, args.min_lr, args.warmup * steps_per_epoch),
        cosine(step, total, *args.weight_decay),
        cosine(step, total, args.momentum, args.momentum_end),
        start + warm * (args.teacher_temp - start),
    )


def collapse(entropy, kl, prototypes):
    """A named warning once the output hardly depends on the image (in a collapse KL is 0, section 5.3), else None."""
    if not (kl <= 0.01 * math.log(prototypes) or entropy >= 0.999 * math.log(prototypes)):  # nan: a skipped step
        return None
    uniform = entropy > 0.5 * math.log(prototypes)
    kind = "uniform, lower --teacher-temp or --lr" if uniform else "one prototype, lower --center-momentum or --lr"
    return f"COLLAPSED, the same output for all images: {kind}. KL {kl:.4f}, entropy {entropy:.3f}"


@cli
def main(argv=None):
    args = get_args(argv)
    device, rank, world = launch(args)
    if args.attention:
        return attention_files(args, device)
    loss_fn = ablate(args)
    run = Run(args, rank, world)
    train, test = load_splits(args, rank)
    check_plan(args, len(train), world, rank)

    torch.manual_seed(args.seed)
    shape = dict(SIZES[args.size], img_size=args.img_size, patch=args.patch, in_chans=train.channels)
    make_head = lambda: DINOHead(shape["dim"], args.prototypes, args.hidden, norm_last_layer=args.norm_last_layer)
    student = DINO(ViT(**shape, drop_path=args.drop_path), make_head()).to(device)
    teacher = DINO(ViT(**shape), make_head()).to(device).requires_grad_(False)
    center = torch.zeros(args.prototypes, device=device)
    config = dict(student.vit.config, method="dino", data=args.data, feature="cls")
    config["mean"], config["std"] = train.stats()
    if args.init:
        start_from(args.init, dict(student=student, center=center), student.vit, config)
    teacher.load_state_dict(student.state_dict())

    mean, std = (torch.tensor(config[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))
    update = Update([student], device, args.precision)
    parts = dict(student=student, teacher=teacher, center=center, update=update)
    run.begin(parts, teacher.vit, config, train, test, device)
    if args.compile:
        student.compile(dynamic=False), teacher.compile(dynamic=False)

    keys = batches(len(train), args.batch, run.first, run.stop, args.seed, rank, world)
    for step, imgs in run.steps(stream(train, keys, device, args.workers)):
        lr, weight_decay, momentum, teacher_temp = schedules(step, run.total, run.steps_per_epoch, args)
        update.set(lr, weight_decay)
        student.head.freeze_last_layer(step < args.freeze_last_layer * run.steps_per_epoch)
        draws = [my_rows(d, rank, world, device) for d in draw_crops(args, step)]
        stats = train_step(
            student, teacher, center, update, imgs, draws, args, teacher_temp, momentum, mean, std, loss_fn
        )

        if run.log_due(step):  # here alone the host waits for the device
            loss, entropy, kl, norm = mean_over_processes(stats).tolist()
            row = dict(loss=loss, entropy=entropy, kl=kl, grad_norm=norm, lr=lr)
            warm = step >= args.warmup * run.steps_per_epoch
            run.log(step, row, update.skipped.tolist(), collapse(entropy, kl, args.prototypes) if warm else None)
        if run.save_due(step):
            run.save(step)
            if rank == 0:
                sample = prepare(run.sample, args.img_size, config["mean"], config["std"])
                draw_attention(teacher.vit, sample, config, run.out / "attention.png")
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
