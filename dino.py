"""DINO: a student predicts, from one crop of an image, the output of its moving-average teacher for another crop.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, arXiv 2104.14294.

    python dino.py                                      # the images that come with it; minutes on a laptop
    python dino.py --data cifar10 --epochs 100          # downloads; or a folder of images, with or without classes
    torchrun --nproc-per-node=2 dino.py --data photos/  # several processes share each batch
    python dino.py --ablate no-centering                # watch it collapse

Measured: `python dino.py`, k-NN 67.2 ± 1.7 % (n = 3 seeds), untrained 34.6, raw pixels 25.1 (RESULTS.md).

The idea. Student and teacher have one architecture and see crops of an image. Both give a distribution over
K prototypes; the student learns to match the teacher's, and the teacher is an exponential moving average (EMA) of the
student. Local crops go to the student only, so it learns to infer the whole from a part. Two opposite forces prevent
a constant output: centring keeps any one prototype from winning always, sharpening keeps the distribution from
becoming uniform.

Symbols of the paper: g_s = net.student, g_t = net.teacher, c = net.center, m = --center-momentum, lambda (l in
Algorithm 1) = schedule.momentum, which begins at --momentum, K = --prototypes, tau_t = schedule.teacher_temp, tau_s =
student_temp in dino_loss. Read sections 1 to 3 of vit.py too. Change dino_loss for another loss, sample_views and
augment for another augmentation; then give another --out, as a run that is found there resumes (vit.resume says how).
main(backbone=...) takes another network, a subclass of ViT that changes `cls`, `embed` or its blocks;
main(images=(train, test)) another data set, two vit.Images.

Differs from the authors' code:
- Augmentation runs on the device for the whole batch: colour operations in a fixed order (theirs: drawn for each
  image), no rounding to 8 bits in between, a true Gaussian blur (Pillow's: box blurs), sigma in px of a 224 px image.
- Crops are cut from a stored square (theirs: from the whole image). Its side is --img-size, above 64 px up to twice
  that, and of an oblong image it is the middle.
- Position embeddings are interpolated to the exact size (see vit.py). Mean and std are those of the data set.
- A gradient that is not finite skips the step (theirs: a loss that is not finite ends the run).
- --batch counts all processes and micro-batches. Precision is bf16 where the hardware has it (theirs: fp16).
- The teacher's temperature rises step by step (theirs: epoch by epoch). The preset 224 is their code's default run;
  the paper's has --teacher-temp .04 .07 --batch 1024.
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
from vit import SIZES, InputError, ViT  # 1 network
from vit import blend, crop_resize, gaussian_blur, gray, sample_boxes, shift_hue  # 2 views
from vit import adamw, autocast, cosine, distribute, ema_update, mean_over_processes, micro_batches  # 3 training step
from vit import optimizer_step, seeded, shard, unwrap
from vit import four, mean_and_std, note, prepare  # 4 images
from vit import save_grid  # 5 evaluation
from vit import start_from  # 6 checkpoints
from vit import COMMON, COUNT, MANY, SHARE, Log, Monitor, ablate, by_preset, check_momentum, cli, describe  # 7 runs
from vit import encoder_config, launch, load_data, options, resume, save, step_memory, steps, vit_kwargs

ABLATIONS = {  # name -> the options that it sets
    "no-centering": dict(center_momentum=1.0),  # the centre stays at zero: one prototype wins, the entropy falls to 0
    "no-sharpening": dict(teacher_temp=[0.1, 0.1]),  # as the student's: the entropy rises to ln K
    "no-momentum": dict(momentum=0.0),  # the teacher is the student itself
    "no-multicrop": dict(local_crops=0, global_scale=[0.14, 1.0]),  # the authors' without local crops
    "mse": {},  # these two change the loss
    "infonce": {},
}
# name=(default, help[, arguments for argparse]); by_preset(demo, cpu, 32 px, 96 px, 224 px):
# missing values repeat the last one; None and "..." are computed in vit.settle, --local-size in check
OPTIONS = COMMON | dict(
    size=(by_preset("nano", "nano", "tiny", "small"), "width, depth and heads", dict(choices=SIZES)),
    patch=(by_preset(4, "1/4 of the image", 4, 8, 16), "patch size, px", COUNT),
    img_size=(by_preset(32, None, None, 96, 224), "input side, px (the images' own; cpu: at most 48)", COUNT),
    epochs=(by_preset(6, "180000 images", 100), "length of the run; the schedules follow it", COUNT),
    batch=(by_preset(64, 64, 256, 256, 512), "images in an optimiser step, of all processes", COUNT),
    lr=(by_preset(2e-3, 4e-3, 1e-3, 5e-4), "learning rate for batch 256; scaled with the batch"),
    warmup=(by_preset(0.5, None, 10.0), "epochs over which the learning rate rises"),
    weight_decay=((0.04, 0.4), "of all but biases and norms, at the start and at the end"),
    clip=(3.0, "clip each parameter's gradient to this norm; 0 turns clipping off"),
    drop_path=(by_preset(0.0, 0.0, 0.1), "stochastic depth of the student", SHARE),
    prototypes=(by_preset(256, 1024, 4096, 8192, 65536), "K, outputs of the head; small data sets need fewer", COUNT),
    hidden=(by_preset(512, 512, 2048), "width of the head's hidden layers", COUNT),
    norm_last_layer=(True, "prototypes of unit norm: more stable"),
    freeze_last_layer=(by_preset(0, 0, 1), "epochs in which prototypes are frozen; raise it if the loss rises"),
    global_scale=(by_preset((0.5, 1.0), (0.4, 1.0)), "area of the two global crops, share of the image"),
    local_crops=(by_preset(2, 2, 6, 6, 8), "local crops for the student; use 0 together with --global-scale 0.14 1"),
    local_size=(None, "their size, px (3/7 of --img-size, in whole patches)", COUNT),
    local_scale=(by_preset((0.25, 0.5), (0.1, 0.4), (0.1, 0.4), (0.05, 0.4)), "their area, share of the image"),
    color=(by_preset(0.0, 0.5, 1.0), "strength of colour jitter, grey and solarization; 1 as published"),
    momentum=(by_preset(0.97, 0.98, 0.99, 0.996), "of the teacher, 1 at the end; lower it for short runs"),
    center_momentum=(by_preset(0.5, 0.9), "of the centre; lower it if the winning prototype keeps changing"),
    teacher_temp=(by_preset((0.02,), (0.04,)), "at the start [and end]; lower it if the loss stays at ln K", MANY),
    teacher_temp_epochs=(30.0, "epochs over which the teacher's temperature rises, if two are given"),
    ablate=(None, "remove one component and see what breaks", dict(choices=ABLATIONS)),
)

# model and loss ------------------------------------------------------------------------------------------------------


class DINOHead(nn.Module):
    """Projection head (appendix C): three layers, L2 norm, K weight-normalised prototypes. (B, D) -> (B, K)."""

    def __init__(self, dim, prototypes, hidden=2048, bottleneck=256, norm_last_layer=True):
        super().__init__()
        layers = nn.Linear(dim, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        bound = bottleneck**-0.5
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        scale = self.weight_g[:, 0] / self.prototypes.norm(dim=1)  # weight normalisation, without a copy of the weights
        return F.linear(x, self.prototypes) * scale


class Network(nn.Module):
    """Backbone and head. views: one tensor for each crop size, the global ones (2·B, C, h, w) first. Returns the
    outputs of all views, (V·B, K), in the same order.
    """

    def __init__(self, vit, head):
        super().__init__()
        self.vit, self.head = vit, head

    def forward(self, *views):
        return self.head(torch.cat([self.vit.cls(x) for x in views]))


class DINO(nn.Module):
    """Student, its moving-average teacher, and the centre of the teacher's outputs (K,)."""

    feature = "cls"  # what evaluation reads

    def __init__(self, shape, args, mean, std, backbone=ViT):
        super().__init__()
        head = lambda: DINOHead(shape["dim"], args.prototypes, args.hidden, norm_last_layer=args.norm_last_layer)
        self.student = Network(backbone(**shape, drop_path=args.drop_path), head())
        self.teacher = Network(backbone(**shape), head()).requires_grad_(False)
        self.register_buffer("center", torch.zeros(args.prototypes))
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.augment = augment  # an attribute, so that compile() can replace it
        self.start_teacher()

    def start_teacher(self):
        self.teacher.load_state_dict(self.student.state_dict())

    def forward(self, *views):
        """The student's outputs. DistributedDataParallel calls this; the teacher is called as net.teacher(views[0])."""
        return self.student(*views)

    def compile(self):
        for part in (self.student, self.teacher):
            part.compile(dynamic=False)
        self.augment = torch.compile(augment, dynamic=False)


def dino_loss(student, teacher, center, student_temp=0.1, teacher_temp=0.04):
    """Cross-entropy H(P_t(x), P_s(x')), mean over images and pairs of different views (Eq. 3, which is a sum).

    student (V, B, K), teacher (2, B, K): outputs before softmax, the two global views first; center (K,).
    Returns the loss, the teacher's entropy h(P_t), and loss - h = KL(P_t || P_s), 0 in a collapse (section 5.3).
    """
    p_teacher = ((teacher - center) / teacher_temp).softmax(dim=-1)  # centred and sharpened
    log_p_student = (student / student_temp).log_softmax(dim=-1)
    pairs = -torch.einsum("tbk,sbk->tsb", p_teacher, log_p_student)  # (2, V, B): H(P_t(x), P_s(x'))
    different = 1 - torch.eye(*pairs.shape[:2], device=pairs.device)[..., None]  # 0 where x' is x
    loss = (pairs * different).sum() / different.expand_as(pairs).sum()
    entropy = torch.special.entr(p_teacher).sum(dim=-1).mean()
    return loss, entropy, loss.detach() - entropy


def make_views(net, imgs, d_global, d_local, args):
    """The two global views of imgs, (2·B, C, h, w), and the local ones, if there are any: a list of one or two."""
    unit = args.img_size / 224
    views = [net.augment(imgs, d_global, args.img_size, unit, net.mean, net.std)]
    if args.local_crops:
        views.append(net.augment(imgs, d_local, args.local_size, unit, net.mean, net.std))
    return views


def update_center(center, batch_mean, momentum, finite):
    """Eq. 4: c = m c + (1 - m) mean of the teacher's outputs over the whole batch; unchanged where `finite` is 0."""
    moved = center.lerp(mean_over_processes(batch_mean), 1 - momentum)
    center.copy_(torch.where(finite > 0, moved, center))  # no product: batch_mean may be nan


def train_step(model, optimizer, scaler, imgs, draws, schedule, args):
    """One optimiser step (section 3, Algorithm 1). Nothing in it waits for the GPU.

    model: a DINO, or what distribute made of it. imgs: uint8 (B, C, S, S). draws: what sample_step drew. schedule: what
    schedules gave for this step. Returns (4,): loss, the teacher's entropy, KL and the gradient's norm.
    """
    net = unwrap(model)
    sums, batch_mean = 0, 0
    for x, d_global, d_local in micro_batches(model, args.accumulate, imgs, *draws):
        views = make_views(net, x, d_global, d_local, args)
        with autocast(x.device, args.precision):
            with torch.no_grad():
                t = net.teacher(views[0]).float().unflatten(0, (2, len(x)))  # (2, B, K): of the global views
            s = model(*views).float().unflatten(0, (-1, len(x)))  # (V, B, K)
        loss, entropy, kl = dino_loss(s, t, net.center, teacher_temp=schedule.teacher_temp)
        if args.ablate in OTHER_LOSSES:  # of the centred outputs; the log keeps DINO's entropy and KL
            loss = pairwise(s, t - net.center, OTHER_LOSSES[args.ablate])
        scaler.scale(loss / args.accumulate).backward()
        sums += torch.stack([loss.detach(), entropy, kl]) / args.accumulate
        batch_mean += t.mean(dim=(0, 1)) / args.accumulate

    if schedule.freeze_last_layer:
        net.student.head.prototypes.grad = net.student.head.weight_g.grad = None
    lr, weight_decay = schedule.lr, schedule.weight_decay
    norm, finite = optimizer_step(optimizer, scaler, lr, weight_decay, args.clip, per_parameter=True)
    ema_update(net.teacher, net.student, schedule.momentum, finite)
    update_center(net.center, batch_mean, args.center_momentum, finite)
    return torch.cat([sums, norm[None]])


def schedules(step, total, per_epoch, args):
    """Learning rate, weight decay, the teacher's momentum and temperature (section 3), and whether the prototypes are
    frozen, from the step alone. total: steps of the whole run. per_epoch: steps of an epoch.
    """
    start, end = args.teacher_temp[0], args.teacher_temp[-1]
    ramp = min(1, step / max(1, min(args.teacher_temp_epochs, args.epochs) * per_epoch - 1))
    return SimpleNamespace(
        lr=cosine(step, total, args.lr * args.batch / 256, 1e-6, args.warmup * per_epoch),
        weight_decay=cosine(step, total, *args.weight_decay),
        momentum=cosine(step, total, args.momentum, 1.0) if args.momentum else 0.0,  # 0, of an ablation, stays
        teacher_temp=start + ramp * (end - start),  # constant if one value is given
        freeze_last_layer=step < args.freeze_last_layer * per_epoch,
    )


# views: crops and colours --------------------------------------------------------------------------------------------


def sample_views(batch, views, side, scale, blur, solarize, color, g):
    """All random numbers of `views` crops of each image, (batch, views, ...): BYOL's augmentation.

    side: of the images, px. scale: area of the crops. blur, solarize: a probability for each view. color: strength of
    the jitter, and a factor on the probabilities of grey and solarization; 1 as published.
    """
    rand = lambda: torch.rand((batch, views), generator=g)
    draws = dict(box=sample_boxes((batch, views), side, scale, g), flip=rand() < 0.5)
    jitter = rand() < 0.8  # for each view, all four operations or none

    def factor(neutral, width):  # uniform in neutral ± color · width where there is jitter, else neutral
        return torch.where(jitter, neutral + color * width * (2 * rand() - 1), neutral)

    draws["brightness"] = factor(1.0, 0.4)
    draws["contrast"] = factor(1.0, 0.4)
    draws["saturation"] = factor(1.0, 0.2)
    draws["hue"] = factor(0.0, 0.1)
    draws["keep_color"] = (rand() >= 0.2 * color).float()  # 0 makes the image grey
    sigma = 0.1 + 1.9 * rand()  # px of a 224 px image; 0: no blur
    draws["sigma"] = sigma.where(rand() < torch.tensor(blur), 0.0)
    draws["solarize"] = rand() < color * torch.tensor(solarize)
    return draws


def sample_step(args, step, side):
    """All random numbers of a step: those of the two global views and of the local ones, for the whole batch.

    Of blur and of solarization each view has its own probability; local views share one.
    """
    g, color = seeded(args.seed, step), args.color
    two = sample_views(args.batch, 2, side, args.global_scale, [1.0, 0.1], [0.0, 0.2], color, g)
    return two, sample_views(args.batch, args.local_crops, side, args.local_scale, [0.5], [0.0], color, g)


def augment(imgs, draws, size, unit, mean, std):
    """uint8 (B, C, S, S) and what sample_views drew -> normalised views (V·B, C, size, size), view by view.

    unit: --img-size / 224, by which blur's sigma is scaled, in local views too. Jitter and grey need three channels,
    or are left out.
    """
    x = crop_resize(imgs.float() / 255, draws["box"], draws["flip"], size)
    d = {k: rearrange(v, "b v -> (v b) 1 1 1") for k, v in draws.items() if k != "box"}
    if x.shape[1] == 3:
        x = (x * d["brightness"]).clamp(0, 1)
        x = blend(x, gray(x).mean(dim=(2, 3), keepdim=True), d["contrast"])
        x = blend(x, gray(x), d["saturation"])
        x = shift_hue(x, d["hue"])
        x = blend(x, gray(x), d["keep_color"])
    x = gaussian_blur(x, d["sigma"].flatten() * unit, radius=math.ceil(6 * unit))
    x = torch.where(d["solarize"] & (x >= 0.5), 1 - x, x)
    return (x - mean) / std


# other losses, and what a collapse is -------------------------------------------------------------------------------


def mse_loss(student, teacher):
    """Squared distance of L2-normalised outputs (B, K) instead of the cross-entropy (Table 7, row 5)."""
    return (student - teacher).square().sum(dim=-1).mean()


def infonce_loss(student, teacher):
    """InfoNCE (temperature 0.1) against the micro-batch's other images; Table 7, row 8 has MoCo's queue."""
    same = torch.arange(len(student), device=student.device)
    return F.cross_entropy(student @ teacher.T / 0.1, same)


OTHER_LOSSES = dict(mse=mse_loss, infonce=infonce_loss)


def pairwise(student, teacher, loss):
    """Mean of loss(student, teacher), L2-normalised, over pairs of different views; (V, B, K) and (2, B, K)."""
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    pairs = [loss(s[i], t[j]) for j in range(len(t)) for i in range(len(s)) if i != j]
    return sum(pairs) / len(pairs)


def collapse_warning(entropy, kl, prototypes):
    """A warning once the output hardly depends on the image (in a collapse KL is 0, section 5.3), else None."""
    ln_k = math.log(prototypes)
    seen, constant = f"entropy {entropy:.3f} of {ln_k:.2f}, KL {kl:.3f}", kl <= 0.01 * ln_k
    if math.isnan(entropy + kl):  # of a skipped step
        return None
    if entropy >= 0.999 * ln_k or constant and entropy > 0.5 * ln_k:
        return f"COLLAPSED, uniform output for all images: lower --teacher-temp or --lr ({seen})"
    if constant:
        return f"COLLAPSED, one prototype for all images: lower --center-momentum or --lr ({seen})"
    if entropy < 0.03 * ln_k:
        return f"targets are nearly one-hot, too easy ({seen}): raise --teacher-temp, --color or --prototypes"
    return None


# pictures and main ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def cls_attention(vit, x):
    """Where the CLS token attends in the last block, for images x (B, C, h, w): (B, H, h/P, w/P)."""
    return vit.attention(x, queries=1)[:, :, 0, 1:].unflatten(2, (-1, x.shape[-1] // vit.patch)).float()


def attention_columns(maps, image):
    """Columns for save_grid: image (B, C, h, w) in [0, 1], each head of cls_attention, and the scale of the colours.

    The heads of an image have one scale, from 0, black, by red and yellow to the largest value of them all, white.
    """
    heat = maps / maps.amax(dim=(1, 2, 3), keepdim=True)
    heat = F.interpolate(heat, size=image.shape[-2:], mode="bicubic").clamp(0, 1)
    scale = torch.linspace(0, 1, image.shape[-1], device=heat.device).expand_as(heat[:, :1])
    heat = torch.cat([heat, scale], dim=1)
    heat = torch.stack([(3 * heat - k).clamp(0, 1) for k in range(3)], dim=2)
    names = [f"head {i}" for i in range(1, maps.shape[1] + 1)]
    return dict(image=image) | dict(zip([*names, "0 to largest"], heat.unbind(1), strict=True))


def draw_attention(vit, imgs, config, file):
    """Where the CLS token of each head attends in imgs, uint8 (B, C, S, S)."""
    x = prepare(imgs, config)
    mean, std = mean_and_std(config, x.device)
    save_grid(attention_columns(cls_attention(vit, x), x * std + mean), file)


def check(args):
    """Fills in --local-size, and refuses options that do not fit together."""
    if args.local_size is None:
        args.local_size = math.ceil(args.img_size * 3 / 7 / args.patch) * args.patch
    if min(args.teacher_temp) <= 0 or len(args.teacher_temp) > 2:
        raise InputError(f"--teacher-temp {args.teacher_temp}: give one temperature above 0, or the first and the last")
    if args.local_crops and args.local_size % args.patch:
        raise InputError(f"--local-size {args.local_size} is not a multiple of --patch {args.patch}: change one")


def activations(args):
    """What keeps activations, for step_memory: tokens, width, blocks. Outputs of a head count as half a block: of the
    student's views and the teacher's two.
    """
    size, views = SIZES[args.size], 2 + args.local_crops
    tokens = lambda side: 1 + (side // args.patch) ** 2
    student = 2 * tokens(args.img_size) + args.local_crops * tokens(args.local_size)
    return [(student, size["dim"], size["depth"]), (views + 2, args.prototypes, 0.5)]


@cli
def main(argv=None, images=None, backbone=ViT):
    args = options(__doc__, OPTIONS, argv, method="dino")
    ablate(args, ABLATIONS)
    device = launch(args)
    train, test = load_data(args, OPTIONS, device, images)  # opened, options settled, decoded if it fits into memory
    check(args)

    torch.manual_seed(args.seed)
    net = DINO(vit_kwargs(args, train.channels), args, *train.stats(), backbone).to(device)
    optimizer, scaler = adamw(net.student, args.precision)
    encoder = net.teacher.vit  # what k-NN evaluates
    state = dict(net=net, optimizer=optimizer, scaler=scaler)  # what a run needs to resume
    per_epoch = len(train) // args.batch
    total = args.epochs * per_epoch  # steps
    stop = min(total, args.steps or total)
    memory = step_memory(args, net, activations(args), device)  # refuses more than there is
    describe(args, train, encoder, memory)
    if args.preset == "cpu" and total * args.batch < 800_000:
        note("DINO needs to see about a million images; in less, mae_pcae.py learns more (README, Your own photos)")
    check_momentum(args.momentum, total)

    first, lines = resume(args, state, len(train), stop, __file__)
    if args.init and not first:
        start_from(args.init, net.student.vit, net)
    config = encoder_config(args, net, encoder)
    log = Log(args, lines, first, stop, optimizer)
    monitor = Monitor(args, encoder, config, train, test, device)
    monitor.before(log)
    if log.rank == 0 and not first:
        draw_attention(encoder, four(train, device), config, log.picture("attention-untrained"))
    model = distribute(net)
    if args.compile:
        net.compile()

    for step, imgs, leaving in steps(train, args, log, device):
        schedule = schedules(step, total, per_epoch, args)
        draws = shard(sample_step(args, step, train.side), device)  # this process's part of what is drawn for the batch
        stats = train_step(model, optimizer, scaler, imgs, draws, schedule, args)
        if log.due(step, leaving):
            loss, entropy, kl, norm = mean_over_processes(stats).tolist()
            warmed_up = step >= args.warmup * per_epoch
            warning = collapse_warning(entropy, kl, args.prototypes) if warmed_up else None
            log.step(step, warning, loss=loss, entropy=entropy, kl=kl, grad_norm=norm, lr=schedule.lr)
        monitor.when_due(step, leaving, log)
        if log.save_due(step, leaving):
            save(args, state, encoder, config, step, log)
            log.draw_curve()
            draw_attention(encoder, four(train, device), config, log.picture("attention"))
    return monitor.result(args, log)


if __name__ == "__main__":
    main()
