"""Both worlds in one encoder: DINO's contrast of views and MAE's reconstruction of hidden patches, added.

Park et al., "What Do Self-Supervised Vision Transformers Learn?", ICLR 2023, arXiv 2305.00729.

    python hybrid.py                                 # the images that come with it; minutes on a laptop
    python hybrid.py --weight 0.5 --data cifar10     # options of dino.py are also those of this script
    torchrun --nproc-per-node=2 hybrid.py --data photos/

Measured (n = 3 seeds): `python hybrid.py`, k-NN 64.3 ± 1.0 % in 3.5 minutes on 2 CPU cores; untrained 35.2, raw pixels
25.1 (RESULTS.md).

The idea. L = (1 - w) L_MIM + w L_CL (Figure 12). Contrast shapes the later layers and finds what tells images apart,
masking shapes the earlier ones and keeps what is where; a little of the one helps the other. The masked part sees crops
and flips alone, the contrastive part its own coloured views; both gradients meet in the encoder. The log has their
norms there (grad_mim and grad_cl, weighted), as w says little about who pulls harder.

This file shows how to combine two method files: dino.py's and mae_pcae.py's models, losses and augmentation are called,
not repeated. Differs from the paper's: DINO and MAE in place of MoCo v3 and SimMIM; optimiser, schedules, clipping,
drop path and read-out (the teacher's CLS) are DINO's. So are the learned positions: MAE's sine-cosine ones are larger
than the patches at first, all images look alike (cosine of two CLS tokens 0.99, not 0.94), and DINO's outputs become
uniform before they tell anything apart (RESULTS.md).
"""

import argparse
import math

import torch
from torch import nn

import dino
import mae_pcae
from dino import augment, batches, dino_loss, ema_update, mean_over_processes, my_rows, split_rows
from mae_pcae import crop_resize
from vit import SIZES, InputError, Run, ViT, check_plan, cli, launch, load_splits, positive, prepare, start_from, stream

PRESETS = {"demo": dict(epochs=6), "32": {}, "96": {}, "224": {}}  # over dino.py's
WEIGHTS = {"demo": 0.5, "32": 0.2, "96": 0.2, "224": 0.2}  # with .2, DINO's part wakes late on the demo set


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="and every option of dino.py but --ablate, with its presets; those marked * here have mae_pcae.py's",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--weight", type=float, help="* w in L = (1 - w) L_MIM + w L_CL, 0 to 1")
    add("--mask-ratio", type=float, help="* share of the patches that the encoder does not see")
    add("--norm-pix", action=argparse.BooleanOptionalAction, default=True, help="MAE: each patch's pixels standardised")
    add("--decoder-dim", type=positive, help="* width of the decoder")
    add("--decoder-depth", type=positive, help="* blocks of the decoder")
    add("--decoder-heads", type=positive, help="* attention heads of the decoder")
    add("--crop-scale", type=float, nargs=2, default=[0.2, 1.0], help="area of the crop, share of image")
    own, rest = p.parse_known_args(argv)
    args = dino.get_args(rest, {name: preset | PRESETS[name] for name, preset in dino.PRESETS.items()}, "hybrid")
    if args.ablate:
        raise InputError("--ablate is dino.py's: try it there")
    preset = mae_pcae.PRESETS[args.preset] | dict(weight=WEIGHTS[args.preset])
    for name, value in vars(own).items():
        setattr(args, name, preset.get(name) if value is None else value)
    n = math.prod(ViT.grid_of(args.img_size, args.patch))
    if not 0 < int(n * (1 - args.mask_ratio)) < n:
        raise InputError(f"--mask-ratio {args.mask_ratio} leaves all or none of {n} patches visible")
    if not 0 <= args.weight <= 1:
        raise InputError(f"--weight {args.weight} is not between 0 and 1")
    return args


def draw_all(args, step):
    """All random numbers of a step: MAE's crop, flip and noise, then DINO's global and local views."""
    return mae_pcae.draw_numbers(args, step + 2**31), *dino.draw_crops(args, step)  # + 2**31: another generator


def train_step(nets, teacher, center, update, imgs, draws, args, teacher_temp, momentum, mean, std, norms=False):
    """One optimiser step. nets: "mae" and "student", which share one ViT. imgs: uint8 (B, C, S, S).

    Returns (7,), on the device: loss, L_MIM, L_CL, teacher's entropy, gradient norm, and with `norms` the norms of both
    parts' weighted gradients in the encoder, mean over micro-batches and processes (else 0).
    """
    total, batch_mean, w, pull = 0, 0, args.weight, torch.zeros(2, device=imgs.device)
    encoder = [p for p in nets["mae"].vit.parameters() if p.requires_grad]
    for x, d_mim, d_global, d_local in zip(*(split_rows(t, args.accumulate) for t in (imgs, *draws)), strict=True):
        crop = (crop_resize(x.float() / 255, d_mim["box"], d_mim["flip"], args.img_size) - mean) / std
        with update.autocast():
            mim = nets["mae"](crop, d_mim["noise"])[0]
        before = gradients(encoder) if norms else None
        update.backward((1 - w) * mim / args.accumulate)
        between = gradients(encoder) if norms else None

        unit = max(args.img_size) / 224
        views = [augment(x, d_global, args.img_size, unit, mean, std)]
        if args.local_crops:
            views.append(augment(x, d_local, [args.local_size] * 2, unit, mean, std))
        with update.autocast():
            with torch.no_grad():
                t = teacher(views[:1]).float().unflatten(0, (2, len(x)))
            s = nets["student"](views).float().unflatten(0, (-1, len(x)))
        cl, entropy, _ = dino_loss(s, t, center, args.student_temp, teacher_temp)
        update.backward(w * cl / args.accumulate)
        if norms:
            pull = pull + torch.stack([distance(between, before), distance(gradients(encoder), between)])
        parts = [(1 - w) * mim + w * cl, mim, cl, entropy]
        total += torch.stack([p.detach() for p in parts]) / args.accumulate
        batch_mean += t.mean(dim=(0, 1)) / args.accumulate
    scale = update.scaler.get_scale() if norms else 1  # in fp16 this waits for the device
    ok, norm = update.step(clip_each=args.clip)
    ema_update(teacher, nets["student"], (1 - momentum) * ok)
    moved = center.lerp(mean_over_processes(batch_mean), 1 - args.center_momentum)
    center.copy_(torch.where(ok > 0, moved, center))
    return torch.cat([total, norm[None], pull / scale])


def gradients(params):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def distance(a, b):
    return torch.stack(torch._foreach_norm(torch._foreach_sub(a, b))).norm()


@cli
def main(argv=None):
    args = get_args(argv)
    device, rank, world = launch(args)
    if args.attention:
        return dino.attention_files(args, device)
    run = Run(args, rank, world)
    train, test = load_splits(args, rank)
    check_plan(args, len(train), world, rank)

    torch.manual_seed(args.seed)
    shape = dict(SIZES[args.size], img_size=args.img_size, patch=args.patch, in_chans=train.channels)
    make_head = lambda: dino.DINOHead(shape["dim"], args.prototypes, args.hidden, norm_last_layer=args.norm_last_layer)
    mae = mae_pcae.MAE(shape, args, args.drop_path, pos="learned")
    nets = nn.ModuleDict(dict(mae=mae, student=dino.DINO(mae.vit, make_head()))).to(device)  # one ViT in both
    teacher = dino.DINO(ViT(**shape), make_head()).to(device).requires_grad_(False)
    center = torch.zeros(args.prototypes, device=device)
    config = dict(mae.vit.config, method="hybrid", data=args.data, feature="cls")
    config["mean"], config["std"] = train.stats()
    if args.init:
        start_from(args.init, dict(nets=nets, center=center), mae.vit, config)
    teacher.load_state_dict(nets["student"].state_dict())

    mean, std = (torch.tensor(config[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))
    update = dino.Update([nets], device, args.precision)
    parts = dict(nets=nets, teacher=teacher, center=center, update=update)
    run.begin(parts, teacher.vit, config, train, test, device)
    if args.compile:
        nets["mae"].compile(dynamic=False), nets["student"].compile(dynamic=False), teacher.compile(dynamic=False)

    keys = batches(len(train), args.batch, run.first, run.stop, args.seed, rank, world)
    for step, imgs in run.steps(stream(train, keys, device, args.workers)):
        lr, weight_decay, momentum, teacher_temp = dino.schedules(step, run.total, run.steps_per_epoch, args)
        update.set(lr, weight_decay)
        nets["student"].head.freeze_last_layer(step < args.freeze_last_layer * run.steps_per_epoch)
        draws = [my_rows(d, rank, world, device) for d in draw_all(args, step)]
        due = run.log_due(step)
        rest = (teacher_temp, momentum, mean, std, due)
        stats = train_step(nets, teacher, center, update, imgs, draws, args, *rest)
        if due:
            names = ("loss", "mim", "cl", "entropy", "grad_norm", "grad_mim", "grad_cl")
            row = dict(zip(names, mean_over_processes(stats).tolist(), strict=True), lr=lr)
            kl = row["cl"] - row["entropy"] if step >= args.warmup * run.steps_per_epoch and args.weight else math.inf
            run.log(step, row, update.skipped.tolist(), dino.collapse(row["entropy"], kl, args.prototypes))
        if run.save_due(step):
            run.save(step)
            if rank == 0:
                sample = prepare(run.sample, args.img_size, config["mean"], config["std"])
                dino.draw_attention(teacher.vit, sample, config, run.out / "attention.png")
                mae_pcae.draw(mae, sample, config, run.out / "reconstruction.png")
    return run.finish()


if __name__ == "__main__":
    main()
