"""Trains one encoder on the weighted sum of DINO's loss and MAE's loss.

Park et al., "What Do Self-Supervised Vision Transformers Learn?", ICLR 2023, arXiv 2305.00729.

    python hybrid.py                                 # the images that come with it; minutes on a laptop
    python hybrid.py --weight 0.5 --data cifar10     # with the options of dino.py except --ablate
    torchrun --nproc-per-node=2 hybrid.py --data photos/

Measured: `python hybrid.py`, k-NN 67.4 ± 0.6 % (n = 3 seeds), untrained 35.2, raw pixels 25.1 (RESULTS.md).

The idea. L = (1 - w) L_MIM + w L_CL (Figure 12; w is its lambda). CL shapes the later layers and separates images; MIM
shapes the earlier ones and keeps positions; a little CL helps MIM. MAE sees crops of its own, flipped but not coloured;
DINO sees its usual views. The log has the norm of each weighted gradient in the encoder (grad_mim and grad_cl), as w
says little about which one is stronger.

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
from torch import nn

import dino
import mae_pcae
from dino import DINOHead, Network, dino_loss, schedules, update_center

# isort: off
from vit import ViT  # 1 network
from vit import prepare  # 2 images
from vit import adamw, autocast, ema_update, mean_over_processes, micro_batches, my_rows  # 4 training step
from vit import optimizer_step
from vit import start_from  # 6 checkpoints
from vit import COUNT, SHARE, Run, by_preset, check_momentum, cli, launch, load_data  # 7 runs
from vit import options, shape_of, step_memory

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

    def compile(self):
        dino.DINO.compile(self)
        self.mae.compile()


def sample_step(args, step, side):
    """All random numbers of a step: MAE's crop, flip and noise, then those of DINO's global and local views."""
    return mae_pcae.sample_step(args, step + 2**31, side), *dino.sample_step(args, step, side)  # not DINO's seed


def train_step(net, optimizer, scaler, imgs, draws, schedule, args, norms=False):
    """One optimiser step. net: a Hybrid. imgs: uint8 (B, C, S, S). draws, schedule: of sample_step and schedules.

    Returns (7,): loss, L_MIM, L_CL, the teacher's entropy, the gradient's norm, and with `norms` those of the encoder's
    gradients of (1 - w) L_MIM and of w L_CL alone, means over micro-batches (else 0).
    """
    total, batch_mean, w = 0, 0, args.weight
    both, encoder = torch.zeros(2, device=imgs.device), [p for p in net.mae.vit.parameters() if p.requires_grad]
    for x, d_mim, d_global, d_local in micro_batches(args.accumulate, imgs, *draws):
        crop = net.mae.augment(x, d_mim, args.img_size, net.mean, net.std)
        with autocast(x.device, args.precision):
            mim, *_ = net.mae(crop, d_mim["noise"])
        before = gradients(encoder) if norms else None
        scaler.scale((1 - w) * mim / args.accumulate).backward()
        between = gradients(encoder) if norms else None

        s, t = dino.outputs(net, x, d_global, d_local, args)
        cl, entropy, _ = dino_loss(s, t, net.center, teacher_temp=schedule.teacher_temp)
        scaler.scale(w * cl / args.accumulate).backward()
        if norms:
            both += torch.stack([distance(between, before), distance(gradients(encoder), between)])
        parts = [(1 - w) * mim + w * cl, mim, cl, entropy]
        total += torch.stack([p.detach() for p in parts]) / args.accumulate
        batch_mean += t.mean(dim=(0, 1)) / args.accumulate

    scale = scaler.get_scale() if norms else 1  # in fp16 this waits for the GPU
    if schedule.freeze_last_layer:
        net.student.head.prototypes.grad = net.student.head.length.grad = None
    rates = schedule.lr, schedule.weight_decay
    norm, finite = optimizer_step(optimizer, scaler, *rates, args.clip, per_parameter=True)
    ema_update(net.teacher, net.student, schedule.momentum, finite)
    update_center(net.center, batch_mean, args.center_momentum, finite)
    return torch.cat([total, norm[None], both / scale])


def gradients(params):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def distance(a, b):
    return torch.stack(torch._foreach_norm(torch._foreach_sub(a, b))).norm()


@cli
def main(argv=None, images=None, backbone=ViT):
    args = options(__doc__, OPTIONS, argv, method="hybrid")
    device = launch(args)
    train, test = load_data(args, OPTIONS, device, images)
    dino.check(args)

    torch.manual_seed(args.seed)
    net = Hybrid(shape_of(args, train.channels), args, *train.stats(), backbone).to(device)
    if args.init:
        start_from(args.init, net.mae.vit, net)
    optimizer, scaler = adamw(net, args.precision)
    memory = step_memory(args, net, dino.activations(args) + mae_pcae.activations(args), device)
    run = Run(args, net, net.teacher.vit, optimizer, scaler, train, test, __file__, memory)
    run.resume()
    run.baselines()
    check_momentum(args.momentum, run.total)
    if args.compile:
        net.compile()

    for step, imgs in run.steps(train):
        schedule, due = schedules(step, run, args), run.log_due(step)
        draws = my_rows(sample_step(args, step, train.side), device)
        stats = train_step(net, optimizer, scaler, imgs, draws, schedule, args, norms=due)
        if due:
            names = ("loss", "mim", "cl", "entropy", "grad_norm", "grad_mim", "grad_cl")
            row = dict(zip(names, mean_over_processes(stats).tolist(), strict=True), lr=schedule.lr)
            late = args.weight and step >= args.warmup * run.steps_per_epoch
            warning = dino.collapse(row["entropy"], row["cl"] - row["entropy"], args.prototypes) if late else None
            run.log(step, warning, **row)
        run.knn_when_due(step)
        if run.save_due(step):
            run.save(step)
            run.draw_curve()
            sample = prepare(run.sample, run.config)
            dino.draw_attention(net.teacher.vit, sample, net.mean, net.std, run.out / "attention.png")
            mae_pcae.draw(net.mae, sample, run.out / "reconstruction.png")
    return run.finish()


if __name__ == "__main__":
    main()
