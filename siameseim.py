"""SiameseIM: from the visible patches of one view, predict the features of another view, position by position.

Tao et al., "Siamese Image Modeling for Self-Supervised Vision Representation Learning", CVPR 2023, arXiv 2206.01204.

    python siameseim.py                                      # the images that come with it; minutes on a laptop
    python siameseim.py --data cifar10 --epochs 400          # downloads; or a folder of images
    torchrun --nproc-per-node=2 siameseim.py --data photos/  # several processes, the same batch
    python siameseim.py --ablate same-view                   # what is the other view there for?

Measured (n = 3 seeds): `python siameseim.py`, k-NN 64.1 ± 2.8 % in 2.5 minutes of one CPU core; untrained 29.4, raw
pixels 25.1 (RESULTS.md).

The idea. Masked image modelling learns where things are, contrastive learning what they are; this does both. Two
views of an image are cropped and coloured independently. The online network sees part of view a, is told where the
patches of view b lie relative to a, and predicts for each of them the output of a momentum encoder that sees all of
b. Colours differ (not in the demo, which has few), so only what both views share can be predicted: meaning; at every
place, so that it stays spatial.

Differs from the authors' code:
- Augmentation runs on the device, in batch: colour operations in a fixed order, no rounding to 8 bits in between,
  blur's sigma counted in pixels of a 224 px image. Images above 64 px come as random squares, --canvas px wide.
- Block-wise masks: a block too many is thinned at random, what 12 blocks leave is drawn at random (theirs: redrawn up
  to ten times, then the same). Random masks work (theirs: disabled).
- The target network moves at the end of a step (theirs: at the beginning of the next; the first step aside, the same).
- BatchNorm always uses the statistics of the batch at hand, and keeps none; they are global on CPUs too. With
  --accumulate they are those of a micro-batch (with --norm layer the result is that of the whole batch).
- C is a mean over processes without need of a process group; no (tokens x tokens) matrix is built.
- Linear layers start from a truncated normal of 0.02, the frozen patch projection as nn.Conv2d does (theirs: all
  Xavier-uniform, which is 1.7 times as wide for the patches of ViT-B/16). Mean and std are those of the data.
- A non-finite gradient skips the step. --batch counts all processes and micro-batches.
"""

import argparse
import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

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
    load_splits,
    positive,
    resolve,
    sincos,
    start_from,
    stream,
)

# --------------------------------------------------------------------------------------------------- options, presets

PRESETS = {  # chosen by the size of the images; "224" is the authors' ViT-B/16, for 400 epochs (theirs: 1600)
    "demo": dict(size="nano", patch=4, img_size=32, epochs=6, warmup=1, batch=64, lr=4e-3, decoder_dim=64,
                 decoder_heads=4, projector_depth=1, decoder_depth=2, crop_scale=[0.3, 1.0], color=0.0, momentum=0.98,
                 drop_path=0.0),
    "32": dict(size="tiny", patch=4, img_size=None, epochs=400, warmup=20, batch=512, lr=1e-3, decoder_dim=192,
               decoder_heads=6, projector_depth=2, decoder_depth=4, crop_scale=[0.2, 1.0], color=1.0, momentum=0.99,
               drop_path=0.0),
    "96": dict(size="small", patch=8, img_size=96, epochs=400, warmup=20, batch=512, lr=5e-4, decoder_dim=384,
               decoder_heads=12, projector_depth=2, decoder_depth=4, crop_scale=[0.08, 1.0], color=1.0, momentum=0.99,
               drop_path=0.0),
    "224": dict(size="base", patch=16, img_size=224, epochs=400, warmup=40, batch=4096, lr=6.25e-5, decoder_dim=768,
                decoder_heads=16, projector_depth=2, decoder_depth=4, crop_scale=[0.08, 1.0], color=1.0,
                momentum=0.995, drop_path=0.0),
}  # fmt: skip
ABLATIONS = ("same-view", "no-color", "global", "no-uniformity")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_options(p, PRESETS)
    add = p.add_argument
    add("--mask", choices=("block", "random"), default="block", help="which patches of view a are hidden")
    add("--mask-ratio", type=float, default=0.6, help="share of the patches that the encoder does not see")
    add("--norm", choices=("batch", "layer"), default="batch", help="in projector and decoder; batch: over all tokens")
    add("--train-patch-embed", action="store_true", help="else it stays as drawn, as published")
    add("--decoder-dim", type=positive, help="* width of the decoder")
    add("--decoder-depth", type=positive, help="* blocks of the decoder")
    add("--decoder-heads", type=positive, help="* attention heads of the decoder")
    add("--projector-depth", type=int, help="* blocks between encoder and decoder; the target ends with them")
    add(
        "--neg-weight",
        type=float,
        help="lambda, of the term that spreads predictions (15.36 / --decoder-dim, as published)",
    )
    add("--momentum", type=float, help="* of the teacher at the beginning, 1 at the end; short runs want less")
    add("--clip", type=float, default=1.0, help="gradient norm limit, 0: none (DINO, hybrid: of each tensor)")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end of its cosine")
    add(
        "--weight-decay",
        type=float,
        nargs=2,
        default=[0.05, 0.05],
        help="not of biases and norms; from, to, by a cosine",
    )
    add("--crop-scale", type=float, nargs=2, help="* area of the crop, share of image")
    add("--color", type=float, help="* strength of jitter, grey and solarization; 1 as published")
    add("--blur", type=float, nargs=2, default=[1.0, 0.1], help="probability of blur, in view a and in view b")
    add("--ablate", choices=ABLATIONS, help="take a part of the method away, to see what it was there for")
    args = resolve(p.parse_args(argv), PRESETS, "siameseim")
    args.neg_weight = 15.36 / args.decoder_dim if args.neg_weight is None else args.neg_weight
    n = math.prod(ViT.grid_of(args.img_size, args.patch))
    if not 0 <= round(n * args.mask_ratio) < n:
        raise InputError(f"--mask-ratio {args.mask_ratio} leaves none of {n} patches visible")
    return args


# -------------------------------------------------------------------------------------- views, masks, where they lie


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


def draw_pairs(args, step):
    """All random numbers of a step, for the whole batch: two views of each image, what is seen of the first."""
    g, size = seeded(args.seed, step), args.img_size
    draws = draw_views(
        args.batch, 2, args.canvas, size, args.crop_scale, blur=args.blur, solarize=[0.0, 0.2], color=args.color, g=g
    )
    order = dict(block=block_order, random=random_order)[args.mask]
    grid = ViT.grid_of(size, args.patch)
    hidden = round(args.mask_ratio * math.prod(grid))
    return draws | dict(visible=order(args.batch, grid, args.mask_ratio, g)[:, hidden:])


def random_order(batch, grid, ratio, g):
    """Patches (batch, N) in the order in which they are hidden: any."""
    return torch.rand((batch, math.prod(grid)), generator=g).argsort(dim=1)


def block_order(batch, grid, ratio, g, rounds=12):
    """Patches (batch, N) in the order in which they are hidden: block by block (BEiT, arXiv 2106.08254, Algorithm 1).

    A block has between 16/196 of the patches and as many as are still to be hidden, and a log aspect ratio uniform in
    0.3 to 1/0.3. Within a block the order is random. What no block covers comes last.
    """
    (h, w), n = grid, math.prod(grid)
    rand = lambda: torch.rand((batch, 1, 1), generator=g)
    y, x = torch.arange(h).view(1, h, 1), torch.arange(w).view(1, 1, w)
    order = torch.full((batch, h, w), float(rounds))
    for i in range(rounds):
        left = (round(ratio * n) - (order < rounds).sum(dim=(1, 2), keepdim=True)).float()
        least = torch.tensor(n * 16 / 196)
        area = least + rand() * (left - least).clamp(min=0)
        aspect = torch.exp((2 * rand() - 1) * math.log(0.3))
        bh, bw = (area * aspect).sqrt().round().clamp(1, h), (area / aspect).sqrt().round().clamp(1, w)
        top, start = (rand() * (h - bh + 1)).floor(), (rand() * (w - bw + 1)).floor()
        block = (y >= top) & (y < top + bh) & (x >= start) & (x < start + bw)
        order = torch.where(block & (order == rounds), float(i), order)
    return (order.flatten(1) + torch.rand((batch, n), generator=g)).argsort(dim=1)


def places(box, flip, side, grid):
    """Where the patches of view b lie on the patch grid of view a: rows and columns, and how much taller and wider they
    are, as 10 ln of the ratio (authors' code): four (B, N).

    box (B, 2, 4): y, x, height, width of a and b in the image, px. flip (B, 2). side: of the image, px. With G patches
    to a side, patch m of b, whose crop starts at y2 and is h2 high, has its centre on a's grid at
    (h2/h1)(m + 1/2) + G (y2 - y1)/h1 - 1/2; so across, mirrored where one view is flipped and the other is not.
    """
    y, x, h, w = (t[..., None] for t in box.unbind(-1))  # (B, 2, 1)
    side = torch.as_tensor(side, device=box.device).view(-1, 1)
    x = torch.where(flip[..., None], side[..., None] - x - w, x)  # from the left of the view as it was flipped
    (y1, y2), (x1, x2), (h1, h2), (w1, w2) = (t.unbind(1) for t in (y, x, h, w))
    m, n = (torch.arange(g, device=box.device) + 0.5 for g in grid)
    rows = h2 / h1 * m + grid[0] * (y2 - y1) / h1 - 0.5
    alike, mirrored = w2 / w1 * n + grid[1] * (x2 - x1) / w1, grid[1] * (side - x1 - x2) / w1 - w2 / w1 * n
    columns = torch.where(flip[:, :1] == flip[:, 1:], alike, mirrored) - 0.5
    rows, columns = (t.expand(-1, *grid).flatten(1) for t in (rows[:, :, None], columns[:, None]))
    return rows, columns, (10 * (h2 / h1).log()).expand_as(rows), (10 * (w2 / w1).log()).expand_as(rows)


def relative_positions(box, flip, side, grid, dim):
    """The sine-cosine embedding of `places`, (B, N, 2 dim): rows, columns, then the two scales."""
    rows, columns, taller, wider = places(box, flip, side, grid)
    return torch.cat([sincos(columns, rows, dim), sincos(wider, taller, dim)], dim=-1)  # sincos puts x first


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


class MeanOverProcesses(torch.autograd.Function):
    """A mean over processes, whose gradient is the mean of their gradients (these are averaged once more in Update)."""

    @staticmethod
    def forward(ctx, x):
        return mean_over_processes(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return mean_over_processes(grad.clone())


class TokenBatchNorm(nn.Module):
    """BatchNorm whose batch is every token of every image on every process: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x):
        if not (dist.is_initialized() and self.training):
            return F.batch_norm(x.flatten(0, 1), None, None, self.weight, self.bias, True, eps=self.eps).view_as(x)
        y = x.float()
        mean = MeanOverProcesses.apply(y.mean(dim=(0, 1)))
        var = MeanOverProcesses.apply((y - mean).square().mean(dim=(0, 1)))
        return ((y - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


NORMS = dict(batch=TokenBatchNorm, layer=functools.partial(nn.LayerNorm, eps=1e-6))


class Tower(nn.Module):
    """Encoder, linear layer and projector: what the online and the target network both have."""

    def __init__(self, shape, args, drop_path=0.0):
        super().__init__()
        self.vit = ViT(**shape, pos="sincos", norm=False, drop_path=drop_path)
        self.embed = Linear(self.vit.dim, args.decoder_dim)
        self.projector = blocks(args, args.projector_depth)

    def forward(self, imgs, visible=None):
        """(B, C, height, width), visible (B, n) or all -> (B, 1+n, decoder_dim)."""
        x = self.vit.embed(imgs, visible)
        for block in self.vit.blocks:
            x = block(x)
        x = self.embed(x)
        for block in self.projector:
            x = block(x)
        return x


def blocks(args, depth):
    return nn.ModuleList(Block(args.decoder_dim, args.decoder_heads, norm=NORMS[args.norm]) for _ in range(depth))


class SiameseIM(nn.Module):
    """Online tower and decoder; the target is a moving average of the tower."""

    def __init__(self, shape, args, drop_path=0.0):
        super().__init__()
        self.online, self.target = Tower(shape, args, drop_path), Tower(shape, args).requires_grad_(False)
        self.online.vit.patch_embed.requires_grad_(args.train_patch_embed)
        dim, self.grid = args.decoder_dim, self.online.vit.grid
        y, x = torch.meshgrid(*map(torch.arange, self.grid), indexing="ij")
        pos = F.pad(sincos(y.flatten(), x.flatten(), dim), (0, 0, 1, 0))[None]  # CLS: zeros
        self.decoder_pos_embed = nn.Parameter(pos, requires_grad=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.position = Linear(2 * dim, dim)
        self.decoder = blocks(args, args.decoder_depth)
        self.pred = Linear(dim, dim)
        for m in [
            self.online.embed,
            *self.online.projector.modules(),
            self.position,
            *self.decoder.modules(),
            self.pred,
        ]:
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.start_target()

    def start_target(self):
        self.target.load_state_dict(self.online.state_dict())

    @torch.no_grad()
    def targets(self, imgs):
        """Each patch of view b as the target network sees it, every token standardised: (B, N, D), float32."""
        z = self.target(imgs)[:, 1:].float()
        return F.layer_norm(z, z.shape[-1:])

    def forward(self, imgs, visible, box, flip, side):
        """From the visible patches (B, n) of view a, a prediction for each patch of view b: (B, N, D)."""
        pos = self.decoder_pos_embed.expand(len(imgs), -1, -1)
        index = F.pad(visible + 1, (1, 0))[..., None].expand(-1, -1, pos.shape[-1])  # CLS is position 0
        x = self.online(imgs, visible) + pos.gather(1, index)
        wanted = self.mask_token + self.position(relative_positions(box, flip, side, self.grid, pos.shape[-1]))
        x = torch.cat([wanted, x], dim=1)
        for block in self.decoder:
            x = block(x)
        return self.pred(x[:, : wanted.shape[1]])


def correlation(z):
    """C = mean of z zᵀ over all tokens, not centred: (..., D) -> (D, D)."""
    z = z.flatten(0, -2)
    return z.T @ z / len(z)


def siameseim_loss(pred, target, c, weight=0.02):
    """(|y - z|² + λ yᵀ C y) / D, mean over tokens: like its target, unlike all others (UniGrad, arXiv 2112.05141).

    If all targets were one vector z, the best prediction was z / (1 + λD), its loss λD / (1 + λD), a bad place only if
    λD is large. Published: 15. With λ = .02 and D = 64 it is 1.3, and targets stay within a few percent of each other.
    pred y, target z (B, N, D); c (D, D): correlation of the targets over the global batch. Returns the loss and its
    second term without λ.
    """
    spread_out = ((pred @ c) * pred).mean()  # the diagonal of Y C Yᵀ alone
    return (pred - target).square().mean() + weight * spread_out, spread_out.detach()


def train_step(net, update, imgs, draws, args, momentum, mean, std, loss_fn=siameseim_loss):
    """One optimiser step. imgs: uint8 (B, C, S, S). draws: what draw_pairs gave. update: an Update.

    All targets first: C is that of the whole batch, in micro-batches too. Returns (4,): loss, its second term, spread
    of the targets and gradient norm, still on the device, so that nothing waits for them.
    """
    total, parts, c, side = 0, [], 0, imgs.shape[-1]
    for x, d in zip(split_rows(imgs, args.accumulate), split_rows(draws, args.accumulate), strict=True):
        visible = d.pop("visible")
        a, b = augment(x, d, args.img_size, max(args.img_size) / 224, mean, std).chunk(2)
        with update.autocast():
            z = net.targets(b)
        parts.append((a, visible, d["box"], d["flip"], z))
        c += correlation(z) / args.accumulate
    c = mean_over_processes(c)
    for *seen, z in parts:
        with update.autocast():
            y = net(*seen, side)
        loss, spread_out = loss_fn(y.float(), z, c, args.neg_weight)
        update.backward(loss / args.accumulate)
        total += torch.stack([loss.detach(), spread_out, spread(z)]) / args.accumulate
    ok, norm = update.step(clip_all=args.clip)  # ok is 0 where the gradient was not finite: then nothing moves
    ema_update(net.target, net.online, (1 - momentum) * ok)
    return torch.cat([total, norm[None]])


def spread(x):
    """Std over tokens and images, mean over entries: 0 if all are alike, not if places differ. (B, n, D) -> ()."""
    return x.detach().flatten(0, 1).std(dim=0).mean()


# ------------------------------------------------------------------------------- ablations: what each part is there for


def global_loss(pred, target, c, weight=0.02):
    """One vector per image in place of one per position: means over patches, standardised again; C of this process."""
    y, z = pred.mean(dim=1), F.layer_norm(target.mean(dim=1), target.shape[-1:])
    return siameseim_loss(y, z, correlation(z), weight)


def same_view(draws):
    """View b is the crop of view a; the colours stay two."""
    return draws | {k: draws[k][:, :1].repeat_interleave(2, dim=1) for k in ("box", "flip")}


def ablated(args):
    """Changes the options so that one part of the method is gone; returns the loss, and what to do with the draws."""
    changes = {"no-color": dict(color=0.0, blur=[0.0, 0.0]), "no-uniformity": dict(neg_weight=0.0)}
    vars(args).update(changes.get(args.ablate, {}))
    loss_fn = global_loss if args.ablate == "global" else siameseim_loss
    return loss_fn, same_view if args.ablate == "same-view" else dict


# ------------------------------------------------------------------------------------------------------------ pictures


@torch.no_grad()
def show_pairs(net, imgs, draws, args, config, file, tile=96):
    """For each of imgs, uint8 (B, C, S, S): both boxes (a red, b blue), view a, what is visible of it, view b, and how
    well each position of b is predicted: cosine of prediction and target, black 0 or less, white 1.
    """
    net.eval()  # process 0 draws alone: BatchNorm must not wait for the others
    imgs, draws = imgs[: len(draws["flip"])], {k: v[: len(imgs)].to(imgs.device) for k, v in draws.items()}
    mean, std = (torch.tensor(config[k], device=imgs.device).view(-1, 1, 1) for k in ("mean", "std"))
    visible, box, side, (h, w) = draws.pop("visible"), draws["box"], imgs.shape[-1], net.grid
    a, b = augment(imgs, draws, args.img_size, max(args.img_size) / 224, mean, std).chunk(2)
    like = F.cosine_similarity(net(a, visible, box, draws["flip"], side).float(), net.targets(b), dim=-1)
    shown = torch.zeros(len(a), h * w, device=a.device).scatter(1, visible, 1.0).view(-1, 1, h, w)
    size = [tile * s // max(a.shape[-2:]) for s in a.shape[-2:]]
    zoom = lambda x: F.interpolate(x, size=size)
    rgb = lambda x: x[:, [0, 1, 2] if x.shape[1] == 3 else [0, 0, 0]]
    a, b = (zoom(rgb((x * std + mean).clamp(0, 1))) for x in (a, b))
    whole = F.interpolate(rgb(imgs / 255), size=size)
    y, x, height, width = (box.cpu() / side).unbind(-1)
    edges = (torch.stack([x, y, x + width, y + height], dim=-1) * torch.tensor(size[::-1] * 2)).clamp(1)
    edges = edges.minimum(torch.tensor(size[::-1] * 2) - 2)
    pairs = zip(whole.cpu(), edges, strict=True)
    boxed = torch.stack([draw_bounding_boxes(i, e, colors=["red", "blue"], width=2) for i, e in pairs])
    columns = [boxed, a, a * zoom(shown), b, zoom(like.clamp(0, 1).view(-1, 1, h, w)).expand_as(b)]
    rows = torch.stack([c.cpu() for c in columns], dim=1).flatten(0, 1)
    save_image(make_grid(rows, nrow=len(columns), padding=2, pad_value=1), file)
    net.train()


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
    run = Run(args, rank, world)
    train, test = load_splits(args, rank)
    check_plan(args, len(train), world, rank)
    loss_fn, alter = ablated(args)

    torch.manual_seed(args.seed)
    net = SiameseIM(shape_of(args, train.channels), args, args.drop_path).to(device)
    vit = net.online.vit
    config = dict(vit.config, method="siameseim", data=args.data, feature="mean")
    config["mean"], config["std"] = train.stats()
    if args.init:
        start_from(args.init, dict(net=net), vit, config)
        net.start_target()

    mean, std = (torch.tensor(config[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))
    update = Update([net], device, args.precision, betas=(0.9, 0.95))
    run.begin(dict(net=net, update=update), vit, config, train, test, device)
    if rank == 0:
        check_momentum(args, run.total)
    if args.compile:
        net.compile(dynamic=False), net.target.compile(dynamic=False)

    keys = batches(len(train), args.batch, run.first, run.stop, args.seed, rank, world)
    for step, imgs in run.steps(stream(train, keys, device, args.workers)):
        lr = cosine(step, run.total, args.lr * args.batch / 256, args.min_lr, args.warmup * run.steps_per_epoch)
        update.set(lr, cosine(step, run.total, *args.weight_decay))
        momentum = cosine(step, run.total, args.momentum, 1.0)
        draws = my_rows(alter(draw_pairs(args, step)), rank, world, device)
        stats = train_step(net, update, imgs, draws, args, momentum, mean, std, loss_fn)

        if run.log_due(step):  # here alone the host waits for the device
            loss, spread_out, target, norm = mean_over_processes(stats).tolist()
            row = dict(loss=loss, negative=spread_out, target_std=target, grad_norm=norm, lr=lr)
            flat = "COLLAPSED: targets no longer differ from place to place" if target < 0.05 else None
            warm = step >= args.warmup * run.steps_per_epoch
            run.log(step, row, update.skipped.tolist(), flat if warm else None)
        if run.save_due(step):
            run.save(step)
            if rank == 0:
                show_pairs(net, run.sample, alter(draw_pairs(args, 0)), args, config, run.out / "views.png")
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
