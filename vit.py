"""A Vision Transformer, and what every script here needs around it.

    1 network        the ViT (Dosovitskiy et al., arXiv 2010.11929; pre-norm, as in DeiT and DINO), with timm's names
    2 views          crops, colours and blur of a whole batch at once, on the device
    3 training step  schedules, optimizer, gradients over processes and micro-batches, moving averages
    4 images         files, .npz or CIFAR in; batches of square uint8 images out
    5 evaluation     features of a frozen encoder, and k-NN
    6 checkpoints    saved completely or not at all, loaded without running code
    7 runs           options, devices, and the folder of a run: resume, log, k-NN, curve

To read a method, read sections 1 to 3. Section 1 can be copied on its own: of the imports it needs torch, nn, F and
rearrange, and it uses nothing of the other sections.

Letters in shape comments, here and in every script:
    B images   C channels   V views   N patch tokens   D width   H heads   K prototypes   P patch size, px
    N is all tokens in Attention and Block
    S side of a square image, px   (h, w) height and width: of images in px, of a grid in patches
"""

import argparse
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

# 1 network ------------------------------------------------------------------------------------------------------------

SIZES = {  # timm and DINO call them ViT-Ti, S, B, L, H; "nano" is for a CPU, "test" for tests
    "test": dict(dim=32, depth=2, heads=2),
    "nano": dict(dim=128, depth=6, heads=4),
    "tiny": dict(dim=192, depth=12, heads=3),
    "small": dict(dim=384, depth=12, heads=6),
    "base": dict(dim=768, depth=12, heads=12),
    "large": dict(dim=1024, depth=24, heads=16),
    "huge": dict(dim=1280, depth=32, heads=16),
}


class InputError(ValueError):
    """The user gave something wrong. The message says what, and what to do about it; scripts then exit with code 2."""


def sincos(y, x, dim):
    """Fixed sine-cosine position embedding of any positions (MAE; Vaswani et al., section 3.5, in two dimensions).

    y, x: two tensors of one shape (...), in patches. Returns (..., dim): sin and cos of x, then of y, as in MAE.
    Raises InputError if dim is not a multiple of 4.
    """
    if dim % 4:
        raise InputError(f"a width of {dim} is not a multiple of 4, which sine-cosine positions need")
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # a Mac's GPU has no float64
    omega = 10000 ** -(torch.arange(dim // 4, dtype=exact, device=x.device) / (dim // 4))
    x, y = x[..., None].to(exact) * omega, y[..., None].to(exact) * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).float()


def sincos_grid(grid, dim):
    """The sine-cosine embedding of a whole grid (h, w), with zeros for the CLS token in front: (1, 1+hw, dim)."""
    y, x = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return F.pad(sincos(y.flatten(), x.flatten(), dim), (0, 0, 1, 0))[None]


def gather_tokens(x, index):
    """The tokens of x (B, N, D) at index (B, n): (B, n, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def drop_path(x, p):
    """Stochastic depth (Huang et al., arXiv 1603.09382): with probability p a sample's residual branch is zeroed, else
    scaled by 1 / (1 - p).
    """
    if p == 0:
        return x
    return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - p).div_((1 - p) or 1)  # p = 1: all are zero


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        if dim % heads:
            raise InputError(f"a width of {dim} cannot be divided among {heads} attention heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x):  # (B, N, D) -> queries, keys, values, each (B, H, N, D/H)
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)

    def weights(self, q, k):  # softmax attention (B, H, N, N): one row per query, rows sum to one
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)

    def maps(self, x, queries=None):  # (B, N, D) -> (B, H, N, N), or of the first `queries` tokens (B, H, queries, N)
        q, k, _ = self.split(x)
        return self.weights(q[:, :, :queries], k)

    def forward(self, x, queries=None):
        q, k, v = self.split(x)
        q = q[:, :, :queries]
        if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # there the fused kernel's backward is 6x slower
            x = self.weights(q, k) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class Mlp(nn.Sequential):  # runs its parts in the order of their assignment
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)


class Block(nn.Module):
    def __init__(self, dim, heads, drop_path=0.0, mlp_ratio=4, norm=lambda dim: nn.LayerNorm(dim, eps=1e-6)):
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, mlp_ratio * dim)
        self.drop_path = drop_path

    def forward(self, x, queries=None):
        """(B, N, D) -> (B, N, D), or the first `queries` (an int) tokens alone, which still attend to all."""
        p = self.drop_path if self.training else 0
        x = x[:, :queries] + drop_path(self.attn(self.norm1(x), queries), p)
        return x + drop_path(self.mlp(self.norm2(x)), p)


class ViT(nn.Module):
    """Vision Transformer with a CLS token: images (B, C, h, w) -> normalised tokens (B, 1+N, D), CLS first.

    Images may have another size than `img_size`, as long as the patch size divides it: position embeddings are then
    interpolated (bicubic) to the exact grid. DINO's code scales by (side + 0.1) instead; with its weights, entries of
    the CLS token then differ by about 0.02.
    pos: "learned", or "sincos" for fixed ones. norm: False leaves out the final LayerNorm (SiameseIM).
    Raises InputError, a ValueError, where sizes do not fit. `embed`, `blocks` and `norm` can be called one by one.
    """

    def __init__(
        self, img_size=224, patch=16, in_chans=3, dim=384, depth=12, heads=6, pos="learned", norm=True, drop_path=0.0
    ):
        super().__init__()
        size = [img_size, img_size] if isinstance(img_size, int) else list(img_size)
        self.config = dict(img_size=size, patch=patch, in_chans=in_chans, dim=dim, depth=depth, heads=heads)
        self.config.update(pos=pos, norm=norm)  # ViT(**config) is the same network again
        self.patch, self.grid, self.dim = patch, self.grid_of(size, patch), dim
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, patch, patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim), requires_grad=pos == "learned")
        self.blocks = nn.Sequential(*(Block(dim, heads, drop_path * i / max(1, depth - 1)) for i in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if pos == "sincos":
            self.pos_embed.data = sincos_grid(self.grid, dim)

    @staticmethod
    def grid_of(size, patch):
        """The grid (h, w) of patches in an image of `size` (h, w) px."""
        if size[0] % patch or size[1] % patch:
            raise InputError(f"the image size {size[0]}x{size[1]} is not a multiple of the patch size, {patch}")
        return size[0] // patch, size[1] // patch

    def positions(self, grid):
        """Position embedding for a grid (h, w): (1, 1+hw, D)."""
        if grid == self.grid:
            return self.pos_embed
        pos = rearrange(self.pos_embed[:, 1:].float(), "1 (h w) d -> 1 d h w", h=self.grid[0])
        pos = F.interpolate(pos, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], rearrange(pos, "1 d h w -> 1 (h w) d").to(self.pos_embed)], dim=1)

    def embed(self, imgs, visible=None):
        """CLS and patch tokens plus positions, (B, 1+N, D); only of the patches at indices `visible` (B, n)."""
        pos = self.positions(self.grid_of(imgs.shape[-2:], self.patch)).expand(imgs.shape[0], -1, -1)
        cls, pos = self.cls_token + pos[:, :1], pos[:, 1:]
        x = rearrange(imgs, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        if visible is not None:  # before the projection, so that hidden patches are never projected
            x, pos = gather_tokens(x, visible), gather_tokens(pos, visible)
        proj = self.patch_embed["proj"]  # a convolution of stride P is a linear layer on patches
        return torch.cat([cls, F.linear(x, proj.weight.flatten(1), proj.bias) + pos], dim=1)

    def forward(self, imgs, visible=None):
        return self.norm(self.blocks(self.embed(imgs, visible)))

    def cls(self, imgs):
        """forward(imgs)[:, 0], (B, D), faster: the last block computes the CLS token alone, as nothing else is read."""
        x = self.blocks[:-1](self.embed(imgs))
        return self.norm(self.blocks[-1](x, queries=1))[:, 0]

    def layers(self, imgs):
        """The tokens after each block, through the final norm: a list of `depth` tensors (B, 1+N, D)."""
        x = self.embed(imgs)
        return [self.norm(x := block(x)) for block in self.blocks]

    def attention(self, imgs, layer=-1, queries=None):
        """Softmax attention of one block, (B, H, 1+N, 1+N). Row 0 shows where the CLS token attends; with queries=1 it
        alone is computed.
        """
        block = self.blocks[layer]
        return block.attn.maps(block.norm1(self.blocks[:layer](self.embed(imgs))), queries)

    def encode(self, imgs, feature="cls"):
        """One vector per image: "cls", the CLS token (B, D); "mean", the mean patch token; "both", (B, 2D)."""
        return self.cls(imgs) if feature == "cls" else pooled(self(imgs), feature)


def pooled(x, feature):
    """The CLS token of x (B, 1+N, D), its mean patch token, or both side by side: (B, D), (B, D) or (B, 2D)."""
    cls, mean = x[:, 0], x[:, 1:].mean(dim=1)
    return dict(cls=cls, mean=mean, both=torch.cat([cls, mean], dim=1))[feature]


# 2 views --------------------------------------------------------------------------------------------------------------


def sample_boxes(shape, side, scale, g):
    """Random boxes y, x, height, width (*shape, 4) in px of a square image, by the rule of RandomResizedCrop.

    The area share is uniform in `scale`, the aspect ratio log-uniform in 3/4 to 4/3. Of ten tries the first that fits
    is taken, else the whole image.
    """
    area = side**2 * torch.empty(*shape, 10).uniform_(*sorted(scale), generator=g)
    ratio = torch.empty(*shape, 10).uniform_(math.log(3 / 4), math.log(4 / 3), generator=g).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h >= 1) & (h <= side) & (w >= 1) & (w <= side)
    first = fits.int().argmax(-1, keepdim=True)  # the first try that fits; 0 if none does
    h, w = (torch.where(fits, t, side) for t in (h, w))  # a try that does not fit becomes the whole image
    h, w = (t.gather(-1, first)[..., 0] for t in (h, w))
    y, x = ((torch.rand(shape, generator=g) * (side - t + 1)).floor() for t in (h, w))
    return torch.stack([y, x, h, w], dim=-1)


def resize_weights(start, length, flip, out, side):
    """The matrix (..., out, side) that resamples pixels [start, start+length) of a row of `side` to `out`.

    Bicubic (a = -0.5) and antialiased: the kernel is stretched where the crop shrinks, as in Pillow and F.interpolate.
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
    """Cuts boxes (B, V, 4) from imgs (B, C, S, S), resizes, flips: (V·B, C, size, size), Wy @ img @ Wxᵀ."""
    (y, x, h, w), side, c = box.unbind(-1), imgs.shape[-1], imgs.shape[1]
    wy = resize_weights(y, h, torch.zeros_like(flip), size, side)  # (B, V, size, S)
    wx = resize_weights(x, w, flip, size, side)
    rows = rearrange(wy, "b v i s -> b (v i) s") @ rearrange(imgs, "b c s t -> b s (c t)")
    rows = rearrange(rows, "b (v i) (c t) -> (b v) (c i) t", c=c, i=size)
    crops = rows @ rearrange(wx, "b v j t -> (b v) t j")
    return rearrange(crops, "(b v) (c i) j -> (v b) c i j", v=box.shape[1], c=c).clamp(0, 1)


def gray(x):  # (B, 3, h, w) -> (B, 1, h, w): luma of ITU-R 601
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def blend(x, other, factor):  # other + factor (x - other): contrast, saturation and grey are all this
    return torch.lerp(other, x, factor).clamp(0, 1)


def shift_hue(x, shift):
    """x (B, 3, h, w) with its hue turned by `shift` (B, 1, 1, 1), a share of the circle; value and saturation stay.

    HSV to RGB: a channel is top - chroma clamp(min(k, 4 - k), 0, 1), with k = hue + 5, 3, 1 mod 6 for R, G, B.
    """
    top, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    chroma = top - low
    r, g, b = x.split(1, dim=1)
    sector = torch.where(top == r, (g - b), torch.where(top == g, (b - r), (r - g)))
    offset = torch.where(top == r, 0.0, torch.where(top == g, 2.0, 4.0))
    hue = sector / chroma.clamp(min=1e-8) + offset + 6 * shift
    k = (hue + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)) % 6
    return top - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, radius):
    """x (B, C, h, w) blurred by sigma (B,) px; 0 leaves it as it is. Borders are reflected.

    The kernel has 2 radius + 1 px; two matrix products.
    """

    def matrix(n):
        r = min(radius, n - 1)
        k = torch.arange(-r, r + 1, device=x.device)
        weight = torch.exp(-0.5 * (k / sigma[:, None].clamp(min=1e-3)) ** 2)
        source = (torch.arange(n, device=x.device)[:, None] + k).abs()  # pixel i takes weight k from pixel i + k,
        source = torch.where(source < n, source, 2 * n - 2 - source)  # reflected at the borders
        one_hot = F.one_hot(source, n).to(x)  # (n, 2r+1, n)
        return torch.einsum("bk,ikj->bij", weight / weight.sum(dim=1, keepdim=True), one_hot)[:, None]

    return matrix(x.shape[-2]) @ x @ matrix(x.shape[-1]).transpose(-2, -1)


# 3 training step ------------------------------------------------------------------------------------------------------

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)  # --precision


def autocast(device, precision):
    """Computes matrix products in `precision`; weights and their gradients stay in fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def cosine(step, total, peak, end, warmup=0):
    """Linear from 0 to `peak`, reached in the last of `warmup` steps, then a cosine from `peak` towards `end`, which
    step `total` would have.
    """
    warmup = round(warmup)
    if step < warmup:
        return peak * step / max(1, warmup - 1)
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def adamw(net, precision, betas=(0.9, 0.999)):
    """AdamW (group 0 has weight decay; group 1, biases and norms, has none) and the scaler for fp16."""
    params = [p for p in net.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.ndim > 1]), dict(params=[p for p in params if p.ndim <= 1])]
    # fused, as that one skips a step by found_inf: see optimizer_step
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, weight_decay=0.0, fused=True)
    return optimizer, torch.amp.GradScaler(params[0].device.type, enabled=precision == "fp16")


def seeded(seed, step):
    """The CPU generator of a step's random numbers (all but drop path's): the same after a restart, on any rank."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)


def processes():
    """This process's rank and the number of processes; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def mean_over_processes(x):
    """The mean of the tensor x over processes. Changes x."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def to_device(x, device):
    """x on the device, by way of pinned memory, so that the host does not wait for the copy."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def shard(draws, device):
    """This process's rows of the whole batch's random numbers (a dict of tensors, or several), on the device."""
    if not isinstance(draws, dict):
        return [shard(d, device) for d in draws]
    rank, world = processes()
    return {k: to_device(v.chunk(world)[rank], device) for k, v in draws.items()}


def distribute(net):
    """`net`, under torchrun in torch's DistributedDataParallel (DDP), which averages gradients over processes.

    DDP regroups gradients into buckets after its first backward pass. With three or more processes another grouping
    changes the order of sums, and so their rounding. One backward pass of zeros makes it regroup before the first step,
    so that a run that resumes rounds as one that was never stopped.
    """
    if not dist.is_initialized():
        return net
    model = DistributedDataParallel(net)  # copies rank 0's weights and buffers to all
    model.broadcast_buffers = False  # later forward passes must not copy buffers
    net.forward = lambda: sum(p.sum() for p in net.parameters() if p.requires_grad) * 0
    model().backward()
    net.zero_grad()
    del net.forward  # the class's own is found again
    return model


def unwrap(model):
    """The network in what distribute returned."""
    return getattr(model, "module", model)


def in_turn(model, chunks):
    """Yields micro-batches. Gradients are averaged over processes in the backward pass of the last one alone."""
    for i, chunk in enumerate(chunks, 1):
        model.require_backward_grad_sync = i == len(chunks)  # read by DDP
        yield chunk


def micro_batches(model, n, *draws):
    """Splits tensors, and dicts of tensors, by rows into n equal chunks; yields tuples, for one backward pass each."""
    rows = lambda x, i: {k: v.chunk(n)[i] for k, v in x.items()} if isinstance(x, dict) else x.chunk(n)[i]
    yield from in_turn(model, [tuple(rows(x, i) for x in draws) for i in range(n)])


@torch.no_grad()
def optimizer_step(optimizer, scaler, lr, weight_decay, clip, per_parameter=False):
    """Clips, and does one step of AdamW unless a gradient is not finite. Nothing in it waits for the device.

    weight_decay: of all but biases and norms. clip: limit of the norm of all gradients together, or of each
    parameter's own (DINO); 0 turns it off. Returns the norm before clipping, and finite: 1.0 if the step was done, else
    0.0; two tensors ().
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("factor", 1)  # factor: of a layer, in fine-tuning
    if weight_decay is not None:
        optimizer.param_groups[0]["weight_decay"] = weight_decay
    scaler.unscale_(optimizer)
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    norm = norms.norm()
    if clip:
        scale = clip / ((norms if per_parameter else norm.expand(len(norms))) + 1e-6)
        torch._foreach_mul_(grads, list(scale.clamp(max=1).unbind()))
    finite = norm.isfinite().float()
    optimizer.found_inf = 1 - finite  # as GradScaler does: where it is 1, a fused optimizer skips the step
    optimizer.step()
    optimizer.zero_grad()
    scaler.update()
    return norm, finite


@torch.no_grad()
def ema_update(teacher, student, momentum, finite):
    """EMA: teacher = momentum teacher + (1 - momentum) student, where `finite` is 1; else it stays as it is."""
    old, new = list(teacher.parameters()), list(student.parameters())
    change = torch._foreach_sub(new, old)
    torch._foreach_mul_(change, (1 - momentum) * finite)
    torch._foreach_add_(old, change)


# 4 images -------------------------------------------------------------------------------------------------------------

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"}
TESTS = ("test", "testing", "val", "valid", "validation")  # the first of these that has labels is the test set
IN_MEMORY = 2**31  # bytes, as squares: larger sets are decoded again and again as they are needed


def note(text):
    """Tells the user something on stderr, once however many processes there are."""
    if processes()[0] == 0:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def reading(file, kind):
    """Damaged bytes make Pillow, numpy and torch raise a dozen kinds of errors: all become one line, an InputError."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as e:
        why = (str(e) or "damaged").splitlines()[0][:100]
        raise InputError(f"{file} is not a readable {kind} ({type(e).__name__}: {why})") from e


def decode(file, side=None):
    """An image file (or open binary file) as uint8 RGB (3, h, w), upright, its short side resized to `side` px.

    Grey images of 16 bits are divided by 257. Raises InputError for a damaged file, and for signed, 32-bit and
    floating-point images, whose range is not known.
    """
    with reading(file, "image"), Image.open(file) as img:
        side, deep = side or min(img.size), img.mode.startswith("I;16") or img.format in ("PNG", "PPM")
        img.draft("RGB", (side, side))  # JPEG: decode at 1/2, 1/4, 1/8 where that is still larger than needed
        img.load()
        with contextlib.suppress(Exception):  # a broken EXIF entry: the image is shown as it is stored
            img = ImageOps.exif_transpose(img)
        if img.mode.startswith(("I", "F")):
            if not deep or img.mode[0] == "F":
                raise InputError(f"{file} has signed, 32-bit or floating-point pixels: convert it to 8 bits")
            img = Image.fromarray(np.rint(np.asarray(img) / 257).astype(np.uint8))  # Pillow would clip at 255
        if "A" in img.mode or "transparency" in img.info:  # white behind what is transparent
            img = img.convert("RGBA")
            img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
        img, (w, h) = img.convert("RGB"), img.size
        if max(w, h) > 4 * min(w, h):  # of a strip the middle, or its long side would be huge
            w, h = min(w, 4 * h), min(h, 4 * w)
            img = ImageOps.fit(img, (w, h))
        if min(w, h) != side:
            img = img.resize([max(side, round(s * side / min(w, h))) for s in (w, h)], Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(img)).permute(2, 0, 1).contiguous()


def square(img):
    """The (C, S, S) square in the middle of (C, h, w)."""
    h, w = img.shape[-2:]
    s = min(h, w)
    y, x = (h - s) // 2, (w - s) // 2
    return img[..., y : y + s, x : x + s]


def as_labels(labels, n, where, names=False):
    """Labels as an array (n,) of whole numbers from 0, or with `names` of class names. InputError for all others."""
    labels = np.asarray(labels)
    flat, kind = labels[:, 0] if labels.shape == (n, 1) else labels, labels.dtype.kind
    negative = kind == "i" and bool((labels < 0).any())
    if flat.shape != (n,) or kind not in ("iuU" if names else "iu") or negative:
        wanted = f"({n},), whole numbers from 0" + " or class names" * names
        found = f"{labels.dtype} {labels.shape}" + ", some below 0" * negative
        raise InputError(f"{where}: labels must be {wanted}, not {found}")
    return flat


class Images(torch.utils.data.Dataset):
    """Square uint8 images: `images[i]` is (C, S, S), the middle of item i, resized.

    items: a sequence of image files (str or Path), or of images, uint8 tensors (C, h, w), such as a tensor
    (N, C, h, w) or a data set of your own. labels: whole numbers from 0, (N,), or None; classes: their names.
    side: S in px; items of another size are resized. files: the file of each image, or None where they are no files.
    Raises InputError for items or labels of another kind.
    """

    replace = False  # in training: take the next image in place of one that cannot be read

    def __init__(self, items, labels=None, classes=(), side=None, files=None):
        if not len(items):
            raise InputError("a data set without images")
        first, self.items, self.classes = items[0], items, list(classes)
        is_file, shape = isinstance(first, (str, os.PathLike)), tuple(getattr(first, "shape", ()))
        if not is_file and (getattr(first, "dtype", None) != torch.uint8 or len(shape) != 3 or shape[0] > min(shape)):
            found = f"{type(first).__name__} {getattr(first, 'dtype', '')} {shape}"
            raise InputError(f"images must be files or uint8 tensors (C, h, w), not {found}")
        self.files, self.channels = items if is_file else files, 3 if is_file else shape[0]
        labels = None if labels is None else as_labels(labels, len(items), "a data set")
        self.labels = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        self.side = side or self.first_side()

    def __len__(self):
        return len(self.items)

    def first_side(self):
        """The short side of the first image that can be read, before any resizing."""
        for item in itertools.islice(self.items, 100):
            with contextlib.suppress(InputError):
                return min((item if torch.is_tensor(item) else decode(item)).shape[-2:])
        raise InputError(f"none of the first {min(100, len(self))} images can be read, such as {self.items[0]}")

    def read(self, i):
        """Image i, uint8 (C, h, w), its short side `self.side` px. Raises InputError where it cannot be read."""
        x = self.items[i]
        return TF.resize(x if torch.is_tensor(x) else decode(x, self.side), [self.side], TF.InterpolationMode.BICUBIC)

    def __getitem__(self, i):
        for j in range(i, i + 100):
            try:
                return square(self.read(j % len(self)))
            except InputError as e:
                if not self.replace:
                    raise
                warnings.warn(f"another image takes the place of an unreadable one: {e}", stacklevel=2)
        raise InputError(f"100 unreadable images in a row, the first one {self.items[i]}")

    @property
    def in_memory(self):
        """Whether the images are one tensor (N, C, S, S)."""
        return torch.is_tensor(self.items) and self.items.shape[-2:] == (self.side, self.side)

    def at(self, side, quiet=False):
        """The same images with side `side`: if they fit, in memory, cut from the middle; unreadable ones are left out
        and named. Else as they are, to be read when they are needed.
        """
        images, bad = Images(self.items, self.labels, self.classes, side, self.files), []
        if images.in_memory or len(self) * self.channels * side**2 > IN_MEMORY:
            return images

        def read(i):
            try:
                return images[i].clone()  # or the rest of an oblong image would stay in memory
            except InputError as e:
                bad.append(str(e))

        with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():  # Pillow decodes without the GIL
            warnings.simplefilter("ignore")  # remarks on odd metadata
            todo = tqdm(range(len(self)), "decoding", leave=False, disable=True if quiet else None)
            found = dict(zip(todo, pool.map(read, range(len(self))), strict=False))
        good = [i for i, x in found.items() if x is not None]
        if not good:
            raise InputError(f"none of the {len(found)} images can be read: {bad[0]}")
        if bad and not quiet:
            note(f"skipped {len(bad)} unreadable images of {len(found)}: {'; '.join(bad[:5])}")
        return images.pick(good, torch.stack([found[i] for i in good]))

    def pick(self, index, items=None):
        """The images of these indices, in this order; `items`, if given, are these images, decoded."""
        index = torch.as_tensor(index).tolist()
        if items is None:
            items = self.items[index] if torch.is_tensor(self.items) else torch.utils.data.Subset(self.items, index)
        labels = None if self.labels is None else self.labels[index]
        files = None if self.files is None else [self.files[i] for i in index]
        return Images(items, labels, self.classes, self.side, files)

    def subset(self, n):
        """At most n images, evenly spaced, so that every class keeps its share."""
        return self if n >= len(self) else self.pick(np.linspace(0, len(self) - 1, n).astype(int))

    def stats(self):
        """Mean and standard deviation of each channel, in [0, 1], of at most 1,000 images: two lists."""
        some = self.subset(1000).at(self.side, quiet=True)
        sums = [[(some[i].double() / 255).pow(k).mean((1, 2)) for k in (1, 2)] for i in range(len(some))]
        mean, square_mean = (torch.stack(s).mean(0) for s in zip(*sums, strict=True))
        return mean.tolist(), (square_mean - mean**2).clamp(min=1e-6).sqrt().tolist()


def four(images, device):
    """Four images, evenly spaced, for the pictures of a run: uint8 (4, C, S, S) on the device."""
    some = images.subset(4)
    some.replace = True  # a broken file is no reason to end a run
    return next(stream(some, in_order(some, 4), device, workers=0))


def list_images(root):
    """All image files below a folder, sorted. Links to folders are followed once."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        key = os.stat(folder)
        if (key.st_dev, key.st_ino) in seen:  # a link that leads back
            subfolders.clear()
            continue
        subfolders[:] = sorted(s for s in subfolders if s[0] != ".")
        seen.add((key.st_dev, key.st_ino))
        found += [os.path.join(folder, f) for f in files if os.path.splitext(f)[1].lower() in SUFFIXES and f[0] != "."]
    return sorted(found)


def by_class(folder, known=()):
    """The image files below a folder, and for each the class folder it lies in; None instead if there are none.

    One folder alone is a class only if it is among `known`. Images beside class folders are left out.
    """
    files = list_images(folder)
    names = [os.path.relpath(f, folder).split(os.sep) for f in files]
    classes, loose = {n[0] for n in names if len(n) > 1}, [n[0] for n in names if len(n) == 1]
    if not classes or len(classes) == 1 and not classes <= set(known):
        return files, None
    if loose:
        note(f"left out {len(loose)} images beside the class folders of {folder}: {', '.join(loose[:3])}")
    kept = [(f, n[0]) for f, n in zip(files, names, strict=True) if len(n) > 1]
    return tuple(map(list, zip(*kept, strict=True)))


def open_folder(root):
    """Files and class names of the training images in a folder, then, if it has labels, those of the test images."""
    folders = {d.name.lower(): d for d in sorted(root.iterdir()) if d.is_dir() and d.name[0] != "."}
    if {"images", "masks"} <= folders.keys():
        raise InputError(f"{root} holds images/ and masks/, which dense.py takes: here give {root / 'images'}")
    top = folders.get("train") or folders.get("training")
    files, names = by_class(top or root)
    if not files:
        raise InputError(f"no images in {top or root} (looked for {' '.join(sorted(SUFFIXES))})")
    yield files, names
    used = {top}
    for test in (folders[k] for k in TESTS if top and names and k in folders):
        found = by_class(test, names)
        if found[1]:
            yield found
            used.add(test)
            break
    unused = [str(d) for d in folders.values() if top and d not in used and list_images(d)]
    if unused:
        note(f"not used, besides {', '.join(map(str, used))}: {', '.join(unused)}")


def open_npz(file, label):
    """Arrays of an .npz, for each split: train_images, train_labels, test_images, ... or images and labels."""
    with np.load(file, allow_pickle=False) as z:
        if "train_images" not in z and "images" not in z:
            raise InputError(f"{file} holds neither train_images nor images: see --data in --help")
        test = [f"{part}_" for part in TESTS if {f"{part}_images", f"{part}_{label}"} <= set(z.files)][:1]
        for prefix in ["train_", *test] if "train_images" in z else [""]:
            images, labels = z[f"{prefix}images"], z.get(f"{prefix}{label}")
            where, shape = f"{file}, {prefix}images", images.shape
            if images.dtype != np.uint8 or images.ndim not in (3, 4) or not images.size:
                raise InputError(f"{where} must be uint8 (N, H, W) or (N, H, W, C), not {images.dtype} {shape}")
            if images.ndim == 3 and shape[2] <= 4:
                raise InputError(f"{where} has the shape {shape} of one image: give (N, H, W, C)")
            if images.ndim == 4 and shape[1] < min(shape[2:]):
                raise InputError(f"{where} has channels first, {shape}: give (N, H, W, C), by transpose(0, 2, 3, 1)")
            images = np.repeat(images[..., None], 3, axis=-1) if images.ndim == 3 else images  # grey to RGB
            labels = None if labels is None else as_labels(labels, len(images), f"{file}, {prefix}{label}", names=True)
            yield torch.from_numpy(images).permute(0, 3, 1, 2), labels


def hold_out(labels):
    """The indices of training and of test images: a tenth of each class, at least one of two or more, by lot."""
    order, test = torch.randperm(len(labels), generator=seeded(0, 0)), torch.zeros(len(labels), dtype=torch.bool)
    for c in labels.unique():
        members = order[labels[order] == c]
        test[members[: max(1, round(len(members) / 10))]] = len(members) > 1
    return (~test).nonzero()[:, 0], test.nonzero()[:, 0]


def open_images(data="demo.npz", label="labels", whole=False):
    """Training and test images of a data set, two `Images`. Files are listed, not yet decoded: see Images.at.

    data: "demo.npz", any .npz, "cifar10", "cifar100", a folder with train/ and test/ (or val/) of class folders, a
    folder of class folders, or a folder of loose images at any depth. Of labelled images without a labelled test split
    a tenth of each class is held out; with `whole` they are the test images too. The test images are None where there
    are no labels, fewer than two classes, or too few images to hold one out. Raises InputError if nothing usable is
    there.
    """
    path = Path(__file__).with_name("demo.npz") if data == "demo.npz" and not Path(data).exists() else Path(data)
    if processes()[0] > 0:  # process 0, which may have to download, goes first; the others follow together
        dist.barrier()
    with reading(data, "data set"):
        if data in ("cifar10", "cifar100"):  # downloaded into data/ on first use
            sets = [getattr(datasets, data.upper())("data", train=train, download=True) for train in (True, False)]
            splits = [(torch.from_numpy(s.data).permute(0, 3, 1, 2), np.array(s.classes)[s.targets]) for s in sets]
        elif path.is_dir():
            splits = list(open_folder(path))
        elif path.is_file() and path.suffix == ".npz":
            splits = list(open_npz(path, label))
        else:
            raise InputError(f"--data {data}: no such .npz file or folder (nor cifar10, cifar100 or demo.npz)")
        known = [n for _, n in splits if n is not None]
        classes = np.unique(np.concatenate(known or [[]]))  # of both splits, so that both are numbered alike
        numbered = lambda names: None if names is None else np.searchsorted(classes, names)
        sets = [Images(items, numbered(names), map(str, classes)) for items, names in splits]
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()
    train, test = sets[0], sets[1] if len(sets) > 1 else None
    if train.labels is None or len(classes) < 2 and not whole:
        return train, None
    if test is None and not whole:
        kept, held = hold_out(train.labels)
        return train.pick(kept), train.pick(held) if len(held) else None
    return train, test or train


def batches(n, batch, first, stop, seed, whole=False):
    """Indices of this process's images (or the whole batch's) in steps first to stop - 1; a new order each epoch."""
    rank, world = (0, 1) if whole else processes()
    mine = slice(rank * batch // world, (rank + 1) * batch // world)
    for step in range(first, stop):
        epoch, at = divmod(step, n // batch)
        if step == first or at == 0:
            order = torch.randperm(n, generator=seeded(seed, -1 - epoch))
        yield order[at * batch : (at + 1) * batch][mine].tolist()


def in_order(images, batch):
    """The indices that stream() takes to go through all images once."""
    return [i.tolist() for i in torch.arange(len(images)).split(batch)]


def stream(images, indices, device="cpu", workers=2):
    """Yields uint8 (B, C, S, S) on the device for each list of `indices`; workers decode files."""
    device, items = torch.device(device), images.items
    if images.in_memory:
        if device.type == "cuda" and items.numel() < torch.cuda.mem_get_info(device)[0] // 4:
            items = items.to(device)  # the whole set lies on the device: a batch is an index
        for index in indices:
            yield to_device(items[torch.as_tensor(index).to(items.device, non_blocking=True)], device)
        return
    how = dict(num_workers=workers, worker_init_fn=in_worker, pin_memory=device.type == "cuda")
    loader = iter(torch.utils.data.DataLoader(images, batch_sampler=indices, **how))
    try:
        for batch in loader:
            yield batch.to(device, non_blocking=True)
    except InputError as e:  # a worker's has its whole traceback for a message
        raise InputError(str(e).strip().split("InputError: ")[-1]) from None
    finally:  # as workers ignore SIGTERM, Python would wait for ever at its exit for those that an error left
        if workers:
            loader._shutdown_workers()


def in_worker(_):
    """Workers leave signals, which often go to the whole group of processes, to their parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def resize_side(img_size):
    """The side to which evaluation resizes before its centre crop: 8/7 of a network's above 64 px (224 px: 256 px)."""
    return max(img_size) if max(img_size) <= 64 else round(max(img_size) * 8 / 7)


def mean_and_std(config, device):
    """The channels' mean and standard deviation of an encoder's training images, in [0, 1]: two tensors (C, 1, 1)."""
    return (torch.tensor(config[k], device=device).view(-1, 1, 1) for k in ("mean", "std"))


def prepare(imgs, config):
    """uint8 (B, C, S, S) -> network input (B, C, h, w) for evaluation: resize, centre crop, normalise.

    config: img_size (h, w), mean and std (lists), as load_encoder returns them. Images that have img_size already
    are only normalised.
    """
    x, side = imgs.float() / 255, resize_side(config["img_size"])
    if x.shape[-2:] != tuple(config["img_size"]):
        x = TF.resize(x, [side, side], interpolation=TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        x = TF.center_crop(x, config["img_size"])
    return TF.normalize(x, config["mean"], config["std"])


# 5 evaluation ---------------------------------------------------------------------------------------------------------


def pixels(x):
    """The pixels of x (B, C, h, w), at most 32 x 32 of them, as vectors (B, C·h·w)."""
    return F.adaptive_avg_pool2d(x, [min(32, s) for s in x.shape[-2:]]).flatten(1)


@torch.no_grad()
def features(encode, images, config, device, precision="fp32", batch=256, workers=2):
    """encode(x) of all images, (N, D), fp32, on the device. encode: network input (B, C, h, w) -> vectors (B, D)."""
    out, done = None, 0
    for imgs in stream(images, in_order(images, batch), device, workers):
        x = prepare(imgs, config)
        with autocast(device, precision):
            found = encode(x).float()
        if out is None:  # preallocated, so that memory does not fragment
            out = found.new_empty(len(images), found.shape[1])
        out[done : done + len(found)] = found
        done += len(found)
    return out


def knn_hits(train, train_labels, test, test_labels, ks=(20,), temperature=0.07, chunk_bytes=2**28):
    """Weighted k-NN (Wu et al., arXiv 1805.01978; DINO, appendix F.1): a neighbour votes exp(cosine / temperature).

    train (M, D), test (N, D): features of any length. labels: int64, numbered from 0. Returns {k: (N, n)}: whether the
    first, the second, ... of the n classes with most votes is right. n is at most 5, k and the number of classes.
    """
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    classes, hits = int(max(train_labels.max(), test_labels.max())) + 1, {k: [] for k in ks}
    for x, y in zip(*(t.split(max(1, chunk_bytes // (4 * len(train)))) for t in (test, test_labels)), strict=True):
        similar, index = (x @ train.T).topk(min(max(ks), len(train)), dim=1)
        for k in ks:
            votes = torch.zeros(len(x), classes, device=x.device)
            weight = ((similar[:, :k] - similar[:, :1]) / temperature).exp()  # relative to the nearest's: none is inf
            votes.scatter_add_(1, train_labels[index[:, :k]], weight)
            best = votes.sort(dim=1, descending=True, stable=True)[1][:, : min(5, k)]  # ties: the lower label
            hits[k].append(best == y[:, None])
    return {k: torch.cat(h) for k, h in hits.items()}


def knn(*sets, **how):
    """k-NN accuracy {k: (top-1, top-5)} in percent; see knn_hits."""
    hits = knn_hits(*sets, **how)
    return {k: (100 * h[:, 0].double().mean().item(), 100 * h.any(1).double().mean().item()) for k, h in hits.items()}


def accuracy_error(accuracy, n):
    """The standard error of an accuracy on n images; both in percent."""
    return (accuracy * (100 - accuracy) / n) ** 0.5


def token_std(x):
    """How much tokens (B, n, D) differ: standard deviation over tokens and images, mean over entries. 0: collapsed."""
    return x.detach().flatten(0, 1).std(dim=0).mean()


def attention_mask(maps, mass=0.6):
    """The patches that hold `mass` of the attention, largest first (DINO, Figure 4). maps (..., N) -> bool (..., N)."""
    value, order = (maps / maps.sum(dim=-1, keepdim=True)).sort(dim=-1, descending=True)
    kept = value.cumsum(dim=-1) - value < mass  # up to and including the patch that reaches it
    return torch.zeros_like(kept).scatter(-1, order, kept)


def save_grid(columns, file, tile=96):
    """A picture with one row per image. columns: title -> (B, C, h, w) in [0, 1], any size; enlarged to `tile` px."""
    shape = next(iter(columns.values())).shape[-2:]
    size = [tile * s // max(shape) for s in shape]
    rgb = lambda x: x[:, [0, 1, 2] if x.shape[1] == 3 else [0, 0, 0]].float().clamp(0, 1)
    rows = torch.stack([F.interpolate(rgb(x), size=size).cpu() for x in columns.values()], dim=1).flatten(0, 1)
    img = TF.to_pil_image(F.pad(make_grid(rows, nrow=len(columns), padding=2, pad_value=1), (0, 0, 14, 0), value=1.0))
    for i, title in enumerate(columns):
        ImageDraw.Draw(img).text((4 + i * (size[1] + 2), 2), title, "black")
    img.save(file)


# 6 checkpoints --------------------------------------------------------------------------------------------------------


def save_checkpoint(file, state):
    """Writes tensors and plain types to a temporary file, then moves it in place: never half a checkpoint."""
    part = Path(f"{file}.{os.getpid()}.part")  # its own name, should two runs share a folder
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, file)
    except (OSError, RuntimeError) as e:  # torch.save's RuntimeError hides its cause, such as a full disk
        why = e if isinstance(e, OSError) else e.__context__ or e
        raise InputError(f"could not save {file} ({why}); what was saved there before is untouched") from None
    finally:  # a second Ctrl-C may have come in the middle
        part.unlink(missing_ok=True)


def load_checkpoint(file, harmless=(argparse.Namespace,)):
    """What a checkpoint holds. Never runs code from the file. Raises InputError that says what is wrong with it.

    harmless: classes and functions that the file may use besides tensors and plain types.
    """
    if not Path(file).is_file():
        hint = f": did you mean {file}/last.pt?" if Path(file, "last.pt").is_file() else ""
        raise InputError(f"no checkpoint at {file}{hint}")
    with reading(file, "checkpoint"), torch.serialization.safe_globals(list(harmless)):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            name = re.search(r"GLOBAL (\S+)", str(e))
            save = "where you trust it, load it, and save its weights alone, torch.save(model.state_dict(), FILE)"
            what = f"refused, it wants to run {name[1]}: {save}" if name else "neither weights nor a checkpoint"
            raise InputError(f"{file} is not a readable checkpoint ({what})") from None


def class_name(backbone):
    """The name under which a checkpoint knows a backbone of one's own; None for ViT."""
    return None if backbone is ViT else f"{backbone.__module__}.{backbone.__qualname__}"


def load_encoder(file, backbone=ViT):
    """The encoder of a run (last.pt) or of weights/*.pt, and what is needed to use it: (vit, config).

    config: the ViT's arguments, mean and std (of pixels in [0, 1]), and feature, the vector to evaluate. backbone: the
    class with which it was trained, if that is not ViT. Raises InputError for other files; tools/convert.py reads the
    authors' and timm's.
    """
    state = load_checkpoint(file)
    if not isinstance(state, dict) or not all(isinstance(state.get(k), dict) for k in ("encoder", "config")):
        raise InputError(f"{file} is no checkpoint of ours: python tools/convert.py {file} makes one of others'")
    config = state["config"]
    if config.get("backbone") != class_name(backbone):
        trained = config.get("backbone") or "vit.ViT"
        raise InputError(f"{file} was trained with backbone {trained}: load_encoder(FILE, backbone=...) takes it")
    return build_encoder(file, state["encoder"], config, backbone), config


def build_encoder(file, weights, config, backbone=ViT):
    """A ViT of this config with these weights. Raises InputError where one is missing or of another shape."""
    with reading(file, "ViT"):
        sizes = [*config["img_size"], *(config[k] for k in ("patch", "in_chans", "dim", "depth", "heads"))]
        if not all(type(s) is int and s > 0 for s in sizes) or config["feature"] not in ("cls", "mean", "both"):
            raise ValueError(f"its config is {config}")
        vit = backbone(
            **{k: config[k] for k in ("img_size", "patch", "in_chans", "dim", "depth", "heads", "pos", "norm")}
        )
        wrong = [k for k, v in vit.state_dict().items() if k not in weights or v.shape != weights[k].shape]
        if wrong:
            raise InputError(f"{file}: {len(wrong)} tensors are missing or of another shape: {wrong[:4]}")
        vit.load_state_dict({k: weights[k] for k in vit.state_dict()})
    return vit.eval()


def start_from(file, vit, net):
    """--init: an encoder's weights into `vit`, positions interpolated; its mean and std into `net`; a new teacher."""
    encoder, found = load_encoder(file, type(vit))
    differ = [k for k in ("patch", "in_chans", "dim", "depth", "heads", "norm") if found[k] != vit.config[k]]
    if differ:
        what = ", ".join(f"{k} {found[k]}, not {vit.config[k]}" for k in differ)
        raise InputError(f"--init {file} was trained at {found['img_size'][0]} px and has another shape: {what}")
    encoder.pos_embed.data = encoder.positions(vit.grid)
    vit.load_state_dict(encoder.state_dict())
    for name in ("mean", "std"):
        getattr(net, name).copy_(torch.tensor(found[name]).view(-1, 1, 1))
    net.start_teacher()


# 7 runs ---------------------------------------------------------------------------------------------------------------


def cli(main):
    """Decorator for a script's main: an InputError becomes one line on stderr and exit code 2."""

    @functools.wraps(main)
    def wrapped(*args, **options):
        for output in (sys.stdout, sys.stderr):  # a console of ASCII alone shows ? for what it does not have
            if hasattr(output, "reconfigure"):
                output.reconfigure(errors="replace")
        try:
            result = main(*args, **options)
            # All is printed and saved. One time in twenty gloo aborts when it is shut down: leave without that.
            if dist.is_initialized() and main.__module__ == "__main__":
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            return result
        except InputError as e:
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return wrapped


def to_json(x):
    """One line of JSON; null for numbers that are not finite, which JSON does not have."""
    return json.dumps(json.loads(json.dumps(x), parse_constant=lambda name: None))


def number(kind, low, high=math.inf):
    """A type for argparse: an int or float in [low, high]."""

    def parse(text):
        if not low <= kind(text) <= high:
            bounds = f"{low} or more" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


PRESETS = ("demo", "cpu", "32", "96", "224")
COUNT, SHARE, MANY = dict(type=number(int, 1)), dict(type=number(float, 0, 1)), dict(nargs="+")
PRECISION = ("auto", "bf16 if the hardware has it; fp32 on a GPU is TF32", dict(choices=("auto", *DTYPES)))
DEVICE = (None, "cuda, mps or cpu (the first that is there)")
DATA_HELP = "demo.npz, any .npz, cifar10, cifar100, or a folder of images"
COMMON = dict(  # options of every training script
    data=("demo.npz", DATA_HELP),
    out=(None, "folder for last.pt, log.jsonl and pictures; a run found there resumes (runs/METHOD-DATA)"),
    preset=(None, "which defaults to use (cpu without a GPU; with one, by the images' size)", dict(choices=PRESETS)),
    steps=(None, "only for a test: break the run off after so many steps; schedules do not get shorter", COUNT),
    accumulate=(1, "micro-batches in a step: less memory, same gradient (but drop path, BatchNorm, infonce)", COUNT),
    workers=(2, "processes that decode images, where a set does not fit into memory"),
    device=DEVICE,
    precision=PRECISION,
    seed=(0, "of weights, order, views and masks"),
    init=(None, "start from the encoder in this checkpoint (others': tools/convert.py)", dict(metavar="FILE")),
    compile=(False, "use torch.compile: faster on a GPU, after a minute"),
)


def by_preset(*values):
    """Defaults for demo.npz, a CPU, then the published ones for images of 32, 96 and 224 px; the last is repeated."""
    return dict(zip(PRESETS, [*values, *values[-1:] * (len(PRESETS) - len(values))], strict=True))


def refuse(message):
    raise InputError(message)


def options(doc, table, argv=None, **fixed):
    """Parses the options in `table`: rows name=(default, help[, arguments for argparse]).

    A default is one value, or by_preset(...), which `load_data` fills in. Tuples are options of several numbers.
    fixed: set without being options.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse  # one line, without the usage
    kinds = {bool: dict(action=argparse.BooleanOptionalAction)} | {k: dict(type=number(k, 0)) for k in (int, float)}
    for name, (default, text, *more) in table.items():
        example = default["32"] if isinstance(default, dict) else default
        kind = kinds[float] | dict(nargs=len(example)) if isinstance(example, tuple) else kinds.get(type(example), {})
        kind = kind | (more[0] if more else {})
        defaults = default if isinstance(default, dict) else {"": default}
        shown = ", ".join(f"{k} {v}".strip() for k, v in defaults.items() if v is not None)
        text += f" (default: {shown})" * bool(shown)
        p.add_argument(kind.pop("flag", f"--{name.replace('_', '-')}"), help=text, **kind)
        p.set_defaults(**{name: None if isinstance(default, dict) else default})
    p.set_defaults(**fixed)
    return p.parse_args(argv)


def settle(args, table, side, count=1, gpu=True):
    """Fills in the options that depend on the data and the machine. side: of the images before any resizing, px."""
    by_size = "32" if side <= 64 else "96" if side <= 160 else "224"
    args.preset = args.preset or ("demo" if Path(args.data).name == "demo.npz" else by_size if gpu else "cpu")
    for name, (default, *_) in table.items():
        value = getattr(args, name)
        value = default[args.preset] if value is None and isinstance(default, dict) else value
        setattr(args, name, list(value) if isinstance(value, tuple) else value)
    if isinstance(args.epochs, str):  # "300000 images"
        args.epochs = max(1, round(int(args.epochs.split()[0]) / count))
    args.warmup = args.epochs / 10 if args.warmup is None else min(args.warmup, args.epochs)
    top = args.img_size or (min(48, side) if args.preset == "cpu" else side)
    if isinstance(args.patch, str):  # "1/8 of the image"
        args.patch = max(1, top // int(args.patch.split()[0][2:]))
    args.img_size = args.img_size or top // args.patch * args.patch
    if args.img_size < args.patch or args.img_size % args.patch:
        raise InputError(f"--img-size {args.img_size} is not a multiple of --patch {args.patch}: change one of them")
    name = f"{args.method}-{Path(args.data).stem or 'data'}" + (f"-{args.ablate}" if vars(args).get("ablate") else "")
    args.out = args.out or f"runs/{name}"


def ablate(args, ablations):
    """Sets the options of --ablate; refuses an option that was given beside it and would be overridden."""
    for name, value in ablations.get(args.ablate, {}).items():
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"--ablate {args.ablate} sets {option} {value}: leave {option} or --ablate out")
        setattr(args, name, value)


def vit_kwargs(args, in_chans):
    """The arguments of ViT that the options give."""
    return dict(SIZES[args.size], img_size=args.img_size, patch=args.patch, in_chans=in_chans)


def launch(args, alone=False):
    """The device; joins the other processes if torchrun started this one (`alone`: refuses); settles --precision."""
    has = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = args.device or next(k for k in has if has[k])
    if not has.get(kind.split(":")[0]):
        raise InputError(f"--device {kind}: not on this machine, which has {', '.join(k for k in has if has[k])}")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    gpu, several = device.type == "cuda", os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    if alone and several:
        raise InputError("this runs in one process: start it without torchrun")
    if gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        if torch.cuda.device_count() > 1 and not several:
            note(f"uses 1 of {torch.cuda.device_count()} GPUs: start it with torchrun to use more")
    if args.precision == "auto":
        cpu = Path("/proc/cpuinfo")
        flags = cpu.read_text() if device.type == "cpu" and cpu.exists() else ""
        fast = "avx512_bf16" in flags or "amx_bf16" in flags or gpu and torch.cuda.is_bf16_supported(False)
        args.precision = "bf16" if fast else "fp16" if gpu else "fp32"
    if several and not dist.is_initialized():  # process 0 may download and decode for long while the others wait
        how = dict(timeout=datetime.timedelta(hours=2), device_id=device if gpu else None)
        try:
            dist.init_process_group("nccl" if gpu else "gloo", **how)
        except ValueError as e:  # a variable is missing, or no number
            raise InputError(f"several processes need all that torchrun sets ({e}): unset WORLD_SIZE for one") from None
    return device


def load_data(args, table, device, images=None):
    """Training and test images, two `Images`; test is None where k-NN cannot be measured. images: use these instead.

    Opens the data, fills in the options that depend on it, decodes what fits into memory, and checks that batches can
    be shared among processes.
    """
    rank, world = processes()
    if isinstance(images, Images):
        raise InputError("images must be a pair: main(images=(train, test)), or (train, None)")
    if images and args.data == "demo.npz":
        args.data = "own"  # for the name of the folder
    train, test = images or open_images(args.data)
    settle(args, table, train.side, len(train), device.type == "cuda")
    top = args.img_size
    side = top if top <= 64 else max(top, min(2 * top, train.side))  # larger ones leave room for crops
    train = train.at(side, quiet=rank > 0)
    train.replace = True
    labelled = all(s is not None and s.labels is not None for s in (train, test)) and len(train.labels.unique()) > 1
    test = test.subset(800).at(side, quiet=True) if labelled else None  # for k-NN while training
    shares = world * args.accumulate
    if args.batch > len(train) >= shares:
        args.batch = len(train) // shares * shares
        note(f"warning: there are only {len(train)} images: --batch {args.batch}")
    if args.batch % shares or args.batch > len(train):
        parts = f"{world} process(es) x {args.accumulate} micro-batches"
        raise InputError(f"--batch {args.batch} of {len(train)} images cannot be shared by {parts}")
    return train, test


def step_memory(args, net, parts, device):
    """About how many bytes training needs in a process, to a factor of 1.5. Refuses more than there is.

    parts: (tokens of an image, width, blocks) of all that keeps activations for the backward pass. A block keeps some
    16 numbers a token and channel: the inputs of its norms and linear layers, queries, keys, values, and the MLP's
    hidden layer twice; views some 8 numbers for each of their pixels. Weights that are trained have a gradient and
    AdamW's two moments, a teacher's an update.
    """
    world, bytes_each = processes()[1], 4 if args.precision == "fp32" else 2.5
    image = (
        sum(n * (16 * width * blocks + 8 * args.patch**2 * len(net.mean)) for n, width, blocks in parts) * bytes_each
    )
    trained = 16 if world == 1 else 20  # bytes of a weight; DistributedDataParallel holds gradients twice
    fixed = sum(p.numel() * (trained if p.requires_grad else 8) for p in net.parameters())
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[0]
    else:
        fixed += 0.75 * 2**30  # Python, PyTorch and Matplotlib alone
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    need = lambda accumulate: fixed + image * args.batch / accumulate / world
    if need(args.accumulate) > there:
        can = [n for n in range(args.accumulate, args.batch + 1) if args.batch % (n * world) == 0 and need(n) <= there]
        gib = f"about {need(args.accumulate) / 2**30:.1f} GiB of memory, and there are {there / 2**30:.1f}"
        way = f"--accumulate {can[0]}, " if can else ""
        raise InputError(f"a step needs {gib}: give {way}a smaller --batch or --size, or --preset cpu")
    return need(args.accumulate)


def check_momentum(momentum, steps):
    """Warns if much of the initial teacher is left at the end (.9999, rising to 1: 37 % after 20,000 steps)."""
    left = math.exp((momentum - 1) * steps / 2)  # 1 - momentum falls by a cosine: its mean is half
    if left > 0.1:
        note(f"warning: {left:.0%} of the initial teacher would be left after {steps} steps: lower --momentum")


SAVE_EVERY = 60  # seconds between two saves, at least
LOG_EVERY = 10  # steps
MAY_CHANGE = ("steps", "workers", "out", "device", "json")  # these options may differ when a run resumes


def say(text):
    """Prints on process 0, above the progress bar."""
    if processes()[0] == 0:
        tqdm.write(text)


def describe(args, images, vit, memory=0):
    """Prints what will be trained, on what, and how long. memory: what step_memory counted, in bytes."""
    params, world = list(vit.parameters()), processes()[1]
    if args.method != "finetune":
        shape = f"{sum(p.numel() for p in params) / 1e6:.1f} million parameters, {args.img_size} px"
        why = "; made for a computer without a GPU" if args.preset == "cpu" else ""
        preset = f"{args.method} on {args.data}, preset {args.preset} (--preset for another{why})"
        say(f"{preset}: {args.size} ViT of {shape} in patches of {args.patch}")
    batches_each = len(images) // args.batch
    seen = args.epochs * batches_each * args.batch
    plan = f"{args.epochs} epochs of {batches_each} batches of {args.batch} from {len(images)} images, {seen} in all"
    plan += f", about {memory / 2**30:.1f} GiB of memory" * (memory > 0)
    say(f"{plan}; {params[0].device.type}, {args.precision}, {world} process{'es' * (world > 1)} -> {args.out}")


def encoder_config(args, net, vit):
    """What load_encoder needs besides the weights. net: has buffers mean and std, and `feature`, what to evaluate."""
    config = vit.config | dict(method=args.method, data=args.data, feature=net.feature, backbone=class_name(type(vit)))
    return config | {k: getattr(net, k).flatten().tolist() for k in ("mean", "std")}


def resume(args, parts, images, stop, script):
    """Loads args.out/last.pt, if it is there, into `parts`. Returns how many steps were done, and the log's lines.

    parts: name -> what training needs to resume (network, optimizer, scaler). images: the number of training images.
    stop: where this run ends. script: the method's file. Raises InputError if last.pt is of a run with other options or
    images, or of one that other code has finished.

    All random numbers of a step follow from the seed and the step, so nothing of them is saved. A run that is killed
    loses what it did since its last save, about a minute, and does it again, bit for bit.
    """
    file, sources = Path(args.out, "last.pt"), [Path(f).read_bytes() for f in (script, __file__)]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()
    now = dict(args=vars(args), images=images, script=digest)
    if not file.exists():
        return 0, [to_json(now)]
    state = load_checkpoint(file)
    if not isinstance(state, dict) or not {"step", "log", *parts} <= state.keys():
        raise InputError(f"{file} is not a checkpoint of such a run: remove it, or give another --out")
    then, old, new = json.loads(state["log"][0]), state["options"], vars(args)
    same_data = Path(old.get("data", "")).resolve() == Path(new.get("data", "")).resolve()  # photos, ./photos, photos/
    differ = [
        k for k in old | new if k not in MAY_CHANGE and old.get(k) != new.get(k) and not (k == "data" and same_data)
    ]
    if differ:
        what = ", ".join(f"--{k.replace('_', '-')} {old.get(k)} (now {new.get(k)})" for k in differ[:4])
        may_begin = "init" in args and not args.init  # fine-tuning has no --init
        why = "give another --out" + f", or --init {file} to start from its encoder" * may_begin
        raise InputError(f"{args.out} holds a run with {what}: {why}")
    if then["images"] != images:
        changed = f"a run on {then['images']} images, now there are {images}"
        raise InputError(f"{args.out} holds {changed}: restore the images, or give another --out")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    first, changed = state["step"], then["script"] != digest
    if first >= stop:
        if changed:  # or the result of other code would be taken for this one's
            raise InputError(f"{args.out} was trained by another version of the script or vit.py: give another --out")
        say(f"{args.out} is already trained, {first} steps, nothing to do: give another --out for a new run")
    else:
        say(f"resumes after step {first} of {stop}")
        if changed:
            note("warning: the script or vit.py has changed since this run began; another --out begins a new one")
    return first, state["log"]


def save(args, parts, vit, config, step, log):
    """Writes args.out/last.pt after `step`, on process 0: what resume needs, and the encoder."""
    state = {name: part.state_dict() for name, part in parts.items()} | dict(options=vars(args), log=log.lines)
    save_checkpoint(Path(args.out, "last.pt"), state | dict(step=step + 1, encoder=vit.state_dict(), config=config))
    log.saved = time.perf_counter()  # the next one rests from the end of this one


def steps(images, args, log, device):
    """Yields (step, images on the device, leaving) and seeds drop path. leaving: whether this step is the last here.

    That is at log.stop, or where Ctrl-C or SIGTERM came (with several processes: within ten steps of it, all together).
    Then SystemExit follows, so that main can save first. A second Ctrl-C leaves at once.
    """
    (rank, world), asked, first, stop = processes(), [], log.first, log.stop
    if mean_over_processes(torch.tensor(float(first), device=device)) != first:
        raise InputError("processes found different checkpoints: --out must be one folder that all machines share")

    def on_signal(number, _):
        if asked and number == signal.SIGINT:
            raise SystemExit(128 + number)
        if rank == 0 and not asked:
            os.write(2, b"\nsaving after this step; Ctrl-C again to stop without saving\n")
        asked.append(number)

    main_thread = threading.current_thread() is threading.main_thread()  # others may not set handlers
    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM) if main_thread}
    loader = stream(images, batches(len(images), args.batch, first, stop, args.seed), device, args.workers)
    bar = tqdm(loader, total=stop, initial=first, unit="step", leave=False, disable=True if rank else None)
    log.started = log.since = log.saved = time.perf_counter()
    try:
        for step, imgs in enumerate(bar, first):
            number = asked[0] if asked else 0
            if world > 1:  # all must leave at the same step, so every ten steps they ask each other
                any_asked = step % 10 == 9 and mean_over_processes(torch.tensor(float(number), device=device)) > 0
                number = signal.SIGTERM if any_asked else 0
            torch.manual_seed(((args.seed * 1_000_003 + step) * world + rank) % 2**63)
            yield step, imgs, step + 1 == stop or number > 0
            if number and step + 1 < stop:
                if world > 1:
                    dist.barrier()  # process 0 saves; torchrun would end it as soon as another has left
                say(f"stopped at step {step + 1} of {stop}, saved: run the same command again to resume")
                raise SystemExit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """The lines of log.jsonl, one JSON object each, and what is printed of them. Process 0 alone writes and prints.

    lines: those saved at an earlier start; log.jsonl is rewritten from them, so what a killed run logged after its
    last save goes. optimizer: it counts the steps that were not skipped.
    """

    def __init__(self, args, lines, first, stop, optimizer):
        self.file, self.lines, self.first, self.stop = Path(args.out, "log.jsonl"), list(lines), first, stop
        self.batch, self.optimizer, self.rank = args.batch, optimizer, processes()[0]
        self.per_epoch = self.rows()[0]["images"] // args.batch
        self.trained = self.latest("seconds").get("seconds", 0.0)  # at earlier starts
        self.started = self.since = self.saved = 0.0  # set by `steps`
        self.shown, self.counted, self.warned = 0.0, first, False
        self.updates, self.moved = self.count_updates(), first - 1
        if self.rank == 0:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                for old in self.file.parent.glob("*.part"):  # of a process that was killed while it saved
                    if time.time() - old.stat().st_mtime > 3600:
                        old.unlink()
                part = self.file.with_suffix(f".{os.getpid()}.part")
                part.write_text("".join(line + "\n" for line in self.lines))
                os.replace(part, self.file)
            except OSError as e:
                raise InputError(f"--out {args.out} cannot be written ({e})") from None

    def write(self, **row):
        if self.rank == 0:
            self.lines.append(to_json(row))
            with open(self.file, "a") as f:
                f.write(self.lines[-1] + "\n")

    def rows(self):
        return [json.loads(line) for line in self.lines]

    def latest(self, *keys):
        """The last value of each key."""
        return {k: row[k] for row in self.rows() for k in keys if k in row}

    def count_updates(self):
        """How often AdamW moved the weights: it does not count a step that it skips."""
        return int(next((s["step"] for s in self.optimizer.state.values()), 0))

    def picture(self, name):
        return self.file.with_name(f"{name}.png")

    def due(self, step, leaving):
        return step == self.first or (step + 1) % LOG_EVERY == 0 or leaving

    def save_due(self, step, leaving):
        """At the end, when asked to stop, and at the first row that is a minute after the last save."""
        rested = time.perf_counter() - self.saved >= SAVE_EVERY
        return self.rank == 0 and (leaving or self.due(step, leaving) and rested)

    def step(self, step, warning=None, **row):
        """Writes `row` and what every run logs. With .tolist() before it, the only point that waits for the GPU.

        warning: printed once. 20 steps in a row with a gradient that is not finite end the run.
        """
        now, updates = time.perf_counter(), self.count_updates()
        speed = (step + 1 - self.counted) * self.batch / (now - self.since)
        row = dict(step=step + 1, epoch=round((step + 1) / self.per_epoch, 3), **row, skipped=step + 1 - updates)
        self.write(**row, images_per_s=round(speed, 1), seconds=round(self.trained + now - self.started, 2))
        self.since, self.counted = now, step + 1
        if step - self.first < 20 or now - self.shown > 30:
            minutes = (self.stop - step - 1) * self.batch / speed / 60
            entropy = f", entropy {row['entropy']:.4g}" if "entropy" in row else ""
            left = f"about {minutes:.1f} minutes to go" if minutes else "done"
            say(f"step {step + 1} of {self.stop}: loss {row['loss']:.4g}{entropy}, {speed:.0f} images/s, {left}")
            self.shown = now
        if warning and not self.warned:
            say(f"warning at step {step + 1}: {warning}")
            self.warned = True
        if updates > self.updates:
            self.updates, self.moved = updates, step
        if step - self.moved >= 20:
            why = f"{step - self.moved} steps in a row had a gradient that is not finite"
            raise SystemExit(f"stopped at step {step + 1}: {why}; try a lower --lr. {row}")

    def accuracy(self, step, text, **row):
        """Writes an accuracy, and prints it as `text`. The time that it took does not count for images_per_s."""
        epoch = round((step + 1) / self.per_epoch, 3)
        self.write(step=step + 1, epoch=epoch, **row)
        say(f"epoch {epoch:g}: {text}")
        self.since, self.counted = time.perf_counter(), step + 1

    def draw_curve(self, key="knn"):
        """Draws curve.png, over epochs: the loss, with DINO's entropy and KL beside ln K, their limit; and `key`, where
        it was measured, beside raw pixels and the network before training.
        """
        from matplotlib.figure import Figure  # importing it takes half a second

        rows = self.rows()
        prototypes = rows[0]["args"].get("prototypes")
        panels = [("loss", ("loss", "entropy", "kl"), [("ln K", math.log(prototypes))] if prototypes else [])]
        if any(key in row for row in rows):
            before = [(k[4:], v) for row in rows for k, v in row.items() if k.startswith("knn_")]
            panels.append(("k-NN accuracy, % (k = 20)" if key == "knn" else "accuracy, %", (key,), before))
        figure = Figure((5 * len(panels), 3), layout="constrained")
        subplots = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, names, levels) in zip(subplots, panels, strict=True):
            for name in names:
                points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="." if len(points) < 30 else "", label=name)
            for style, (name, value) in zip(("--", ":"), levels, strict=False):
                axes.axhline(value, color="grey", linestyle=style, label=name)
            axes.set(xlabel="epoch", title=title)
            axes.set_xlim(left=0)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the curves, not over them
        figure.savefig(self.picture("curve"), dpi=100)


class Monitor:
    """k-NN accuracy of an encoder while it trains: k = 20, T = 0.07, the neighbours of at most 800 test
    images among at most 4,000 training images.

    On process 0 alone, and where there are labelled test images.
    """

    def __init__(self, args, vit, config, train, test, device):
        self.vit, self.config, self.how = vit, config, (config, device, args.precision, 256, args.workers)
        small = lambda images: images.subset(4000).at(resize_side(config["img_size"]), quiet=True)
        self.sets = (small(train), small(test)) if test is not None and processes()[0] == 0 else None
        self.every, self.start = max(1, args.epochs // 10), "knn_start" if args.init else "knn_untrained"
        if test is None:
            say("no k-NN: this needs two classes, and labelled test images")

    def knn(self, encode=None):
        """The accuracy of the ViT or of encode(x), percent."""
        training, encode = self.vit.training, encode or (lambda x: self.vit.encode(x, self.config["feature"]))
        self.vit.eval()
        (x, y), (test_x, test_y) = ((features(encode, s, *self.how), s.labels) for s in self.sets)
        self.vit.train(training)
        return round(knn(x, y.to(x.device), test_x, test_y.to(x.device))[20][0], 2)

    def text(self, accuracy):
        """The accuracy with its standard error."""
        return f"{accuracy:.1f} ± {accuracy_error(accuracy, len(self.sets[1])):.1f} %"

    def before(self, log):
        """Measures k-NN of raw pixels and of the network before training, where the run begins."""
        if self.sets and not log.first:
            found = {"knn_pixels": self.knn(pixels), self.start: self.knn()}
            log.write(**found)
            values = ", ".join(f"{k[4:]} {self.text(v)}" for k, v in found.items())
            say(f"k-NN of {len(self.sets[1])} test images before training (± standard error): {values}")

    def when_due(self, step, leaving, log):
        """About ten times in a run, and at its end; not where it was asked to stop, which may be urgent."""
        finished, at_interval = step + 1 == log.stop, (step + 1) % (self.every * log.per_epoch) == 0
        if self.sets and (finished or at_interval and not leaving):
            accuracy = self.knn()
            log.accuracy(step, f"k-NN {self.text(accuracy)}", knn=accuracy)

    def result(self, args, log):
        """What main returns and prints. Warns where k-NN is within two standard errors of that before training."""
        found = log.latest("knn_pixels", self.start, "step", "loss", "knn", "seconds")
        text = f"done in {found.get('seconds', 0) / 60:.1f} minutes"
        if self.sets and {"knn", "knn_pixels", self.start} <= found.keys():
            knn, start, raw = found["knn"], found[self.start], found["knn_pixels"]
            text += f": k-NN {self.text(knn)} ({self.start[4:]} {start:.1f}, pixels {raw:.1f})"
            finished = log.stop == args.epochs * log.per_epoch
            if finished and knn <= start + 2 * accuracy_error(start, len(self.sets[1])):
                text += "; warning: little was learned, see 'When it does not learn' in README.md"
            elif finished and knn < raw:
                text += "; it learned, but is no better than raw pixels yet, see 'When it does not learn' in README.md"
            elif not finished:
                text += "; cut short by --steps"
        say(f"{text}; see {log.picture('curve')}")
        found["checkpoint"] = str(Path(args.out, "last.pt"))
        say(to_json({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}))
        return found
