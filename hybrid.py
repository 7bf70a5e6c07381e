"""Trains one encoder on the weighted sum of DINO's loss and MAE's loss.

Park et al., "What Do Self-Supervised Vision Transformers Learn?", ICLR 2023, arXiv 2305.00729.

    python hybrid.py                                 # the images that come with it; minutes on a laptop
    python hybrid.py --weight 0.5 --data cifar10     # with the options of dino.py except --ablate
    torchrun --nproc-per-node=2 hybrid.py --data photos/

Measured: `python hybrid.py`, k-NN 67.4 ± 0.7 % (n = 3 seeds), untrained 34.6, raw pixels 25.1 (RESULTS.md).

The idea. L = (1 - w) L_MIM + w L_CL (Figure 12; w is its lambda). CL shapes the later layers and separates images; MIM
shapes the earlier ones and keeps positions; a little CL helps MIM. MAE sees crops of its own, flipped but not coloured;
DINO sees its usual views. The log has, every 100 steps, the norm of each weighted gradient in the encoder (grad_mim and
grad_cl), as w says little about which one is stronger.

This file shows how to combine two method files: the models, losses and augmentation of dino.py and mae_pcae.py are
called, not repeated. Differs from the paper: DINO and MAE instead of MoCo v3 and SimMIM; optimiser, schedules,
clipping, drop path and the evaluated feature (the teacher's CLS token) are DINO's. So are the learned positions: MAE's
sine-cosine ones outweigh patch embeddings at first, so all images look alike (cosine of two CLS tokens 0.99, not
0.94), and DINO's outputs become uniform before they tell anything apart.
"""

import sys

if __name__ == "__main__":
    print("loading PyTorch ...", file=sys.stderr, flush=True)  # it takes seconds

import torch
import torch._functorch.config
from torch import nn

import dino
import mae_pcae
from dino import DINOHead, Network, dino_loss, schedules, update_center

# isort: off
from vit import ViT  # 1 network
from vit import adamw, autocast, distribute, ema_update, mean_over_processes, micro_batches  # 3 training step
from vit import optimizer_step, shard, unwrap
from vit import four, prepare  # 4 images
from vit import start_from  # 6 checkpoints
from vit import COUNT, SHARE, Log, Monitor, by_preset, check_momentum, cli, describe, encoder_config, launch  # 7 runs
from vit import load_data, options, resume, save, step_memory, steps, vit_kwargs

MAE_OPTIONS = ("mask_ratio", "norm_pix", "decoder_dim", "decoder_depth", "decoder_heads", "crop_scale")
OPTIONS = {k: row for k, row in dino.OPTIONS.items() if k != "ablate"}
OPTIONS |= {k: mae_pcae.OPTIONS[k] for k in MAE_OPTIONS} | dict(
    epochs=(by_preset(6, "180000 images", 100), "length of the run; the schedules follow it", COUNT),
    weight=(by_preset(0.5, 0.2), "w in L = (1 - w) L_MIM + w L_CL", SHARE),  # on the demo set DINO needs more than .2
)


class Hybrid(nn.Module):
    """MAE and DINO's student share one ViT; the teacher is the student's moving average."""

    feature = "cls"  # what evaluation reads

    def __init__(self, shape, args, mean, std, backbone=ViT):
        super().__init__()
        head = lambda: DINOHead(shape["dim"], args.prototypes, args.hidden, norm_last_layer=args.norm_last_layer)
        self.mae = mae_pcae.MAE(shape, args, mean, std, backbone, pos="learned")
        self.student = Network(self.mae.vit, head())
        self.teacher = Network(backbone(**shape), head()).requires_grad_(False)
        self.register_buffer("center", torch.zeros(args.prototypes))
        self.augment = dino.augment
        self.start_teacher()

    mean, std = property(lambda self: self.mae.mean), property(lambda self: self.mae.std)
    start_teacher = dino.DINO.start_teacher

    def forward(self, crop, noise, *views):
        """What is trained, in one forward pass: MAE's loss, and the student's outputs (V·B, K)."""
        return self.mae(crop, noise)[0], self.student(*views)

    def compile(self):
        torch._functorch.config.donated_buffer = False  # gradient_norm keeps the graph for backward()
        dino.DINO.compile(self)
        self.mae.compile()


def sample_step(args, step, side):
    """All random numbers of a step: MAE's crop, flip and noise, then those of DINO's global and local views."""
    d_mim = mae_pcae.sample_step(args, step + 2**31, side)  # a step that DINO never has, or both would draw alike
    d_global, d_local = dino.sample_step(args, step, side)
    return d_mim, d_global, d_local


def train_step(model, optimizer, scaler, imgs, draws, schedule, args, norms=False):
    """One optimiser step. model: a Hybrid, or what distribute made of it. imgs: uint8 (B, C, S, S). draws, schedule: of
    sample_step and schedules.

    Returns (7,): loss, L_MIM, L_CL, the teacher's entropy, the gradient's norm, and with `norms` those of the encoder's
    gradients of (1 - w) L_MIM and of w L_CL alone, means over micro-batches (else 0).
    """
    net, w = unwrap(model), args.weight
    encoder = [p for p in net.mae.vit.parameters() if p.requires_grad]
    sums, both, batch_mean = 0, torch.zeros(2, device=imgs.device), 0
    for x, d_mim, d_global, d_local in micro_batches(model, args.accumulate, imgs, *draws):
        crop = net.mae.augment(x, d_mim, args.img_size, net.mean, net.std)
        views = dino.make_views(net, x, d_global, d_local, args)
        with autocast(x.device, args.precision):
            with torch.no_grad():
                t = net.teacher(views[0]).float().unflatten(0, (2, len(x)))  # (2, B, K)
            mim, s = model(crop, d_mim["noise"], *views)
        s = s.float().unflatten(0, (-1, len(x)))  # (V, B, K)
        cl, entropy, _ = dino_loss(s, t, net.center, teacher_temp=schedule.teacher_temp)
        if norms:
            both += torch.stack([gradient_norm(part, encoder) for part in scaler.scale(((1 - w) * mim, w * cl))])
        loss = (1 - w) * mim + w * cl
        scaler.scale(loss / args.accumulate).backward()
        sums += torch.stack([part.detach() for part in (loss, mim, cl, entropy)]) / args.accumulate
        batch_mean += t.mean(dim=(0, 1)) / args.accumulate

    both = both / (args.accumulate * scaler.get_scale()) if norms else both  # in fp16 this waits for the GPU
    if schedule.freeze_last_layer:
        net.student.head.prototypes.grad = net.student.head.weight_g.grad = None
    lr, weight_decay = schedule.lr, schedule.weight_decay
    norm, finite = optimizer_step(optimizer, scaler, lr, weight_decay, args.clip, per_parameter=True)
    ema_update(net.teacher, net.student, schedule.momentum, finite)
    update_center(net.center, batch_mean, args.center_momentum, finite)
    return torch.cat([sums, norm[None], both])


def gradient_norm(loss, params):
    """The norm of the loss's gradient with respect to all params, (); the graph stays for backward()."""
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return torch.stack(torch._foreach_norm([g for g in grads if g is not None])).norm()


@cli
def main(argv=None, images=None, backbone=ViT):
    args = options(__doc__, OPTIONS, argv, method="hybrid")
    device = launch(args)
    train, test = load_data(args, OPTIONS, device, images)
    dino.check(args)

    torch.manual_seed(args.seed)
    net = Hybrid(vit_kwargs(args, train.channels), args, *train.stats(), backbone).to(device)
    optimizer, scaler = adamw(net, args.precision)
    encoder = net.teacher.vit  # what k-NN evaluates
    state = dict(net=net, optimizer=optimizer, scaler=scaler)  # what a run needs to resume
    per_epoch = len(train) // args.batch
    total = args.epochs * per_epoch  # steps
    stop = min(total, args.steps or total)
    memory = step_memory(args, net, dino.activations(args) + mae_pcae.activations(args), device)
    describe(args, train, encoder, memory)
    check_momentum(args.momentum, total)

    first, lines = resume(args, state, len(train), stop, __file__)
    if args.init and not first:
        start_from(args.init, net.mae.vit, net)
    config = encoder_config(args, net, encoder)
    log = Log(args, lines, first, stop, optimizer)
    monitor = Monitor(args, encoder, config, train, test, device)
    monitor.before(log)
    if log.rank == 0 and not first:
        dino.draw_attention(encoder, four(train, device), config, log.picture("attention-untrained"))
    model = distribute(net)
    if args.compile:
        net.compile()

    for step, imgs, leaving in steps(train, args, log, device):
        schedule = schedules(step, total, per_epoch, args)
        draws = shard(sample_step(args, step, train.side), device)  # this process's part of what is drawn for the batch
        norms = step == 0 or (step + 1) % 100 == 0  # they cost two more backward passes
        stats = train_step(model, optimizer, scaler, imgs, draws, schedule, args, norms)
        if log.due(step, leaving):
            names = ("loss", "mim", "cl", "entropy", "grad_norm", "grad_mim", "grad_cl")[: 7 if norms else 5]
            row = dict(zip(names, mean_over_processes(stats).tolist(), strict=False), lr=schedule.lr)
            warmed_up = args.weight and step >= args.warmup * per_epoch
            kl = row["cl"] - row["entropy"]
            warning = dino.collapse_warning(row["entropy"], kl, args.prototypes) if warmed_up else None
            log.step(step, warning, **row)
        monitor.when_due(step, leaving, log)
        if log.save_due(step, leaving):
            save(args, state, encoder, config, step, log)
            log.draw_curve()
            sample = four(train, device)
            dino.draw_attention(encoder, sample, config, log.picture("attention"))
            mae_pcae.draw(net.mae, prepare(sample, config), log.picture("reconstruction"))
    return monitor.result(args, log)


if __name__ == "__main__":
    main()
