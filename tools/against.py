"""Times the authors' training step, or lightly's, beside ours, in one run. Run it from the root of the repository.

    git clone https://github.com/facebookresearch/dino /tmp/dino; python tools/against.py /tmp/dino
    git clone https://github.com/facebookresearch/mae /tmp/mae; python tools/against.py /tmp/mae --rows mae

The directory is a clone of facebookresearch/dino or mae, caddyless/PCAE, OpenGVLab/Siamese-Image-Modeling, or
lightly-ai/lightly (DINO and MAE as in its examples). Other options are those of bench.py; theirs get the first row's.
Their step starts from crops that are already made, which flatters it: their pipeline on PIL images comes on top. On a
GPU theirs runs as shipped, in fp16; on a CPU in fp32, the only precision it has there.
"""

import functools
import math
import os
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import bench  # noqa: E402
import siameseim  # noqa: E402
from vit import InputError, ViT, cli, vit_kwargs  # noqa: E402


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

    shape, norm = vit_kwargs(args, 3), functools.partial(nn.LayerNorm, eps=1e-6)

    def net(drop_path):
        size = dict(embed_dim=shape["dim"], depth=shape["depth"], num_heads=shape["heads"], mlp_ratio=4, qkv_bias=True)
        size |= dict(img_size=[args.img_size], patch_size=args.patch, norm_layer=norm, drop_path_rate=drop_path)
        head = vits.DINOHead(shape["dim"], args.prototypes, norm_last_layer=True, hidden_dim=args.hidden)
        return utils.MultiCropWrapper(vits.VisionTransformer(**size), head).to(device)

    student, teacher = net(args.drop_path), net(0.0)
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad = False
    loss_fn = main_dino.DINOLoss(args.prototypes, args.local_crops + 2, 0.04, 0.04, 0, 100).to(device)
    crop = lambda n, s: [torch.randn(args.batch, 3, s, s, device=device) for _ in range(n)]
    crops = crop(2, args.img_size) + crop(args.local_crops, args.local_size)

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
    shape = vit_kwargs(run, 3)
    size = dict(img_size=run.img_size, patch_size=run.patch, embed_dim=shape["dim"], depth=shape["depth"])
    size |= dict(num_heads=shape["heads"], mlp_ratio=4, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))
    decoder = dict(decoder_embed_dim=run.decoder_dim, decoder_depth=run.decoder_depth)
    return size | decoder | dict(decoder_num_heads=run.decoder_heads) | more


def authors_mae(args, device):
    import models_mae

    net = models_mae.MaskedAutoencoderViT(**mae_like(args, norm_pix_loss=args.norm_pix)).to(device)
    imgs = torch.randn(args.batch, 3, args.img_size, args.img_size, device=device)
    return theirs(net, device, lambda i: net(imgs, mask_ratio=args.mask_ratio)[0], between=grad_norm(net))


def authors_pcae(args, device):
    import models_mae

    student = models_mae.PCAEViT(**mae_like(args)).to(device)
    teacher = models_mae.PCAEViT(**mae_like(args, use_decoder=False)).to(device).requires_grad_(False)
    if student.decoder_pred.out_features != vit_kwargs(args, 3)["dim"]:  # right for ViT-B alone
        student.decoder_pred = nn.Linear(args.decoder_dim, vit_kwargs(args, 3)["dim"]).to(device)
    imgs = torch.randn(args.batch, 3, args.img_size, args.img_size, device=device)

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
    a, b = (torch.randn(args.batch, 3, args.img_size, args.img_size, device=device) for _ in range(2))
    draws, grid = siameseim.sample_step(args, 0, args.img_size), ViT.grid_of([args.img_size] * 2, args.patch)
    visible = siameseim.visible_patches(draws, grid, args.mask_ratio).to(device)
    mask = torch.ones(args.batch, math.prod(grid), device=device).scatter(1, visible, 0.0)
    ones = torch.ones(args.batch, device=device)
    place = (0.1 * ones, 0.1 * ones, 1.1 * ones, 0.9 * ones, draws["flip"][:, 0].to(device), 0.2 * ones)
    return theirs(net, device, lambda i: net(a, b, place, 0.996, True, mask=mask)[0], between=grad_norm(net, 1.0))


def lightly_dino(args, device):
    """As in lightly's example: a timm ViT, each view on its own, momentum moved first."""
    import timm
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    shape = vit_kwargs(args, 3)
    size = dict(img_size=args.img_size, patch_size=args.patch, embed_dim=shape["dim"], depth=shape["depth"])
    size |= dict(num_heads=shape["heads"], num_classes=0, dynamic_img_size=True)

    def net(drop_path):
        vit = timm.models.vision_transformer.VisionTransformer(**size, drop_path_rate=drop_path)
        return nn.Sequential(vit, DINOProjectionHead(shape["dim"], args.hidden, 256, args.prototypes)).to(device)

    student, teacher = net(args.drop_path), net(0.0).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    loss_fn = DINOLoss(args.prototypes).to(device)
    crop = lambda n, s: [torch.randn(args.batch, 3, s, s, device=device) for _ in range(n)]
    crops = crop(2, args.img_size) + crop(args.local_crops, args.local_size)

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

    shape, tokens = vit_kwargs(args, 3), math.prod(ViT.grid_of([args.img_size] * 2, args.patch))
    size = dict(img_size=args.img_size, patch_size=args.patch, embed_dim=shape["dim"], depth=shape["depth"])
    vit = timm.models.vision_transformer.VisionTransformer(**size, num_heads=shape["heads"], num_classes=0)
    net = nn.Module()
    net.encoder = MaskedVisionTransformerTIMM(vit=vit)
    own = dict(num_patches=tokens, patch_size=args.patch, embed_dim=shape["dim"], decoder_embed_dim=args.decoder_dim)
    net.decoder = MAEDecoderTIMM(**own, decoder_depth=args.decoder_depth, decoder_num_heads=args.decoder_heads)
    net.to(device)
    imgs = torch.randn(args.batch, 3, args.img_size, args.img_size, device=device)

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


def their_step(directory, name):
    """A builder for bench.measure: their step, in the precision that their code has."""

    def build(args, device):
        sys.path.insert(0, directory)
        args.precision = "fp16" if device.type == "cuda" else "fp32"
        if "lightly" not in name:
            old_packages()
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, rank=0, world_size=1)  # losses of DINO and SiameseIM need one
        return AUTHORS[name][2](args, device), None

    return build


@cli
def main(directory, *argv):
    method = argv[argv.index("--rows") + 1].split()[0] if "--rows" in argv else "dino"
    for name, (file, word, _) in AUTHORS.items():
        found = Path(directory, file)
        if name.split(",")[0] == method and found.exists() and word in found.read_text():
            script = [__file__, directory]
            return bench.main(list(argv), script=script, others={f"authors {name}": their_step(directory, name)})
    raise InputError(f"{directory} has no {method}: it is no clone of what --help names")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
