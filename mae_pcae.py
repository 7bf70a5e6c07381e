"""MAE reconstructs the pixels of hidden patches. PCAE predicts a momentum encoder's features, at few patches.

MAE: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
PCAE: Li et al., "Progressively Compressed Auto-Encoder for Self-supervised Representation Learning", ICLR 2023,
openreview 8T4qmZbTkW7.

    python mae_pcae.py                                        # MAE on the images that come with it; minutes on a laptop
    python mae_pcae.py --method pcae
    python mae_pcae.py --data cifar10 --epochs 400            # downloads; or a folder of images
    torchrun --nproc-per-node=2 mae_pcae.py --data photos/    # several processes share each batch

Measured (n = 3 seeds): `python mae_pcae.py`, k-NN 71.1 ± 0.2 %, with --method pcae 56.9 ± 1.7 %; untrained 29.8, raw
pixels 25.1 (RESULTS.md).

The idea of MAE. Hide most patches (three quarters; half in the demo). The encoder sees only the rest, so it is cheap. A
small decoder gets the encoder's output and a mask token for each hidden patch, and must reconstruct what was there.
An encoder that recognises objects helps it.

The idea of PCAE. Predict features instead of pixels: those of a momentum encoder (the teacher) that sees exactly the
patches the student does not. The tokens of an image are redundant, so the teacher drops, stage by stage, those most
similar to the mean token; attention has spread their content to the others by then. The student predicts what is left.

In PCAE the momentum encoder is net.teacher; after each of --stages the share --keep of its tokens is left, chosen by
CRITERIA. Read sections 1 to 3 of vit.py too. Change forward for another loss or target, compress for what PCAE drops,
sample_step and augment for another augmentation. main(backbone=...) takes another network, a subclass of ViT; MAE calls
its forward, PCAE's teacher its embed, blocks and norm.

Differs from the authors' code:
- Crops and flips run on the device for the whole batch, without rounding to 8 bits. Images are decoded as squares of
  the network's size (above 64 px, of up to twice that), cut from the middle. Mean and std are those of the data set.
- The encoder's linear layers start from a truncated normal of 0.02, its patch embedding from PyTorch's default; theirs
  are Xavier-uniform. The decoder is Xavier-uniform here too: from smaller weights it learns for long from positions
  alone. --norm-pix is on.
- PCAE: the paper's criterion, cosine to the mean token (theirs: to the mean of unit vectors, --criterion unit). The
  teacher starts as a copy of the student and moves once in an optimiser step (theirs: copied only when distributed,
  moved in every micro-batch). Predictions have the encoder's width (theirs: that of a patch's pixels). No drop path by
  default, and never in the decoder (theirs: up to .25 in the encoder, .25 in every decoder block).
- The learning rate reaches its peak in the last step of the warm-up, as DINO's (theirs: in the step after it).
- A gradient that is not finite skips the step. --batch counts all processes and micro-batches.
"""

import math
import sys
from types import SimpleNamespace

if __name__ == "__main__":
    print("loading PyTorch ...", file=sys.stderr, flush=True)  # it takes seconds

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# isort: off
from vit import SIZES, Block, InputError, ViT, gather_tokens, sincos_grid  # 1 network
from vit import crop_resize, sample_boxes  # 2 views
from vit import adamw, autocast, cosine, distribute, ema_update, mean_over_processes, micro_batches  # 3 training step
from vit import optimizer_step, seeded, shard, unwrap
from vit import four, prepare  # 4 images
from vit import save_grid, token_std  # 5 evaluation
from vit import start_from  # 6 checkpoints
from vit import COMMON, COUNT, SHARE, Log, Monitor, by_preset, check_momentum, cli, describe, encoder_config  # 7 runs
from vit import launch, load_data, options, resume, save, step_memory, steps, vit_kwargs

# name=(default, help[, arguments for argparse]); by_preset(demo, cpu, 32 px, 96 px, 224 px):
# missing values repeat the last one; None and "..." are computed in vit.settle, --stages in PCAE
OPTIONS = COMMON | dict(
    method=("mae", "mae: pixels; pcae: features of a momentum encoder", dict(choices=("mae", "pcae"))),
    size=(by_preset("nano", "nano", "tiny", "small", "base"), "width, depth and heads", dict(choices=SIZES)),
    patch=(by_preset(4, "1/8 of the image", 4, 8, 16), "patch size, px", COUNT),
    img_size=(by_preset(32, None, None, 96, 224), "input side, px (the images' own; cpu: at most 48)", COUNT),
    epochs=(by_preset(16, "800000 images", 400), "length of the run; the schedules follow it", COUNT),
    batch=(by_preset(64, 64, 512, 512, 4096), "images in an optimiser step, of all processes", COUNT),
    lr=(by_preset(8e-3, 4e-3, 1e-3, 3e-4, 1.5e-4), "learning rate for batch 256; scaled with the batch"),
    warmup=(by_preset(2.0, None, 20.0, 20.0, 40.0), "epochs over which the learning rate rises"),
    weight_decay=((0.05, 0.05), "of all but biases and norms, at the start and at the end"),
    clip=(0.0, "clip the norm of all gradients together; 0 turns clipping off"),
    drop_path=(0.0, "stochastic depth of the encoder", SHARE),
    crop_scale=((0.2, 1.0), "area of the crop, share of the image"),
    mask_ratio=(by_preset(0.5, 0.75), "share of the patches that the encoder does not see", SHARE),
    norm_pix=(True, "MAE: standardise the pixels of each patch before they are predicted"),
    decoder_dim=(by_preset(64, 64, 128, 256, 512), "width of the decoder", COUNT),
    decoder_depth=(by_preset(2, 2, 4, 4, 8), "blocks of the decoder", COUNT),
    decoder_heads=(by_preset(4, 4, 4, 8, 16), "attention heads of the decoder", COUNT),
    stages=(None, "PCAE: drop tokens after these blocks, from 0 (the first of each third)", dict(nargs="*", type=int)),
    keep=(by_preset(0.8, 0.5), "PCAE: share of the tokens that a stage keeps", SHARE),
    criterion=("mean", "PCAE: drop tokens most like the mean, or at random", dict(choices=("mean", "unit", "random"))),
    momentum=(by_preset(0.998, 0.998, 0.996, 0.996, 0.9999), "of the teacher, 1 at the end; lower it for short runs"),
)
PCAE_OPTIONS = dict(  # --method pcae: these defaults replace those above, which --help shows
    epochs=(by_preset(24, "300000 images", 400), ""),
    batch=(by_preset(32, 64, 512, 512, 4096), ""),
    lr=(by_preset(8e-3, 1e-3, 1e-3, 3e-4, 1.5e-4), ""),
)

# masking, models and losses ------------------------------------------------------------------------------------------


def random_masking(noise, ratio):
    """Splits the patches of each image by its own noise (B, N): the smallest stay visible (MAE, section 3).

    Returns the indices of visible patches (B, n), n = int(N (1 - ratio)), and of hidden ones (B, N - n).
    """
    order = noise.argsort(dim=1)
    return order.tensor_split([int(noise.shape[1] * (1 - ratio))], dim=1)


def patchify(imgs, patch):
    """(B, C, h·P, w·P) -> (B, h·w, P·P·C), channels last, as in MAE."""
    return rearrange(imgs, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(x, patch, grid):
    """The inverse of patchify, for a grid (h, w) of patches."""
    return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch, q=patch)


def standardise(x):
    """Every token to mean 0 and variance 1 over its entries (MAE's normalised pixels; PCAE's target)."""
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True) + 1e-6).sqrt()


class MAE(nn.Module):
    """Encoder on visible patches, then a light decoder (MAE, Figure 1). shape: the ViT's arguments."""

    feature = "mean"  # what evaluation reads

    def __init__(self, shape, args, mean, std, backbone=ViT, out=None, pos="sincos"):
        super().__init__()
        self.vit = backbone(**shape, pos=pos, drop_path=args.drop_path)
        self.patch, self.mask_ratio, self.norm_pix, dim = args.patch, args.mask_ratio, args.norm_pix, args.decoder_dim
        n = self.vit.grid[0] * self.vit.grid[1]
        if not 0 < int(n * (1 - args.mask_ratio)) < n:
            raise InputError(f"--mask-ratio {args.mask_ratio} leaves all or none of {n} patches visible")
        self.decoder_embed = nn.Linear(self.vit.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(sincos_grid(self.vit.grid, dim), requires_grad=False)
        self.decoder_blocks = nn.Sequential(*(Block(dim, args.decoder_heads) for _ in range(args.decoder_depth)))
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_pred = nn.Linear(dim, out or args.patch**2 * shape["in_chans"])
        for m in [self.decoder_embed, *self.decoder_blocks.modules(), self.decoder_pred]:
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.augment = augment  # an attribute, so that compile() can replace it

    def decode(self, latent, visible, wanted):
        """latent (B, 1+n, D) of patches `visible` (B, n) -> predictions for patches `wanted` (B, m): (B, m, out)."""
        pos = self.decoder_pos_embed.expand(len(latent), -1, -1)
        visible_pos = torch.cat([pos[:, :1], gather_tokens(pos[:, 1:], visible)], dim=1)  # CLS first
        wanted_tokens = self.mask_token + gather_tokens(pos[:, 1:], wanted)
        x = self.decoder_blocks[:-1](torch.cat([wanted_tokens, self.decoder_embed(latent) + visible_pos], dim=1))
        x = self.decoder_blocks[-1](x, queries=wanted.shape[1])  # only these are read; positions replace the order
        return self.decoder_pred(self.decoder_norm(x))

    def forward(self, imgs, noise):
        """Mean squared error on hidden patches (section 3). Returns the loss, and spread of prediction and target."""
        visible, hidden = random_masking(noise, self.mask_ratio)
        latent = self.vit(imgs, visible)
        pred = self.decode(latent, visible, hidden).float()
        target = gather_tokens(patchify(imgs, self.patch), hidden)
        target = standardise(target) if self.norm_pix else target
        return (pred - target).square().mean(), token_std(pred), token_std(target)

    def start_teacher(self):
        """MAE has no teacher."""

    def update_teacher(self, momentum, finite):
        """MAE has no teacher."""

    def compile(self):
        super().compile(dynamic=False)
        self.augment = torch.compile(augment, dynamic=False)


CRITERIA = dict(  # redundancy of each token of x (B, N, D), as (B, N): the most redundant are dropped
    mean=lambda x: F.cosine_similarity(x, x.mean(dim=1, keepdim=True), dim=-1),  # the paper's sim(X, mean of X)
    unit=lambda x: F.cosine_similarity(x, F.normalize(x, dim=-1).mean(dim=1, keepdim=True), dim=-1),  # the code's
    random=lambda x: torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]),  # already in random order
)


class PCAE(MAE):
    """MAE's encoder and decoder; they predict the teacher's features, at the few patches that the teacher keeps."""

    def __init__(self, shape, args, mean, std, backbone=ViT):
        super().__init__(shape, args, mean, std, backbone, out=shape["dim"])
        self.teacher = backbone(**shape, pos="sincos").requires_grad_(False)
        depth = shape["depth"]
        self.stages = args.stages if args.stages is not None else [depth // 3 * i for i in range(3)]
        self.keep, self.redundancy = args.keep, CRITERIA[args.criterion]
        if any(not 0 <= i < depth for i in self.stages):
            raise InputError(f"--stages {self.stages}: blocks are numbered 0 to {depth - 1}")
        if not self.keep:
            raise InputError("--keep 0 would keep no token: give a share above 0")
        self.start_teacher()

    def start_teacher(self):
        self.teacher.load_state_dict(self.vit.state_dict())

    def update_teacher(self, momentum, finite):
        ema_update(self.teacher, self.vit, momentum, finite)

    @torch.no_grad()
    def compress(self, imgs, index):
        """The teacher on the patches `index` (B, m), without CLS. Returns the tokens left at the end (B, r, D), and a
        list of the patch indices left after each stage, (B, m_1), (B, m_2), ...; the last are those of the tokens.
        """
        x, left = self.teacher.embed(imgs, index)[:, 1:], []
        for i, block in enumerate(self.teacher.blocks):
            x = block(x)
            if i in self.stages:
                n = max(1, int(x.shape[1] * self.keep))
                kept = self.redundancy(x.float()).topk(n, dim=1, largest=False)[1]
                x, index = gather_tokens(x, kept), index.gather(1, kept)
                left.append(index)
        return self.teacher.norm(x), left

    def forward(self, imgs, noise):
        """1 - cosine of prediction and standardised features. Returns the loss, spread of prediction and raw target."""
        visible, hidden = random_masking(noise, self.mask_ratio)
        target, left = self.compress(imgs, hidden)  # the teacher sees exactly what the student does not
        target = target.float()
        latent = self.vit(imgs, visible)
        pred = self.decode(latent, visible, left[-1] if left else hidden).float()
        loss = 1 - F.cosine_similarity(pred, standardise(target), dim=-1).mean()
        return loss, token_std(pred), token_std(target)


METHODS = dict(mae=MAE, pcae=PCAE)


def train_step(model, optimizer, scaler, imgs, draws, schedule, args):
    """One optimiser step. Nothing in it waits for the GPU.

    model: a MAE or PCAE, or what distribute made of it. imgs: uint8 (B, C, S, S). draws: what sample_step drew.
    schedule: what schedules gave. Returns (4,): loss, standard deviation of prediction and target, gradient's norm.
    """
    net, sums = unwrap(model), 0
    for x, d in micro_batches(model, args.accumulate, imgs, draws):
        x = net.augment(x, d, args.img_size, net.mean, net.std)
        with autocast(x.device, args.precision):
            loss, pred_std, target_std = model(x, d["noise"])
        scaler.scale(loss / args.accumulate).backward()
        sums += torch.stack([loss.detach(), pred_std, target_std]) / args.accumulate

    norm, finite = optimizer_step(optimizer, scaler, schedule.lr, schedule.weight_decay, args.clip)
    net.update_teacher(schedule.momentum, finite)
    return torch.cat([sums, norm[None]])


def schedules(step, total, per_epoch, args):
    """Learning rate, weight decay and the teacher's momentum, from the step alone. total: steps of the whole run."""
    return SimpleNamespace(
        lr=cosine(step, total, args.lr * args.batch / 256, 0.0, args.warmup * per_epoch),
        weight_decay=cosine(step, total, *args.weight_decay),
        momentum=cosine(step, total, args.momentum, 1.0),
    )


# views ---------------------------------------------------------------------------------------------------------------


def sample_step(args, step, side):
    """All random numbers of a step, for the whole batch: a crop, a flip, and noise that orders the patches (B, N)."""
    g = seeded(args.seed, step)
    return dict(
        box=sample_boxes((args.batch, 1), side, args.crop_scale, g),
        flip=torch.rand((args.batch, 1), generator=g) < 0.5,
        noise=torch.rand((args.batch, (args.img_size // args.patch) ** 2), generator=g),
    )


def augment(imgs, draws, size, mean, std):
    """uint8 (B, C, S, S) -> normalised random resized crops (B, C, size, size)."""
    return (crop_resize(imgs.float() / 255, draws["box"], draws["flip"], size) - mean) / std


# pictures and main ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(net, x, file):
    """For each of x (B, C, h, w): visible, reconstructed, original; PCAE: original, visible, hidden, each stage."""
    training = net.training
    net.eval()  # without drop path
    noise = torch.rand((len(x), math.prod(net.vit.grid)), generator=seeded(0, 0)).to(x.device)
    visible, hidden = random_masking(noise, net.mask_ratio)
    patches = patchify(x, net.patch)

    def only(index):  # these patches, and the mean colour elsewhere
        mask = torch.zeros(patches.shape[:2], device=x.device).scatter(1, index, 1.0)[..., None]
        return unpatchify(patches * mask, net.patch, net.vit.grid)

    if isinstance(net, PCAE):
        left = {f"left of stage {i}": only(index) for i, index in enumerate(net.compress(x, hidden)[1], 1)}
        columns = {"image": x, "student sees": only(visible), "teacher sees": only(hidden)} | left
    else:
        pred, target = net.decode(net.vit(x, visible), visible, hidden).float(), gather_tokens(patches, hidden)
        if net.norm_pix:  # a hidden patch's own mean and variance, which were not predicted, are taken from the image
            pred = pred * (target.var(dim=-1, keepdim=True) + 1e-6).sqrt() + target.mean(dim=-1, keepdim=True)
        painted = patches.scatter(1, hidden[..., None].expand(-1, -1, patches.shape[-1]), pred)
        columns = dict(visible=only(visible), reconstructed=unpatchify(painted, net.patch, net.vit.grid), image=x)
    net.train(training)
    save_grid({title: c * net.std + net.mean for title, c in columns.items()}, file)


def activations(args):
    """What keeps activations, for step_memory: the encoder's visible patches, and the decoder's tokens."""
    size, n = SIZES[args.size], (args.img_size // args.patch) ** 2
    visible = 1 + int(n * (1 - args.mask_ratio))
    return [(visible, size["dim"], size["depth"]), (1 + n, args.decoder_dim, args.decoder_depth)]


@cli
def main(argv=None, images=None, backbone=ViT):
    args = options(__doc__, OPTIONS, argv)
    device = launch(args)
    table = OPTIONS | PCAE_OPTIONS if args.method == "pcae" else OPTIONS
    train, test = load_data(args, table, device, images)  # opened, options settled, decoded if it fits into memory

    torch.manual_seed(args.seed)
    net = METHODS[args.method](vit_kwargs(args, train.channels), args, *train.stats(), backbone).to(device)
    optimizer, scaler = adamw(net, args.precision, betas=(0.9, 0.95))
    encoder = net.vit  # what k-NN evaluates
    state = dict(net=net, optimizer=optimizer, scaler=scaler)  # what a run needs to resume
    per_epoch = len(train) // args.batch
    total = args.epochs * per_epoch  # steps
    stop = min(total, args.steps or total)
    memory = step_memory(args, net, activations(args), device)  # refuses more than there is
    describe(args, train, encoder, memory)
    if args.method == "pcae":
        check_momentum(args.momentum, total)

    first, lines = resume(args, state, len(train), stop, __file__)
    if args.init and not first:
        start_from(args.init, net.vit, net)
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
            loss, pred_std, target_std, norm = mean_over_processes(stats).tolist()
            flat = min(pred_std, target_std) < 1e-3 and step >= args.warmup * per_epoch
            warning = "COLLAPSED: predictions or targets no longer differ" if flat else None
            log.step(step, warning, loss=loss, pred_std=pred_std, target_std=target_std, grad_norm=norm, lr=schedule.lr)
        monitor.when_due(step, leaving, log)
        if log.save_due(step, leaving):
            save(args, state, encoder, config, step, log)
            log.draw_curve()
            name = dict(mae="reconstruction", pcae="tokens")[args.method]
            draw(net, prepare(four(train, device), config), log.picture(name))
    return monitor.result(args, log)


if __name__ == "__main__":
    main()
