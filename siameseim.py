"""SiameseIM: from the visible patches of one view, predict the features of another view, position by position.

Tao et al., "Siamese Image Modeling for Self-Supervised Vision Representation Learning", CVPR 2023, arXiv 2206.01204.

    python siameseim.py                                      # the images that come with it; minutes on a laptop
    python siameseim.py --data cifar10 --epochs 400          # downloads; or a folder of images
    torchrun --nproc-per-node=2 siameseim.py --data photos/  # several processes share each batch
    python siameseim.py --ablate same-view                   # what is the other view there for?

Measured: `python siameseim.py`, k-NN 64.9 ± 1.6 % (n = 3 seeds), untrained 29.2, raw pixels 25.1 (RESULTS.md).

The idea. Masked image modelling learns where things are, contrastive learning what they are; this does both. Two
views of an image are cropped and coloured independently. The online network sees part of view a, is told where the
patches of view b lie relative to a, and predicts for each of them the output of a momentum encoder (the target network)
that sees all of b. Colours differ (not in the demo, which has few), so the prediction must be semantic; it is made for
every position, so it stays spatial.

Symbols of the paper: y is the prediction, z the target, C the correlation of targets, lambda --neg-weight. For another
loss change siameseim_loss, for another target SiameseIM.targets, for another mask visible_patches. Read sections 1 to
3 of vit.py too.

Differs from the authors' code:
- Augmentation runs on the device for the whole batch: colour operations in a fixed order, no rounding to 8 bits in
  between, blur's sigma in pixels of a 224 px image. Images are decoded as squares of the network's size (above 64 px up
  to twice that), cut from the middle. Mean and std are those of the data set.
- Block-wise masks: if blocks hide too many patches, random ones of the last stay visible; if too few, random ones are
  added (theirs: ten redraws first). Random masks work (theirs: disabled).
- BatchNorm always uses the statistics of its batch and keeps none. They are over all processes on CPUs too. With
  --accumulate they are those of a micro-batch (with --norm layer the result is that of the whole batch).
- Linear layers start from a truncated normal of 0.02, the frozen patch embedding as nn.Conv2d does (theirs: all
  Xavier-uniform, which is 1.7 times as wide for the patches of ViT-B/16).
- A gradient that is not finite skips the step. --batch counts all processes and micro-batches.
"""

import functools
import math
import sys
from types import SimpleNamespace

if __name__ == "__main__":
    print("loading PyTorch ...", file=sys.stderr, flush=True)  # it takes seconds

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.utils import draw_bounding_boxes

# isort: off
from vit import SIZES, Block, InputError, ViT, gather_tokens, sincos, sincos_grid  # 1 network
from vit import blend, crop_resize, gaussian_blur, gray, sample_boxes, shift_hue  # 2 views
from vit import adamw, autocast, cosine, distribute, ema_update, in_turn, mean_over_processes  # 3 training step
from vit import micro_batches, optimizer_step, seeded, shard, unwrap
from vit import four  # 4 images
from vit import save_grid, token_std  # 5 evaluation
from vit import start_from  # 6 checkpoints
from vit import COMMON, COUNT, SHARE, Log, Monitor, ablate, by_preset, check_momentum, cli, describe  # 7 runs
from vit import encoder_config, launch, load_data, options, resume, save, step_memory, steps, vit_kwargs

ABLATIONS = {  # the options that they change
    "no-color": dict(color=0.0, blur=[0.0, 0.0]),
    "no-uniformity": dict(neg_weight=0.0),
    "same-view": {},  # changes the draws
    "global": {},  # changes the loss
}
# name=(default, help[, arguments for argparse]); by_preset(demo, cpu, 32 px, 96 px, 224 px):
# missing values repeat the last one; None and "..." are computed in vit.settle
OPTIONS = COMMON | dict(
    size=(by_preset("nano", "nano", "tiny", "small", "base"), "width, depth and heads", dict(choices=SIZES)),
    patch=(by_preset(4, "1/8 of the image", 4, 8, 16), "patch size, px", COUNT),
    img_size=(by_preset(32, None, None, 96, 224), "input side, px (the images' own; cpu: at most 48)", COUNT),
    epochs=(by_preset(6, "180000 images", 400), "length of the run; the schedules follow it", COUNT),
    batch=(by_preset(64, 64, 512, 512, 4096), "images in an optimiser step, of all processes", COUNT),
    lr=(by_preset(4e-3, 2e-3, 1e-3, 5e-4, 6.25e-5), "learning rate for batch 256; scaled with the batch"),
    warmup=(by_preset(1.0, None, 20.0, 20.0, 40.0), "epochs over which the learning rate rises"),
    weight_decay=((0.05, 0.05), "of all but biases and norms, at the start and at the end"),
    clip=(1.0, "clip the norm of all gradients together; 0 turns clipping off"),
    drop_path=(0.0, "stochastic depth of the online encoder", SHARE),
    crop_scale=(by_preset((0.3, 1.0), (0.2, 1.0), (0.2, 1.0), (0.08, 1.0)), "area of the crops, share of the image"),
    color=(by_preset(0.0, 1.0), "strength of colour jitter, grey and solarization; 1 as published"),
    blur=(by_preset((1.0, 0.1)), "probability of blur in view a and in view b"),
    mask=("block", "how the hidden patches of view a are chosen", dict(choices=("block", "random"))),
    mask_ratio=(0.6, "share of the patches of view a that are hidden", SHARE),
    norm=("batch", "in projector and decoder; batch: over all tokens", dict(choices=("batch", "layer"))),
    train_patch_embed=(False, "train the patch embedding, which is frozen as published"),
    decoder_dim=(by_preset(64, 64, 192, 384, 768), "width of projector and decoder", COUNT),
    decoder_depth=(by_preset(2, 2, 4), "blocks of the decoder", COUNT),
    decoder_heads=(by_preset(4, 4, 6, 12, 16), "attention heads of projector and decoder", COUNT),
    projector_depth=(by_preset(1, 1, 2), "blocks between encoder and decoder; the target network ends with them"),
    neg_weight=(None, "lambda, of the uniformity term (15.36 / --decoder-dim, as published)", dict(type=float)),
    momentum=(by_preset(0.98, 0.99, 0.99, 0.99, 0.995), "of the target, 1 at the end; lower it for short runs"),
    ablate=(None, "remove one component and see what breaks", dict(choices=ABLATIONS)),
)

# model and loss ------------------------------------------------------------------------------------------------------


class MeanOverProcesses(torch.autograd.Function):
    """The mean of x over processes. As each process has a loss of its own, gradients are averaged too."""

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
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x):
        if not (dist.is_initialized() and self.training):
            tokens = x.flatten(0, 1)
            return F.batch_norm(tokens, None, None, self.weight, self.bias, True, eps=self.eps).view_as(x)
        y = x.float()
        mean = MeanOverProcesses.apply(y.mean(dim=(0, 1)))
        var = MeanOverProcesses.apply((y - mean).square().mean(dim=(0, 1)))
        y = (y - mean) * (var + self.eps).rsqrt()
        return (y * self.weight + self.bias).to(x.dtype)


NORMS = dict(batch=TokenBatchNorm, layer=functools.partial(nn.LayerNorm, eps=1e-6))


def blocks(args, depth):
    norm = NORMS[args.norm]
    return nn.Sequential(*(Block(args.decoder_dim, args.decoder_heads, norm=norm) for _ in range(depth)))


class Tower(nn.Module):
    """Encoder, linear layer and projector: what the online and the target network both have."""

    def __init__(self, shape, args, backbone, drop_rate=0.0):
        super().__init__()
        self.vit = backbone(**shape, pos="sincos", norm=False, drop_path=drop_rate)
        self.embed = nn.Linear(self.vit.dim, args.decoder_dim)
        self.projector = blocks(args, args.projector_depth)

    def forward(self, imgs, visible=None):
        """(B, C, h, w), visible (B, n) or all -> (B, 1+n, decoder_dim)."""
        return self.projector(self.embed(self.vit(imgs, visible)))


class SiameseIM(nn.Module):
    """Online tower and decoder; the target tower is the online one's moving average. shape: the ViT's arguments."""

    feature = "mean"  # what evaluation reads

    def __init__(self, shape, args, mean, std, backbone=ViT):
        super().__init__()
        self.online = Tower(shape, args, backbone, args.drop_path)
        self.target = Tower(shape, args, backbone).requires_grad_(False)
        self.online.vit.patch_embed.requires_grad_(args.train_patch_embed)
        dim, self.grid = args.decoder_dim, self.online.vit.grid
        n = math.prod(self.grid)
        if round(n * args.mask_ratio) >= n:
            raise InputError(f"--mask-ratio {args.mask_ratio} leaves none of {n} patches visible")
        self.decoder_pos_embed = nn.Parameter(sincos_grid(self.grid, dim), requires_grad=False)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.position = nn.Linear(2 * dim, dim)
        self.decoder = blocks(args, args.decoder_depth)
        self.pred = nn.Linear(dim, dim)
        parts = [self.online.embed, self.online.projector, self.position, self.decoder, self.pred]
        for m in nn.ModuleList(parts).modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.neg_weight = 15.36 / dim if args.neg_weight is None else args.neg_weight
        self.augment = augment  # an attribute, so that compile() can replace it
        self.start_teacher()

    def start_teacher(self):
        self.target.load_state_dict(self.online.state_dict())

    def compile(self):
        for part in (self, self.target):
            nn.Module.compile(part, dynamic=False)
        self.augment = torch.compile(augment, dynamic=False)

    @torch.no_grad()
    def targets(self, imgs):
        """z, the target network's tokens of view b, each standardised: (B, N, decoder_dim), float32."""
        z = self.target(imgs)[:, 1:].float()
        return F.layer_norm(z, z.shape[-1:])

    def forward(self, imgs, visible, box, flip):
        """Predicts every patch of view b, (B, N, decoder_dim), from the visible ones (B, n) of view a."""
        pos = self.decoder_pos_embed.expand(len(imgs), -1, -1)
        index = F.pad(visible + 1, (1, 0))  # (B, 1+n): CLS is position 0
        x = self.online(imgs, visible) + gather_tokens(pos, index)
        place = relative_positions(box, flip, self.grid, pos.shape[-1])  # (B, N, 2 decoder_dim)
        wanted = self.mask_token + self.position(place)
        x = self.decoder(torch.cat([wanted, x], dim=1))
        return self.pred(x[:, : wanted.shape[1]])


def correlation(z):
    """C = mean of z zᵀ over all tokens, not centred: (..., D) -> (D, D)."""
    z = z.flatten(0, -2)
    return z.T @ z / len(z)


def siameseim_loss(pred, target, c, weight=0.02):
    """(|y - z|² + λ yᵀ C y) / D, mean over tokens: y near its z, away from other z (UniGrad, arXiv 2112.05141).

    If all targets collapse to one z, the best prediction is z / (1 + λD), with loss λD / (1 + λD). Only a large λD
    prevents this: published 15. At λD = 1.3 (λ = .02, D = --decoder-dim = 64) targets differ by a few percent.
    pred y, target z (B, N, D); c (D, D): correlation of the targets over the whole batch. Returns the loss, and the
    uniformity term yᵀ C y / D.
    """
    uniformity = ((pred @ c) * pred).mean()  # the diagonal of Y C Yᵀ alone
    return (pred - target).square().mean() + weight * uniformity, uniformity.detach()


def train_step(model, optimizer, scaler, imgs, draws, schedule, args):
    """One optimiser step. Nothing in it waits for the GPU.

    model: a SiameseIM, or what distribute made of it. imgs: uint8 (B, C, S, S). draws: what sample_step drew. schedule:
    what schedules gave. All targets come first: C is that of the whole batch, in micro-batches too. Returns (4,): loss,
    its uniformity term, standard deviation of the targets, and the gradient's norm.
    """
    net = unwrap(model)
    loss_fn = global_loss if args.ablate == "global" else siameseim_loss
    sums, parts, c, unit = 0, [], 0, args.img_size / 224
    for x, d in micro_batches(model, args.accumulate, imgs, draws):
        a, b = net.augment(x, d, args.img_size, unit, net.mean, net.std).chunk(2)
        with autocast(x.device, args.precision):
            z = net.targets(b)
        parts.append((a, d, z))
        c += correlation(z) / args.accumulate
    c = mean_over_processes(c)
    for a, d, z in in_turn(model, parts):
        with autocast(a.device, args.precision):
            visible = visible_patches(d, net.grid, args.mask_ratio)
            y = model(a, visible, d["box"], d["flip"])
        loss, uniformity = loss_fn(y.float(), z, c, net.neg_weight)
        scaler.scale(loss / args.accumulate).backward()
        sums += torch.stack([loss.detach(), uniformity, token_std(z)]) / args.accumulate

    norm, finite = optimizer_step(optimizer, scaler, schedule.lr, schedule.weight_decay, args.clip)
    ema_update(net.target, net.online, schedule.momentum, finite)
    return torch.cat([sums, norm[None]])


def schedules(step, total, per_epoch, args):
    """Learning rate, weight decay and the target network's momentum, from the step alone. total: steps of the run."""
    return SimpleNamespace(
        lr=cosine(step, total, args.lr * args.batch / 256, 0.0, args.warmup * per_epoch),
        weight_decay=cosine(step, total, *args.weight_decay),
        momentum=cosine(step, total, args.momentum, 1.0),
    )


def global_loss(pred, target, c, weight=0.02):
    """Compares one vector per image: the mean token, the target's standardised again; C of this micro-batch."""
    y, z = pred.mean(dim=1), target.mean(dim=1)
    z = F.layer_norm(z, z.shape[-1:])
    return siameseim_loss(y, z, correlation(z), weight)


# views, masks, and where they lie ------------------------------------------------------------------------------------


def sample_step(args, step, side):
    """All random numbers of a step, for the whole batch: BYOL's augmentation, each entry (batch, 2, ...); for the mask
    of view a noise (batch, N) and blocks (batch, 12, 4). side: of the images, px.
    """
    g, color = seeded(args.seed, step), args.color
    rand = lambda: torch.rand((args.batch, 2), generator=g)
    draws = dict(box=sample_boxes((args.batch, 2), side, args.crop_scale, g))
    draws["flip"] = rand() < 0.5
    jitter = rand() < 0.8  # for each view, all four operations or none

    def factor(neutral, width):  # uniform in neutral ± color · width where there is jitter, else neutral
        return torch.where(jitter, neutral + color * width * (2 * rand() - 1), neutral)

    draws["brightness"] = factor(1.0, 0.4)
    draws["contrast"] = factor(1.0, 0.4)
    draws["saturation"] = factor(1.0, 0.2)
    draws["hue"] = factor(0.0, 0.1)
    draws["keep_color"] = (rand() >= 0.2 * color).float()  # 0 makes the image grey
    sigma = 0.1 + 1.9 * rand()  # px of a 224 px image
    draws["sigma"] = sigma.where(rand() < torch.tensor(args.blur), 0.0)
    draws["solarize"] = rand() < color * torch.tensor([0.0, 0.2])
    if args.mask == "block":
        draws["blocks"] = torch.rand((12, 4, args.batch), generator=g).permute(2, 0, 1)
    patches = (args.img_size // args.patch) ** 2
    draws["noise"] = torch.rand((args.batch, patches), generator=g)
    if args.ablate == "same-view":  # view b is the crop of view a; the colours stay two
        for k in ("box", "flip"):
            draws[k] = draws[k][:, :1].repeat_interleave(2, dim=1)
    return draws


def visible_patches(draws, grid, ratio):
    """The indices (B, n) of the patches of view a that stay visible: those that would be hidden last."""
    order = block_order(draws["blocks"], grid, ratio) if "blocks" in draws else 0  # 0: a random order
    hidden = round(ratio * math.prod(grid))
    return (order + draws["noise"]).argsort(dim=1)[:, hidden:]


def block_order(draws, grid, ratio):
    """Which block hides each patch (B, N), counted from 0 (BEiT, arXiv 2106.08254, Algorithm 1).

    A block has between 16/196 of the patches and as many as are still to be hidden, and a log aspect ratio uniform in
    0.3 to 1/0.3. What no block covers comes last. draws (B, rounds, 4): uniform, for area, aspect ratio and place.
    """
    (h, w), n, rounds = grid, math.prod(grid), draws.shape[1]
    y = torch.arange(h, device=draws.device).view(1, h, 1)
    x = torch.arange(w, device=draws.device).view(1, 1, w)
    order = draws.new_full((len(draws), h, w), float(rounds))
    least = n * 16 / 196
    for i in range(rounds):
        for_area, for_aspect, for_top, for_left = draws[:, i].view(-1, 4, 1, 1).unbind(1)  # each (B, 1, 1)
        todo = round(ratio * n) - (order < rounds).sum(dim=(1, 2), keepdim=True)
        area = least + for_area * (todo - least).clamp(min=0)
        aspect = torch.exp((2 * for_aspect - 1) * math.log(0.3))
        height = (area * aspect).sqrt().round().clamp(1, h)
        width = (area / aspect).sqrt().round().clamp(1, w)
        top = (for_top * (h - height + 1)).floor()
        left = (for_left * (w - width + 1)).floor()
        block = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        order = torch.where(block & (order == rounds), float(i), order)
    return order.flatten(1)


def places(box, flip, grid):
    """Locates the patches of view b on the patch grid of view a: rows, columns, and 10 ln of how many times taller and
    wider they are (as in the authors' code). Four (B, N).

    box (B, 2, 4): y, x, height, width of a and b in the image, px. flip (B, 2). Row 0 is the centre of a's first row of
    patches. Without flips, with G patches to a side, row m of b, whose crop starts at y2 and is h2 high, lies at
    (h2/h1)(m + 1/2) + G (y2 - y1)/h1 - 1/2.
    """
    y, x, h, w = box.unbind(-1)  # (B, 2)
    rows = centers(y, h, torch.zeros_like(flip), grid[0])[:, :, None]
    columns = centers(x, w, flip, grid[1])[:, None]
    taller, wider = (10 * (length[:, 1] / length[:, 0]).log().view(-1, 1, 1) for length in (h, w))
    return [t.flatten(1) for t in torch.broadcast_tensors(rows, columns, taller, wider)]


def centers(start, length, flip, n):
    """The centres of b's n patches on a's grid, along one axis: (B, n). start, length, flip: (B, 2), of a and b."""
    (start_a, start_b), (length_a, length_b), (flip_a, flip_b) = (t.T[..., None] for t in (start, length, flip))
    in_b = (torch.arange(n, device=start.device) + 0.5) / n  # 0 to 1 along view b
    image = start_b + length_b * torch.where(flip_b, 1 - in_b, in_b)  # px
    in_a = (image - start_a) / length_a  # 0 to 1 along view a
    return n * torch.where(flip_a, 1 - in_a, in_a) - 0.5


def relative_positions(box, flip, grid, dim):
    """The sine-cosine embedding of `places`, (B, N, 2 dim): rows, columns, then the two scales."""
    rows, columns, taller, wider = places(box, flip, grid)
    place, scale = sincos(columns, rows, dim), sincos(wider, taller, dim)  # sincos puts its second argument first
    return torch.cat([place, scale], dim=-1)


def augment(imgs, draws, size, unit, mean, std):
    """uint8 (B, C, S, S) and what sample_step drew -> normalised views (2·B, C, size, size), view by view.

    unit: px of these views per px of a 224 px image, for blur. Jitter and grey need three channels, or are left out.
    """
    x = crop_resize(imgs.float() / 255, draws["box"], draws["flip"], size)
    d = {k: rearrange(v, "b v -> (v b) 1 1 1") for k, v in draws.items() if k not in ("box", "blocks", "noise")}
    if x.shape[1] == 3:
        x = (x * d["brightness"]).clamp(0, 1)
        x = blend(x, gray(x).mean(dim=(2, 3), keepdim=True), d["contrast"])
        x = blend(x, gray(x), d["saturation"])
        x = shift_hue(x, d["hue"])
        x = blend(x, gray(x), d["keep_color"])
    x = gaussian_blur(x, d["sigma"].flatten() * unit, radius=math.ceil(6 * unit))
    x = torch.where(d["solarize"] & (x >= 0.5), 1 - x, x)
    return (x - mean) / std


# pictures and main ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_pairs(net, imgs, draws, args, file):
    """For each of imgs, uint8 (B, C, S, S): both boxes (a red, b blue), view a, what is visible of it, view b, and how
    well each position of b is predicted: cosine of prediction and target, black 0 or less, white 1.
    """
    imgs, size = imgs[: len(draws["box"])], args.img_size
    d = {k: v[: len(imgs)].to(imgs.device) for k, v in draws.items()}
    a, b = augment(imgs, d, size, size / 224, net.mean, net.std).chunk(2)
    index = visible_patches(d, net.grid, args.mask_ratio)
    pred = net(a, index, d["box"], d["flip"]).float()
    like = F.cosine_similarity(pred, net.targets(b), dim=-1).unflatten(1, (1, *net.grid))
    visible = torch.zeros_like(d["noise"]).scatter(1, index, 1.0).unflatten(1, (1, *net.grid))
    zoom = lambda x: F.interpolate(x, size=(size, size))
    a, b = a * net.std + net.mean, b * net.std + net.mean
    y, x, height, width = (d["box"].cpu() / imgs.shape[-1] * size).unbind(-1)
    edges = torch.stack([x, y, x + width, y + height], dim=-1).clamp(0, size - 1)
    rgb = imgs if imgs.shape[1] == 3 else imgs[:, :1].expand(-1, 3, -1, -1)
    rgb = zoom(rgb.float() / 255).cpu()
    boxed = [draw_bounding_boxes(i, e, colors=["red", "blue"]) for i, e in zip(rgb, edges, strict=True)]
    columns = {"a red, b blue": torch.stack(boxed), "view a": a, "visible of a": a * zoom(visible), "view b": b}
    save_grid(columns | {"predicted of b": like}, file)


def activations(args):
    """What keeps activations, for step_memory: encoder and projector see what is visible, the decoder all of view b."""
    size, n = SIZES[args.size], (args.img_size // args.patch) ** 2
    visible = 1 + n - round(args.mask_ratio * n)
    projector = visible, args.decoder_dim, args.projector_depth
    decoder = visible + n, args.decoder_dim, args.decoder_depth
    return [(visible, size["dim"], size["depth"]), projector, decoder]


@cli
def main(argv=None, images=None, backbone=ViT):
    args = options(__doc__, OPTIONS, argv, method="siameseim")
    ablate(args, ABLATIONS)
    device = launch(args)
    train, test = load_data(args, OPTIONS, device, images)  # opened, options settled, decoded if it fits into memory

    torch.manual_seed(args.seed)
    net = SiameseIM(vit_kwargs(args, train.channels), args, *train.stats(), backbone).to(device)
    optimizer, scaler = adamw(net, args.precision, betas=(0.9, 0.95))
    encoder = net.online.vit  # what k-NN evaluates
    state = dict(net=net, optimizer=optimizer, scaler=scaler)  # what a run needs to resume
    per_epoch = len(train) // args.batch
    total = args.epochs * per_epoch  # steps
    stop = min(total, args.steps or total)
    memory = step_memory(args, net, activations(args), device)  # refuses more than there is
    describe(args, train, encoder, memory)
    check_momentum(args.momentum, total)

    first, lines = resume(args, state, len(train), stop, __file__)
    if args.init and not first:
        start_from(args.init, net.online.vit, net)
    config = encoder_config(args, net, encoder)
    log = Log(args, lines, first, stop, optimizer)
    monitor = Monitor(args, encoder, config, train, test, device)
    monitor.before(log)
    model = distribute(net)
    if args.compile:
        net.compile()

    for step, imgs, leaving in steps(train, args, log, device):
        schedule = schedules(step, total, per_epoch, args)
        draws = shard(sample_step(args, step, train.side), device)  # this process's part of what is drawn for the batch
        stats = train_step(model, optimizer, scaler, imgs, draws, schedule, args)
        if log.due(step, leaving):
            loss, uniformity, target_std, norm = mean_over_processes(stats).tolist()
            flat = target_std < 0.05 and step >= args.warmup * per_epoch
            warning = "COLLAPSED: targets no longer differ from token to token" if flat else None
            row = dict(loss=loss, uniformity=uniformity, target_std=target_std, grad_norm=norm, lr=schedule.lr)
            log.step(step, warning, **row)
        monitor.when_due(step, leaving, log)
        if log.save_due(step, leaving):
            save(args, state, encoder, config, step, log)
            log.draw_curve()
            net.eval()  # process 0 draws alone: BatchNorm must not wait for the others
            draw_pairs(net, four(train, device), sample_step(args, 0, train.side), args, log.picture("views"))
            net.train()
    return monitor.result(args, log)


if __name__ == "__main__":
    main()
