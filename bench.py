"""How fast is a training step, and how much memory does it take? Ours, and side by side the authors' code.

    python bench.py                                       # DINO's step at 32 px, in the default precision and fp32
    git clone https://github.com/facebookresearch/dino /tmp/dino; python bench.py --against /tmp/dino
    git clone https://github.com/facebookresearch/mae /tmp/mae; python bench.py --rows mae --against /tmp/mae
    python bench.py --rows mae pcae "pcae --mask-ratio 0.85" --size base --patch 16 --img-size 224 --batch 8
    python bench.py --rows dino "dino --batch 16" "dino --prototypes 65536" "dino --img-size 64"     # how cost grows

A row is a method (dino, mae, pcae, siameseim, hybrid) with options of its script; options outside --rows that bench.py
does not have itself go to every row (--size, --batch, --compile, ...; preset 32 and batch 64 where nothing is said).
--against adds the authors' row of the first row's method, with its options: a clone of facebookresearch/dino or mae,
caddyless/PCAE, OpenGVLab/Siamese-Image-Modeling, or lightly-ai/lightly (DINO and MAE as in its examples).

Each row runs in processes of its own, in turn (A B A B ...), so that a machine that slows down slows all alike; a row's
images/s is the median over all steps of all its turns. Ours is the script's own train_step on decoded uint8 images as
the loader gives them: it includes waiting for them and augmentation, and a second table has the share of each phase.
The authors' step starts from crops that are already made, which flatters it: their pipeline on PIL images comes on top.
On a GPU theirs runs as shipped, in fp16; on a CPU in fp32, the only precision it has there.
Memory is the peak resident size less that just before the first step; on a GPU, the peak allocated. GMACs: of all
matrix products of a step, forward and backward, an image. MFU: the share of the products that the machine could do in
that time, as measured on one large product in the row's precision beside it.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dino
import hybrid
import mae_pcae
import siameseim
from vit import (
    DTYPES,
    SIZES,
    Images,
    InputError,
    OneDNN,
    ViT,
    cli,
    in_order,
    launch,
    linear,
    peak_memory,
    positive,
    stream,
)


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = p.add_argument
    add("--rows", nargs="+", help="each a method with options of its script (dino, and dino --precision fp32)")
    add("--against", metavar="DIR", help="a clone of the authors' code, to time beside ours")
    add("--steps", type=positive, default=5, help="timed steps in a turn, after two that are not")
    add("--turns", type=positive, default=3, help="turns of each row")
    add("--row", help=argparse.SUPPRESS)  # what a process started by this one measures
    args, args.rest = p.parse_known_args(argv)
    args.rows = args.rows or ["dino"]
    if len(args.rows) == 1 and "--precision" not in " ".join([*args.rows, *args.rest]):
        args.rows.append(f"{args.rows[0]} --precision fp32")
    if args.against:
        theirs = [name for name, (file, word, _) in AUTHORS.items() if found(Path(args.against, file), word)]
        first = args.rows[0].split()[0]
        name = next((name for name in theirs if name.split(",")[0] == first), None)
        if not name:
            raise InputError(f"--against {args.against} has no {first}: it is no clone of what --help names")
        args.rows.append(f"authors {name}" + args.rows[0][len(first) :])  # with the first row's options
    for row in args.rows:
        run_args(row, args.rest)
    return args


def found(file, word):
    return file.exists() and word in file.read_text()


def run_args(row, rest):
    """The options of a row's script, resolved. A row: "mae --mask-ratio 0.85", or "authors mae"."""
    method, *own = shlex.split(row.removeprefix("authors ").replace(", lightly", ""))
    if method not in OURS:
        raise InputError(f"--rows {row}: begin with one of {', '.join(OURS)}")
    script, choose = OURS[method][0], ["--method", method] if method in mae_pcae.METHODS else []
    args = script.get_args(["--preset", "32", "--data", "demo.npz", "--batch", "64", *choose, *rest, *own])
    args.canvas = args.img_size[0] if args.img_size[0] <= 64 else 2 * args.img_size[0]  # what the loader would give
    args.shape = dict(SIZES[args.size], img_size=args.img_size, patch=args.patch, in_chans=3)
    return args


# ----------------------------------------------------------------------------------------------------------------- ours


def our_dino(args, device, mean, std):
    """A function that does one step on uint8 images."""
    make = lambda p: dino.DINO(ViT(**args.shape, drop_path=p), head_of(args))
    student, teacher = make(args.drop_path).to(device), make(0.0).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    if args.compile:
        student.compile(dynamic=False), teacher.compile(dynamic=False)
    update, center = dino.Update([student], device, args.precision), torch.zeros(args.prototypes, device=device)
    update.set(1e-4, 0.04)

    def step(i, imgs):
        draws = [dino.my_rows(d, 0, 1, device) for d in dino.draw_crops(args, i)]
        dino.train_step(student, teacher, center, update, imgs, draws, args, 0.04, 0.996, mean, std)

    return step


def our_hybrid(args, device, mean, std):
    mae = mae_pcae.MAE(args.shape, args, args.drop_path, pos="learned")
    nets = nn.ModuleDict(dict(mae=mae, student=dino.DINO(mae.vit, head_of(args)))).to(device)
    teacher = dino.DINO(ViT(**args.shape), head_of(args)).to(device).requires_grad_(False)
    if args.compile:
        nets["mae"].compile(dynamic=False), nets["student"].compile(dynamic=False), teacher.compile(dynamic=False)
    update, center = dino.Update([nets], device, args.precision), torch.zeros(args.prototypes, device=device)
    update.set(1e-4, 0.04)

    def step(i, imgs):
        draws = [dino.my_rows(d, 0, 1, device) for d in hybrid.draw_all(args, i)]
        hybrid.train_step(nets, teacher, center, update, imgs, draws, args, 0.04, 0.996, mean, std)

    return step


def our_net(args, device, mean, std):
    """MAE, PCAE and SiameseIM: one network that holds all of it."""
    if hasattr(args, "method"):
        script, make, draw = mae_pcae, mae_pcae.METHODS[args.method], lambda i: mae_pcae.draw_numbers(args, i)
    else:
        script, make, draw = siameseim, siameseim.SiameseIM, lambda i: siameseim.draw_pairs(args, i)
    net = make(args.shape, args, args.drop_path).to(device)
    if args.compile:
        net.compile(dynamic=False)
    update = script.Update([net], device, args.precision, betas=(0.9, 0.95))
    update.set(1e-4, 0.05)

    def step(i, imgs):
        draws = script.my_rows(draw(i), 0, 1, device)
        script.train_step(net, update, imgs, draws, args, 0.996, mean, std)

    return step


def head_of(args):
    return dino.DINOHead(args.shape["dim"], args.prototypes, args.hidden)


OURS = dict(dino=(dino, our_dino), mae=(mae_pcae, our_net), pcae=(mae_pcae, our_net), siameseim=(siameseim, our_net))
OURS["hybrid"] = (hybrid, our_hybrid)
PHASES = dict(augment=("draw_crops", "draw_numbers", "draw_pairs", "draw_all", "augment", "crop_resize"))
PHASES |= dict(backward=("backward",), optimiser=("step",), ema=("ema_update",))


@contextlib.contextmanager
def clocked(script, spent, wait):
    """Adds to `spent` the seconds that each phase takes, by wrapping the functions of the script that do it."""
    inside = []

    def timed(phase, function):
        def wrapper(*args, **kwargs):
            if inside:  # augment calls crop_resize
                return function(*args, **kwargs)
            wait()
            inside.append(phase)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait()
            spent[inside.pop()] += time.perf_counter() - start
            return result

        return wrapper

    with contextlib.ExitStack() as stack:
        for phase, names in PHASES.items():
            spent[phase] = 0.0
            for owner in (script, getattr(script, "Update", dino.Update)):
                for name in set(names) & set(vars(owner)):
                    stack.enter_context(mock.patch.object(owner, name, timed(phase, getattr(owner, name))))
        yield


def ceiling(device, dtype, wait):
    """Multiplications a second of a large matrix product: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        wait()
        start = time.perf_counter()
        linear(a, b)
        wait()
        best = min(best, time.perf_counter() - start)
    return n**3 / best


# --------------------------------------------------------------------------------------------------------- the authors'


def old_packages():
    """What the authors' code imports and today's packages lack; none of it does any work in a step."""
    import numpy
    import timm
    import timm.models.vision_transformer as timm_vit

    for name in ("float", "int"):
        setattr(numpy, name, getattr(numpy, name, dict(float=float, int=int)[name]))
    sys.modules["torch._six"] = types.SimpleNamespace(inf=math.inf)
    sys.modules["turtle"] = types.SimpleNamespace(update=None)
    sys.modules["timm.models.layers.helpers"] = timm.layers.helpers
    current = timm_vit.Block
    timm_vit.Block = lambda *a, qk_scale=None, drop_path=0.0, **k: current(*a, drop_path=drop_path, **k)


def theirs(net, device, loss_of, betas=(0.9, 0.95), between=lambda: None, groups=None):
    """One step around the authors' network, in the order of their engine; `loss_of` and `between` are theirs too."""
    params = groups or [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.05, betas=betas)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def step(i, imgs):
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            loss = loss_of(i)
        loss.item()  # all of them check that the loss is finite, in every step
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        between()
        scaler.step(optimizer)
        scaler.update()

    return step


def grad_norm(net, limit=math.inf):
    return lambda: nn.utils.clip_grad_norm_([p for p in net.parameters() if p.grad is not None], limit)


def move(old, new, momentum=0.996):
    with torch.no_grad():
        for name, p in new.items():
            old[name].data.mul_(momentum).add_((1 - momentum) * p.detach().data)


def authors_dino(args, device):
    """Their multi-crop wrapper, loss, gradient clipping and moving average."""
    import main_dino
    import utils
    import vision_transformer as vits

    shape, norm = args.shape, functools.partial(nn.LayerNorm, eps=1e-6)

    def net(drop_path):
        size = dict(embed_dim=shape["dim"], depth=shape["depth"], num_heads=shape["heads"], mlp_ratio=4, qkv_bias=True)
        size |= dict(img_size=[args.img_size[0]], patch_size=args.patch, norm_layer=norm, drop_path_rate=drop_path)
        head = vits.DINOHead(shape["dim"], args.prototypes, norm_last_layer=True, hidden_dim=args.hidden)
        return utils.MultiCropWrapper(vits.VisionTransformer(**size), head).to(device)

    student, teacher = net(args.drop_path), net(0.0)
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad = False
    loss_fn = main_dino.DINOLoss(args.prototypes, args.local_crops + 2, 0.04, 0.04, 0, 100).to(device)
    crop = lambda n, s: [torch.randn(args.batch, 3, s, s, device=device) for _ in range(n)]
    crops = crop(2, args.img_size[0]) + crop(args.local_crops, args.local_size)

    def between():
        utils.clip_gradients(student, 3.0)
        utils.cancel_gradients_last_layer(1, student, 1)

    loss_of = lambda i: loss_fn(student(crops), teacher(crops[:2]), 1)
    inner = theirs(
        student, device, loss_of, between=between, betas=(0.9, 0.999), groups=utils.get_params_groups(student)
    )

    def step(i, imgs):
        inner(i, imgs)
        move(dict(teacher.named_parameters()), dict(student.named_parameters()))

    return step


def mae_like(run, /, **more):
    shape = run.shape
    size = dict(img_size=run.img_size[0], patch_size=run.patch, embed_dim=shape["dim"], depth=shape["depth"])
    size |= dict(num_heads=shape["heads"], mlp_ratio=4, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))
    decoder = dict(decoder_embed_dim=run.decoder_dim, decoder_depth=run.decoder_depth)
    return size | decoder | dict(decoder_num_heads=run.decoder_heads) | more


def authors_mae(args, device):
    import models_mae

    net = models_mae.MaskedAutoencoderViT(**mae_like(args, norm_pix_loss=args.norm_pix)).to(device)
    imgs = torch.randn(args.batch, 3, *args.img_size, device=device)
    return theirs(net, device, lambda i: net(imgs, mask_ratio=args.mask_ratio)[0], between=grad_norm(net))


def authors_pcae(args, device):
    import models_mae

    student = models_mae.PCAEViT(**mae_like(args)).to(device)
    teacher = models_mae.PCAEViT(**mae_like(args, use_decoder=False)).to(device).requires_grad_(False)
    if student.decoder_pred.out_features != args.shape["dim"]:  # right for ViT-B alone
        student.decoder_pred = nn.Linear(args.decoder_dim, args.shape["dim"]).to(device)
    imgs = torch.randn(args.batch, 3, *args.img_size, device=device)

    def loss_of(i):
        with torch.no_grad():
            latent, left, seen = teacher(imgs, mask_ratio=args.mask_ratio)
            latent = (latent - latent.mean(-1, keepdims=True)) / (latent.var(-1, keepdims=True) + 1e-6) ** 0.5
        found = student(imgs, student_ids_keep=seen, teacher_ids_keep=left)
        return 1 - nn.functional.cosine_similarity(found, latent, dim=-1).mean()

    inner = theirs(student, device, loss_of, between=grad_norm(student))

    def step(i, imgs):
        inner(i, imgs)
        own = dict(student.named_parameters())
        move(dict(teacher.named_parameters()), {n: own[n] for n, _ in teacher.named_parameters()})

    return step


def authors_siameseim(args, device):
    """BatchNorm in projector and decoder, block-wise masks, frozen patch embedding: their defaults."""
    import models_sim
    from util.misc import LayerNorm

    options = dict(decoder_embed_dim=args.decoder_dim, projector_depth=args.projector_depth, drop_path_rate=0.0)
    options |= dict(predictor_depth=args.decoder_depth, loss_type="sim", use_abs_pos_emb=True, init_values=None)
    options |= dict(use_proj_ln=False, use_pred_ln=False, online_ln=False, train_patch_embed=False)
    options |= dict(with_blockwise_mask=True, neg_weight=0.02, fp32=True)
    own = types.SimpleNamespace(**options)
    net = models_sim.SiameseIMViT(**mae_like(args, norm_layer=LayerNorm, args=own)).to(device)
    a, b = (torch.randn(args.batch, 3, *args.img_size, device=device) for _ in range(2))
    draws = siameseim.draw_pairs(args, 0)
    tokens = math.prod(ViT.grid_of(args.img_size, args.patch))
    mask = torch.ones(args.batch, tokens, device=device).scatter(1, draws["visible"].to(device), 0.0)
    ones = torch.ones(args.batch, device=device)
    place = (0.1 * ones, 0.1 * ones, 1.1 * ones, 0.9 * ones, draws["flip"][:, 0].to(device), 0.2 * ones)
    return theirs(net, device, lambda i: net(a, b, place, 0.996, True, mask=mask)[0], between=grad_norm(net, 1.0))


def lightly_dino(args, device):
    """As in lightly's example: a timm ViT, each view on its own, momentum moved first."""
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    shape = args.shape
    size = dict(img_size=args.img_size[0], patch_size=args.patch, embed_dim=shape["dim"], depth=shape["depth"])
    size |= dict(num_heads=shape["heads"], num_classes=0, dynamic_img_size=True)

    def net(drop_path):
        vit = timm.models.vision_transformer.VisionTransformer(**size, drop_path_rate=drop_path)
        return nn.Sequential(vit, DINOProjectionHead(shape["dim"], args.hidden, 256, args.prototypes)).to(device)

    student, teacher = net(args.drop_path), net(0.0).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    loss_fn = DINOLoss(args.prototypes).to(device)
    crop = lambda n, s: [torch.randn(args.batch, 3, s, s, device=device) for _ in range(n)]
    crops = crop(2, args.img_size[0]) + crop(args.local_crops, args.local_size)

    def loss_of(i):
        update_momentum(student, teacher, 0.996)
        with torch.no_grad():
            targets = [teacher(x) for x in crops[:2]]
        return loss_fn(targets, [student(x) for x in crops], epoch=1)

    return theirs(student, device, loss_of, between=grad_norm(student, 3.0), betas=(0.9, 0.999))


def lightly_mae(args, device):
    """As in lightly's example: the decoder gets all positions, the loss the masked ones."""
    import timm
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    shape, tokens = args.shape, math.prod(ViT.grid_of(args.img_size, args.patch))
    size = dict(img_size=args.img_size[0], patch_size=args.patch, embed_dim=shape["dim"], depth=shape["depth"])
    vit = timm.models.vision_transformer.VisionTransformer(**size, num_heads=shape["heads"], num_classes=0)
    net = nn.Module()
    net.encoder = MaskedVisionTransformerTIMM(vit=vit)
    own = dict(num_patches=tokens, patch_size=args.patch, embed_dim=shape["dim"], decoder_embed_dim=args.decoder_dim)
    net.decoder = MAEDecoderTIMM(**own, decoder_depth=args.decoder_depth, decoder_num_heads=args.decoder_heads)
    net.to(device)
    imgs = torch.randn(args.batch, 3, *args.img_size, device=device)

    def loss_of(i):
        keep, hidden = utils.random_token_mask((args.batch, 1 + tokens), args.mask_ratio, device=device)
        seen = net.decoder.embed(net.encoder.encode(imgs, idx_keep=keep))
        x = utils.repeat_token(net.decoder.mask_token, (args.batch, 1 + tokens))
        x = net.decoder.decode(utils.set_at_index(x, keep, seen.type_as(x)))
        pred = net.decoder.predict(utils.get_at_index(x, hidden))
        return nn.functional.mse_loss(pred, utils.get_at_index(utils.patchify(imgs, args.patch), hidden - 1))

    return theirs(net, device, loss_of, between=grad_norm(net))


AUTHORS = {  # a file, a word in it, and the function
    "dino": ("main_dino.py", "DINOLoss", authors_dino),
    "pcae": ("models_mae.py", "PCAEViT", authors_pcae),
    "mae": ("models_mae.py", "MaskedAutoencoderViT", authors_mae),
    "siameseim": ("models_sim.py", "SiameseIMViT", authors_siameseim),
    "dino, lightly": ("lightly/loss/dino_loss.py", "DINOLoss", lightly_dino),
    "mae, lightly": ("lightly/models/utils.py", "random_token_mask", lightly_mae),
}


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(args):
    """Seconds of each timed step, memory in MiB, seconds by phase, and use of the machine, of one row; as JSON."""
    run, is_ours = run_args(args.row, args.rest), not args.row.startswith("authors ")
    method = args.row.removeprefix("authors ")
    run.precision = run.precision if is_ours else "fp32"
    device, _, _ = launch(run)
    cuda = device.type == "cuda"
    run.precision = "fp16" if cuda and not is_ours else run.precision  # their autocast
    torch.manual_seed(0)
    if is_ours:
        script, make = OURS[method.split()[0]]
        mean, std = torch.full((3, 1, 1), 0.5, device=device), torch.full((3, 1, 1), 0.25, device=device)
        step = make(run, device, mean, std)
    else:
        sys.path.insert(0, args.against)
        if "lightly" not in method:
            old_packages()
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        backend = "nccl" if cuda else "gloo"
        torch.distributed.init_process_group(backend, rank=0, world_size=1)  # losses of DINO and SiameseIM need one
        step = AUTHORS[method.split(" --")[0]][2](run, device)
    images = Images(pixels=torch.randint(0, 256, (run.batch, 3, run.canvas, run.canvas), dtype=torch.uint8))
    loader = stream(images, in_order(images, run.batch) * (2 * args.steps + 3), device, run.workers)
    wait = torch.cuda.synchronize if cuda else lambda: None

    def steps(n):
        """Seconds of n steps each, and of waiting for images."""
        times, waits = [], []
        for i in range(n):
            wait()
            start = time.perf_counter()
            imgs = next(loader)
            waits.append(time.perf_counter() - start)
            step(i, imgs)
            wait()
            times.append(time.perf_counter() - start)
        return times, waits

    before = peak_memory()
    result = dict(times=steps(args.steps + 2)[0][2:], precision=run.precision, device=device.type, batch=run.batch)
    result["memory"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_memory() - before
    if is_ours:
        spent = {}
        with clocked(script, spent, wait):
            times, waits = steps(args.steps)
        spent = dict(data=sum(waits), **spent)
        spent["forward"] = sum(times) - sum(spent.values())
        result["phases"] = {k: v / args.steps for k, v in spent.items()}
    by_onednn = {OneDNN.operator: lambda x, w, *_, **__: 2 * math.prod(x) * w[0]} if OneDNN.operator else {}
    with (
        FlopCounterMode(display=False, custom_mapping=by_onednn) as count,
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        step(0, next(loader))
    result["gmacs"] = count.get_total_flops() / 2e9 / run.batch
    most = ceiling(device, DTYPES[run.precision], wait)
    result["mfu"] = result["gmacs"] * 1e9 * run.batch / statistics.median(result["times"]) / most
    print(json.dumps(result))


@cli
def main(argv=None):
    args = get_args(argv)
    if args.row:
        return measure(args)
    turns = {row: [] for row in args.rows}
    for _ in range(args.turns):
        for row in args.rows:
            command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--row", row]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
                raise InputError(f"the row '{row}' could not be measured: {why}")
            turns[row].append(json.loads(done.stdout.splitlines()[-1]))
    result = dict(options=vars(args), threads=torch.get_num_threads(), torch=torch.__version__, rows={})
    last, width = turns[args.rows[-1]], max(map(len, args.rows))
    middle = lambda seen, key: statistics.median(turn[key] for turn in seen)
    base = statistics.median(t for turn in last for t in turn["times"])
    run = run_args(args.rows[0], args.rest)
    print(f"ViT {run.size}/{run.patch}, {run.img_size[0]} px, batch {run.batch}; last columns: beside {args.rows[-1]}")
    columns = f"{'':{width}} {'precision':>10}{'images/s':>10}{'ms/step':>9}{'MiB':>8}{'GMACs':>9}{'MFU':>7}"
    print(columns + "   speed memory")
    for row, seen in turns.items():
        ms = 1e3 * statistics.median(t for turn in seen for t in turn["times"])
        batch, gmacs = seen[0]["batch"], seen[0]["gmacs"]
        line = dict(images_per_s=batch / ms * 1e3, ms=ms, memory_mib=middle(seen, "memory"), gmacs=gmacs)
        line |= dict(mfu=middle(seen, "mfu"), batch=batch, precision=seen[0]["precision"])
        line["speed"] = line["images_per_s"] * base / last[0]["batch"]
        line["memory"] = line["memory_mib"] / max(1, middle(last, "memory"))
        if "phases" in seen[0]:
            each = zip(*(turn["phases"].values() for turn in seen), strict=True)
            middles = [round(1e3 * statistics.median(times), 2) for times in each]
            line["phases_ms"] = dict(zip(seen[0]["phases"], middles, strict=True))
        result["rows"][row] = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        numbers = f"{line['images_per_s']:10.1f}{ms:9.1f}{line['memory_mib']:8.0f}{gmacs:9.3f}{line['mfu']:7.0%}"
        print(f"{row:{width}} {line['precision']:>10}{numbers}   {line['speed']:.2f}x  {line['memory']:.2f}x")
    ours = {row: line["phases_ms"] for row, line in result["rows"].items() if "phases_ms" in line}
    width = max(width, len("share of a step"))
    print(f"\n{'share of a step':{width}} " + "".join(f"{name:>11}" for name in next(iter(ours.values()), ())))
    for row, phases in ours.items():
        print(f"{row:{width}} " + "".join(f"{t / sum(phases.values()):11.1%}" for t in phases.values()))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
