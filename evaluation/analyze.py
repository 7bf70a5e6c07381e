"""What did it learn? Attention, representation and architecture of encoders, side by side, with a verdict per claim.

Park et al., "What Do Self-Supervised Vision Transformers Learn?", ICLR 2023, arXiv 2305.00729: contrastive
learning (CL) against masked image modelling (MIM). The claims are in CLAIMS.

    python evaluation/analyze.py runs/dino-demo/last.pt runs/mae-demo/last.pt --out runs/analysis
    python evaluation/analyze.py weights/*.pt --data cifar10 --out runs/analysis
    python evaluation/analyze.py moco.pth=cl mae.pth=mim --data imagenette/ --quick

Writes analysis.json, analysis.png (curves over depth) and queries.png (attention maps) into --out and prints a table
and the verdicts. An untrained network of the first checkpoint's shape is measured beside the others. A checkpoint of
ours says what it is (dino: CL; mae, pcae: MIM; others take no side); of another file say it: FILE=cl or FILE=mim.
Several files of one kind are averaged; how they differ counts as error over seeds. Claims 1, 2 and 5 need encoders of
one image size and patch size; else they are not comparable.

Where the paper's protocol is public (its notebooks) ours is the same: attention distance, normalised mutual
information, Fourier log amplitude. The others are our own: similarity of attention maps, of tokens within and across
images, singular values, linear probes and k-NN by depth, robustness to band noise, shape against texture; each is
defined in its function. What is measured image by image does not depend on --batch or on the order of files.

A verdict compares means: `holds` or `fails` where the margin is more than two standard errors, else `undecided`. Errors
are over images, and over seeds where there are several (few seeds: where nothing differs, two encoders on each side
give a verdict in 18 % of cases, three in 12 %). Claims 8 and 10 read JSON of linear.py and finetune.py, claim 9 of
dense.py (--results).
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_knn import EVALUATION, check_folders, report
from linear import accuracies, train_heads
from tools.convert import read_encoder

# isort: off
from vit import InputError, ViT, pooled  # 1 network
from vit import Images, batches, in_order, list_images, open_images, prepare, reading, resize_side, stream  # 4 images
from vit import accuracy_error, features, knn  # 5 evaluation
from vit import COUNT, cli, launch, options  # 7 runs

OPTIONS = {k: row for k, row in EVALUATION.items() if k not in ("checkpoint", "img_size", "limit")} | dict(
    checkpoints=(None, "runs' last.pt, weights/, authors' files; FILE=cl or =mim", dict(flag="checkpoints", nargs="*")),
    data=(None, "demo.npz, any .npz, cifar10, cifar100, or a folder (what the first was trained on)"),
    out=("runs/analysis", "folder for analysis.json, analysis.png and queries.png"),
    cue_conflict=(None, "folder of <shape class>/<shape>-<texture>.png (demo.npz has both labels)"),
    results=(
        (),
        "last lines of linear.py, finetune.py and dense.py, as files",
        dict(nargs="*", type=str, metavar="FILE"),
    ),
    limit=(1000, "test images that are measured", COUNT),
    train_images=(5000, "training images of linear probes and k-NN", COUNT),
    quick=(False, "200 test and 500 training images, fewer noise bands"),
    batch=(50, "images at a time", COUNT),
    precision=("fp32", "attention and Fourier measures need fp32", dict(choices=("fp32",))),
)

# self-attention ------------------------------------------------------------------------------------------------------


def patches_only(maps):
    """Attention among patches, (..., 1+N, 1+N) -> (..., N, N): the CLS token's row and column go, rows sum to one."""
    maps = maps[..., 1:, 1:]
    return maps / (maps.sum(dim=-1, keepdim=True) + 1e-32)


def attention_distance(maps, patch, grid):
    """How far attention looks, px: mean over queries of the sum over keys of A_qk times their distance (notebook).

    maps (B, H, 1+N, 1+N) -> (B, H). Uniform attention on 14 x 14 patches of 16 px: 116.5 px; attention to itself: 0.
    """
    y, x = torch.meshgrid(*(torch.arange(s, device=maps.device, dtype=maps.dtype) for s in grid), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=1) * patch
    return (patches_only(maps) * torch.cdist(place, place)).sum(dim=-1).mean(dim=-1)


def nmi(maps):
    """Normalised mutual information of query and key (notebook): 0 where all queries look alike, 1 where each has a key
    of its own. p(q) = 1/N, p(k|q) = A_qk, I / sqrt(H(q) H(k)). maps (B, H, 1+N, 1+N) -> (B, H).
    """
    a = maps[..., 1:, 1:] + 1e-8  # as the notebook, so that no key is left without attention
    a = a / a.sum(dim=-1, keepdim=True)
    n, p_k = a.shape[-1], a.mean(dim=-2)
    information = (a * (a / p_k[..., None, :]).log()).sum(dim=(-2, -1)) / n
    entropy_k = -(p_k * p_k.log()).sum(dim=-1)
    return information / (math.log(n) * entropy_k).sqrt().clamp(min=1e-12)


def mean_cosine(x):
    """Mean cosine of all pairs of the n > 1 vectors of x, (..., n, D) -> (...); |Σu|² is n plus all cosines."""
    u, n = F.normalize(x, dim=-1), x.shape[-2]
    return (u.sum(dim=-2).square().sum(dim=-1) - n) / (n * (n - 1))


def query_similarity(maps):
    """Do all queries look alike? Mean cosine of the attention rows of one head, over pairs of queries: (B, H)."""
    return mean_cosine(patches_only(maps))


def head_similarity(maps):
    """Do all heads look alike? Mean cosine of the attention rows of one query, over pairs of heads: (B,)."""
    return mean_cosine(patches_only(maps).transpose(1, 2)).mean(dim=-1)


# representation ------------------------------------------------------------------------------------------------------


def fourier_log_amplitude(tokens, grid):
    """Log amplitude along the diagonal, DC to below Nyquist, minus that of DC (notebook). (B, N, D) -> (B, bins).

    The paper reports the last bin. It mostly compares DC (the mean token) with the rest; fourier_without_dc is the
    last bin minus the second. An 8 x 8 grid has only four bins.
    """
    x = rearrange(tokens.float(), "b (h w) d -> b d h w", h=grid[0])
    log = (torch.fft.fft2(x).abs() + 1e-6).log()
    log = torch.fft.fftshift(log, dim=(-2, -1)).mean(dim=1)
    i = torch.arange(math.ceil(min(grid) / 2), device=tokens.device)
    half = log[:, i + grid[0] // 2, i + grid[1] // 2]
    return half - half[:, :1]


def singular_values(x):
    """Singular values of x (..., n, D) less its mean vector, largest first: (..., min(n, D))."""
    return torch.linalg.svdvals(x - x.mean(dim=-2, keepdim=True))


def effective_rank(s):
    """exp of the entropy of the normalised singular values s (..., r): 1 to r (Roy and Vetterli, 2007)."""
    p = s / s.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.exp(-(p * p.clamp(min=1e-12).log()).sum(dim=-1))


def band_noise(shape, band, g, width=0.1):
    """Noise whose frequencies lie in [band, band + width) of the Nyquist frequency: (B, C, h, w).

    Its mean square is 1, or 0 where a small image has no such frequency. The radius of a frequency (fy, fx), each in
    -1 to 1, is the larger of |fy| and |fx|: the bands tile the plane.
    """
    noise = torch.randn(shape, generator=g)
    fy, fx = (torch.fft.fftfreq(s).abs() * 2 for s in shape[-2:])
    radius = torch.maximum(fy[:, None], fx[None, :])
    end = band + width if band + width < 0.999 else 1.001  # the last band has the Nyquist frequency too
    keep = (radius >= band - 1e-6) & (radius < end - 1e-6)
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * keep).real
    return noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp(min=1e-6)


def shape_or_texture(features, shapes, textures, k=20):
    """What do neighbours share? Of each image's k nearest (cosine, itself aside), those that share its shape but not
    its texture, against those that share its texture but not its shape, each over what chance would give.

    features (n, D); shapes, textures (n,) -> (n,) in 0 (texture alone) to 1 (shape alone); nan where neither is met.
    """
    u = F.normalize(features.float(), dim=-1)
    similar = u @ u.T
    similar.fill_diagonal_(-2)
    near = similar.topk(min(k, len(u) - 1), dim=1)[1]
    shape, texture = shapes[:, None] == shapes, textures[:, None] == textures

    def found(alike):  # of the images that are alike, the share that is among the neighbours
        return alike.gather(1, near).float().sum(dim=1) / alike.float().sum(dim=1).clamp(min=1)

    by_shape, by_texture = found(shape & ~texture), found(texture & ~shape)
    return by_shape / (by_shape + by_texture)  # 0/0: nan


# one checkpoint ------------------------------------------------------------------------------------------------------


def tokens_by_depth(vit, x):
    """Yields the tokens (B, 1+N, D) before the first block and after each, without the final norm."""
    yield (x := vit.embed(x))
    for block in vit.blocks:
        yield (x := block(x))


@torch.no_grad()
def measure_images(vit, images, config, args, device):
    """Everything that is measured image by image: name -> {depth: (images,)}, on the CPU; and the mean spectrum.

    At most one batch of maps and tokens is held. The numbers are kept in lists: small tensors among the large ones
    would fragment memory. Depth 0 is the input of the first block. Tokens are those before the final norm. spectrum:
    log10 of the singular values of an image's tokens over the largest, mean over images, for each depth.
    """
    rows, spectra, grid = {}, [0.0] * (len(vit.blocks) + 1), vit.grid
    encode = lambda x: torch.cat([pooled(t, "mean") for t in tokens_by_depth(vit, x)], dim=1)
    by_image = features(encode, images, config, device, batch=args.batch, workers=args.workers).cpu().double()
    means = by_image.mean(dim=0).float().to(device).split(vit.dim)  # at each depth, the mean token of all images

    def note(depth, **values):
        for name, v in values.items():
            one_each = v.reshape(len(v), -1).mean(dim=1)
            rows.setdefault(name, {}).setdefault(depth, []).extend(one_each.tolist())

    for imgs in stream(images, in_order(images, args.batch), device, args.workers):
        for depth, x in enumerate(tokens_by_depth(vit, prepare(imgs, config))):
            tokens = x[:, 1:].float()
            bins = fourier_log_amplitude(tokens, grid)
            note(depth, fourier=bins[:, -1])
            if bins.shape[1] > 2:  # else the highest frequency is the lowest
                note(depth, fourier_without_dc=bins[:, -1] - bins[:, 1])
            note(depth, within=mean_cosine(tokens), clustered=mean_cosine(tokens - means[depth]))
            s = singular_values(tokens)
            note(depth, rank=effective_rank(s))
            relative = (s / s[:, :1]).clamp(min=1e-6)
            spectra[depth] += relative.log10().sum(dim=0).cpu() / len(images)
            if depth < len(vit.blocks):  # block number depth + 1 attends among these tokens
                block = vit.blocks[depth]
                maps = block.attn.maps(block.norm1(x)).float()
                note(depth + 1, distance=attention_distance(maps, vit.patch, grid), nmi=nmi(maps))
                note(depth + 1, queries=query_similarity(maps))
                if maps.shape[1] > 1:
                    note(depth + 1, heads=head_similarity(maps))
    by_image = {name: {d: torch.tensor(v) for d, v in by_depth.items()} for name, by_depth in rows.items()}
    return by_image, [s.tolist() for s in spectra]


def features_by_depth(vit, images, config, args, device, noise=None):
    """Mean patch token after each block, final norm applied, (n, D); last, the method's feature (n, D or 2D)."""

    def encode(x):
        x = x if noise is None else x + noise(x.shape).to(x)
        layers = vit.layers(x)
        return torch.cat([*(pooled(t, "mean") for t in layers), pooled(layers[-1], config["feature"])], dim=1)

    how = dict(batch=args.batch, workers=args.workers)
    places = [vit.dim * i for i in range(1, len(vit.blocks) + 1)]  # the last may be "both", of twice the width
    return features(encode, images, config, device, **how).tensor_split(places, dim=1)


def measure_encoder(vit, config, sets, args, device):
    """All measurements of one encoder: by image and depth; k-NN (k = 20) and linear probes (SGD, 30 epochs, rate 0.3);
    shape against texture; robustness (noise of 0.5 standard deviations of its input).
    """
    vit = vit.to(device).eval()
    by_image, spectrum = measure_images(vit, sets["test"], config, args, device)
    found = dict(images=by_image, spectrum=spectrum, test=len(sets["test"]))
    train, test = (features_by_depth(vit, sets[s], config, args, device) for s in ("train", "test"))
    found["image_rank"] = [effective_rank(singular_values(t)).item() for t in test]
    if sets["train"].labels is not None:
        y, wanted = sets["train"].labels.to(device), sets["test"].labels.to(device)
        n, found["knn"], found["linear"], found["noise"] = len(y), [], [], {}
        batch, classes = min(256, n), len(sets["train"].classes)
        total = 30 * (n // batch)
        for a, b in zip(train, test, strict=True):
            found["knn"].append(knn(a, y, b, wanted)[20][0])
            pairs = ((a[i], y[i]) for i in batches(n, batch, 0, total, 0))
            norm, weight, bias = train_heads(pairs, total, a.shape[1], classes, [0.3], batch, device)
            found["linear"] += accuracies(norm(b) @ weight + bias, wanted)
        width = 0.2 if args.quick else 0.1
        for band in torch.arange(0, 1, width).tolist():
            g = torch.Generator().manual_seed(0)  # the same noise for every encoder
            noise = lambda shape, band=band, g=g: 0.5 * band_noise(shape, band, g, width)
            noisy = features_by_depth(vit, sets["test"], config, args, device, noise)
            accuracy = knn(train[-1], y, noisy[-1], wanted)[20][0]
            found["noise"][round(band, 2)] = accuracy - found["knn"][-1]
    if "shapes" in sets:
        own = features_by_depth(vit, sets["cue"], config, args, device) if "cue" in sets else test
        shares = [shape_or_texture(t, sets["shapes"].to(device), sets["textures"].to(device)) for t in own]
        found["shape"] = [s[~s.isnan()].cpu() for s in shares]
    return found


# verdicts ------------------------------------------------------------------------------------------------------------


def compare(a, b):
    """Margin of two groups, a less b, and its standard error. A group: (mean, error over images) of each seed.

    A group's squared error: the seeds' mean squared error over images (shared by all seeds), plus the variance over
    seeds divided by their number, if there are several.
    """
    squares = []
    for group in (a, b):
        means, errors = (torch.tensor(t, dtype=torch.float64) for t in zip(*group, strict=True))
        seeds = len(means)
        squares.append(errors.square().mean() + (means.var() / seeds if seeds > 1 else 0.0))
    margin = sum(m for m, _ in a) / len(a) - sum(m for m, _ in b) / len(b)
    return margin, float((squares[0] + squares[1]).sqrt())


def verdict(claim, what, a, b):
    """Is a > b, or a < b, whichever sign stands in `what`, by more than two standard errors?

    a, b: groups, see compare; empty: not measured. An error that is nan, of one image alone: undecided.
    """
    if not a or not b:
        return dict(claim=claim, what=what, verdict="not measured")
    margin, error = compare(a, b)
    as_claimed = margin > 0 if " > " in what else margin < 0
    kind = "undecided" if not abs(margin) > 2 * error else "holds" if as_claimed else "fails"
    means = [sum(m for m, _ in g) / len(g) for g in (a, b)]
    seeds = [len(a), len(b)]
    return dict(claim=claim, what=what, values=means, margin=margin, error=error, seeds=seeds, verdict=kind)


SIDES = dict(dino="cl", mae="mim", pcae="mim")  # what a checkpoint's method says; siameseim and hybrid are both
CLAIMS = (  # number, title, measure, depths (None: a measure of --results), which side is larger or smaller
    (1, "attention distance, later third", "distance", "later", "cl > mim"),
    (2, "NMI, later third", "nmi", "later", "cl < mim"),
    (3, "attention alike across queries, later third", "queries", "later", "cl > mim"),
    (3, "attention alike across heads, later third", "heads", "later", "cl > mim"),
    (4, "token cosine, one image, less mean token, last block", "clustered", "last", "cl > mim"),
    (5, "high against low frequency, all blocks", "fourier", "blocks", "cl < mim"),
    (6, "share of shape in what neighbours have in common", "shape", "last", "cl > mim"),
    (7, "linear probe, first third of blocks", "linear", "first", "cl < mim"),
    (7, "linear probe, last third of blocks", "linear", "later", "cl > mim"),
    (8, "linear probe", "linear", None, "cl > mim"),
    (8, "fine-tuned (the paper: ViT-B and larger)", "finetuned", None, "cl < mim"),
    (9, "linear segmentation, IoU by image (the paper: COCO)", "dense", None, "cl < mim"),
    (10, "linear probe", "linear", None, "hybrid > cl"),
    (10, "linear probe", "linear", None, "hybrid > mim"),
    (10, "fine-tuned", "finetuned", None, "hybrid > cl"),
    (10, "fine-tuned", "finetuned", None, "hybrid > mim"),
)
SHOWN = dict(cl="CL", mim="MIM", hybrid="hybrid")


def some_depths(depths, where):
    """The first or later third of a list by depth, its last entry, or all but the first (the input of block 1)."""
    third = max(1, len(depths) // 3)
    parts = dict(first=depths[:third], later=depths[-third:], last=depths[-1:], blocks=depths[1:])
    return parts[where]


def of_encoder(found, measure, where):
    """A measure of one encoder at some depths: [(mean, standard error)], or [] where it was not measured."""
    if measure == "linear" and "linear" in found:  # over depths; the error is that of a share of the test images
        accuracy = float(np.mean(some_depths(found["linear"][:-1], where)))
        return [(accuracy, accuracy_error(accuracy, found["test"]))]
    if measure == "shape" and "shape" in found:
        values = found["shape"][-1]
    elif measure in found["images"]:
        by_depth = found["images"][measure]
        values = torch.stack([by_depth[d] for d in some_depths(sorted(by_depth), where)]).mean(dim=0)
    else:
        return []
    return [(values.mean().item(), (values.std() / len(values) ** 0.5).item())]


def of_encoders(models, measure, where, sides):
    """A measure of the encoders of each side at some depths: lists of (mean, standard error)."""
    found = {side: [] for side in sides}
    for m in models.values():
        if m["kind"] in found:
            found[m["kind"]] += of_encoder(m["found"], measure, where)
    return list(found.values())


def of_results(results, measure, sides):
    """A measure of linear.py, finetune.py or dense.py for each side: lists of (value, standard error).

    results: (side, JSON). Runs of --scratch and --drop-ratio are left out. Raises InputError where runs on other data,
    labels or epochs would be compared.
    """
    found, runs = {side: [] for side in sides}, set()
    for side, r in results:
        args, scores = r["args"], r["results"]
        if side not in sides or measure not in scores or args.get("scratch") or args.get("drop_ratio"):
            continue
        runs.add((r["data"], args.get("labels"), args.get("epochs")))
        value = scores[measure]
        error = scores.get("error") or math.sqrt(max(1e-9, value * (100 - value)) / scores["test"])
        found[side].append((value, error))
    if len(runs) > 1:
        raise InputError(f"--results: {measure} of several --data, --labels or --epochs cannot be compared")
    return list(found.values())


def verdicts(models, results, files):
    """CLAIMS, checked. models: name -> dict(kind, found). results: JSON of others. files: {file: kind}."""
    side = lambda r: files.get(r["checkpoint"]) or SIDES.get(r["method"]) or r["method"]
    by_side, checked = [(side(r), r) for r in results], []
    for claim, title, measure, where, sides in CLAIMS:
        a, sign, b = sides.split()
        pair = of_encoders(models, measure, where, (a, b)) if where else of_results(by_side, measure, (a, b))
        checked.append(verdict(claim, f"{title}: {SHOWN[a]} {sign} {SHOWN[b]}", *pair))
    return checked


# output --------------------------------------------------------------------------------------------------------------


TITLES = dict(  # of panels: what measure_images measures
    distance="attention distance, px",
    nmi="NMI of query and key",
    queries="attention alike across queries",
    heads="attention alike across heads",
    within="token cosine, one image",
    clustered="token cosine, one image, less mean token",
    fourier="log amplitude, highest - DC",
    fourier_without_dc="log amplitude, highest - lowest",
    rank="effective rank of an image's tokens",
)


def curves(found):
    """Panel title -> the numbers of one model over depth (or over frequency), for the sheet."""

    def mean(name):
        by_depth = found["images"].get(name, {})
        return [(depth, by_depth[depth].mean().item()) for depth in sorted(by_depth)]

    def by_block(name):
        return list(enumerate(found.get(name, [])[:-1], 1))  # the last is the method's own feature

    out = {title: mean(name) for name, title in TITLES.items()}
    out["log10 singular values of tokens, last block"] = list(enumerate(found["spectrum"][-1], 1))
    out["effective rank of images"] = by_block("image_rank")
    out["linear probe, %"], out["k-NN, %"] = by_block("linear"), by_block("knn")
    out["k-NN change under noise, points"] = sorted(found.get("noise", {}).items())
    out["shape share of what neighbours share"] = [(i, v.mean().item()) for i, v in by_block("shape") if len(v)]
    return out


def draw_sheet(models, tables, file, patch, grid):
    """A panel for each measure, a line for each model, from curves(). Grey: uniform attention, attention to itself (on
    this patch size and grid).

    A colour for each method, a dash for each of its models, so that seeds are seen as one.
    """
    from matplotlib.figure import Figure

    styles, seen = {}, {}
    for name, m in models.items():
        seen[m["method"]] = seen.get(m["method"], -1) + 1
        color, dash = list(seen).index(m["method"]), ("-", "--", "-.", ":")[seen[m["method"]] % 4]
        styles[name] = dict(color=f"C{color}", linestyle=dash)
    panels = [p for p in next(iter(tables.values())) if any(curve[p] for curve in tables.values())]
    rows = math.ceil((len(panels) + 1) / 4)  # the last panel is the legend
    figure = Figure((20, 3.6 * rows), layout="constrained")
    tokens = 1 + math.prod(grid)
    farthest = attention_distance(torch.ones(1, 1, tokens, tokens), patch, grid).item()
    marks = {TITLES["distance"]: (farthest, 0.0), TITLES["nmi"]: (0.0, 1.0)}  # uniform attention, attention to itself
    axes = figure.subplots(rows, 4, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        for name, curve in tables.items():
            if curve[panel]:
                ax.plot(*zip(*curve[panel], strict=True), marker="o", markersize=3, label=name, **styles[name])
        if panel in marks:
            ax.axhline(marks[panel][0], color="grey", linestyle=":", label="uniform attention")
            ax.axhline(marks[panel][1], color="grey", linestyle="--", label="attention to itself")
        across = "frequency, Nyquist = 1" if "noise" in panel else "rank" if "singular" in panel else "block"
        ax.set(title=panel, xlabel=across)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    axes[len(panels)].legend(*axes[0].get_legend_handles_labels(), loc="upper left", fontsize="small")
    figure.savefig(file, dpi=70)


@torch.no_grad()
def draw_queries(encoders, imgs, file):
    """Attention maps of two chosen queries of each image: a row for each query, a column for each encoder.

    encoders: name -> (ViT, config). imgs: uint8 (n, C, S, S). Last block, mean over heads; the query is red. Each map
    its own scale.
    """
    from matplotlib.figure import Figure

    queries = [(0.35, 0.35), (0.65, 0.65)]  # y, x as shares of the image
    figure = Figure((1.6 * (1 + len(encoders)), 1.6 * len(queries) * len(imgs)), layout="constrained")
    shape, bare = (len(queries) * len(imgs), 1 + len(encoders)), dict(xticks=[], yticks=[])
    axes = figure.subplots(*shape, squeeze=False, subplot_kw=bare)
    for column, (name, (vit, config)) in enumerate(encoders.items(), 1):
        grid, maps = vit.grid, patches_only(vit.attention(prepare(imgs, config)).float()).mean(dim=1)
        maps = maps.unflatten(1, grid).unflatten(3, grid).cpu().numpy()  # (n, h, w, h, w): query, then key
        axes[0, column].set_title(name, fontsize=8)
        for row, (m, (y, x)) in enumerate((m, q) for m in maps for q in queries):
            y, x = int(y * grid[0]), int(x * grid[1])
            axes[row, column].imshow(m[y, x], cmap="magma")
            axes[row, column].plot(x, y, "s", color="red", markersize=4, fillstyle="none")
    first, channels = next(iter(encoders.values()))[1], imgs.shape[1]
    raw = dict(img_size=first["img_size"], mean=[0.0] * channels, std=[1.0] * channels)
    shown = prepare(imgs, raw).cpu().numpy()  # what the first encoder sees, not normalised
    for row, (img, (y, x)) in enumerate((i, q) for i in shown for q in queries):
        rgb = img if len(img) == 3 else img[[0, 0, 0]]
        height, width = rgb.shape[1:]
        axes[row, 0].imshow(rgb.transpose(1, 2, 0))
        axes[row, 0].plot(x * width, y * height, "s", color="red", markersize=6, fillstyle="none")
    figure.savefig(file, dpi=100)


def plain(x):
    """Tensors, numbers and dicts of them as what JSON can hold: per-image values become [mean, standard error]."""
    if torch.is_tensor(x):
        if len(x) == 1:
            return x.tolist()
        error = x.std() / len(x) ** 0.5
        return [round(x.mean().item(), 6), round(error.item(), 6)]
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [plain(v) for v in x]
    if isinstance(x, float):
        return round(x, 6) if math.isfinite(x) else None
    return x


def load_sets(args, config):
    """Training and test images with labels where there are some, and shape and texture labels where they are known."""
    side, (train, test) = resize_side(config["img_size"]), open_images(args.data)
    if test is None:  # none could be held out: no k-NN and no probe
        train = test = Images(train.items, side=train.side, files=train.files)
    sets = dict(train=train.subset(args.train_images).at(side), test=test.subset(args.limit).at(side))
    if args.cue_conflict:
        files = [f for f in list_images(args.cue_conflict) if "-" in Path(f).stem]
        if not files:
            raise InputError(f"--cue-conflict {args.cue_conflict}: no <shape class>/<shape>-<texture>.png in it")
        number = lambda names: torch.from_numpy(np.unique(names, return_inverse=True)[1])
        textures = number([Path(f).stem.split("-")[-1].rstrip("0123456789") for f in files])
        shapes = number([Path(f).parent.name for f in files])
        sets |= dict(cue=Images(files, side=side), shapes=shapes, textures=textures)
    elif Path(args.data).name == "demo.npz":
        _, shapes = open_images(args.data, label="shapes")
        sets |= dict(shapes=shapes.subset(args.limit).labels, textures=sets["test"].labels)
    return sets


def read_result(file):
    """The last line of an evaluation, as it was printed."""
    with reading(file, "result"):
        result = json.loads(Path(file).read_text().splitlines()[-1])
        if not {"method", "data", "args", "results"} <= result.keys():
            raise InputError(f"--results {file}: its last line is not that of linear.py, finetune.py or dense.py")
        return result


def load_encoders(args):
    """The encoders of args.checkpoints: a list of (file, kind or None, ViT, config)."""
    if not args.checkpoints:
        raise InputError("no checkpoint given; `python dino.py` makes one: runs/dino-demo/last.pt")
    check_folders(args, "json")
    files = [c.rsplit("=", 1) if c.endswith(("=cl", "=mim")) else [c, None] for c in args.checkpoints]
    if len({file for file, _ in files}) < len(files):
        raise InputError("a checkpoint is given twice: it would count as two seeds")
    return [(file, kind, *read_encoder(file, args.heads)) for file, kind in files]


def measure_all(loaded, sets, args, device):
    """Measures every encoder: name -> dict(kind, method, found)."""
    models = {}
    for file, kind, vit, config in loaded:
        if config["in_chans"] != sets["test"].channels:
            raise InputError(f"{file} takes {config['in_chans']} channels, {args.data} has {sets['test'].channels}")
        name = Path(file).stem if Path(file).stem != "last" else Path(file).parent.name
        if name in models or (name == "untrained" and file != "untrained"):
            name = str(file)
        kind = kind or SIDES.get(config.get("method"), "other")
        found = measure_encoder(vit, config, sets, args, device)
        models[name] = dict(kind=kind, method=config.get("method", name), found=found)
    return models


def print_table(tables):
    """Prints each panel's last value, a column for each model."""
    width = {name: max(10, len(name) + 2) for name in tables}

    def line(title, cells):
        print(f"  {title:40}" + "".join(f"{text:>{width[name]}}" for name, text in cells.items()))

    line("last block, or highest band", {name: name for name in tables})
    for panel in (p for p in next(iter(tables.values())) if "singular" not in p):  # its last value says nothing
        row = {name: table[panel] for name, table in tables.items()}
        if any(row.values()):
            line(panel, {name: f"{curve[-1][1]:.3f}" if curve else "-" for name, curve in row.items()})
        elif "lowest" in panel:
            print(f"  {panel}: left out, as so few patches have one frequency besides DC")
        if any(row.values()) and "%" in panel:
            best = {name: max(curve, key=lambda point: point[1])[0] for name, curve in row.items() if curve}
            line("   its best block", best)


def print_claims(claims):
    for c in claims:
        numbers = ""
        if "margin" in c:
            numbers = ": {:.3f} against {:.3f}, ".format(*c["values"])
            numbers += f"margin {c['margin']:.3f} ± {c['error']:.3f}, " + "{} and {} encoders".format(*c["seeds"])
        print(f"  claim {c['claim']:2} {c['verdict']:14} {c['what']}{numbers}")


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv)
    if args.quick:
        args.limit, args.train_images = min(args.limit, 200), min(args.train_images, 500)
    device = launch(args, alone=True)
    loaded, results = load_encoders(args), [read_result(f) for f in args.results]
    _, _, vit, config = loaded[0]
    args.data = args.data or config.get("data", "demo.npz")
    sets = load_sets(args, max((c for *_, c in loaded), key=lambda c: max(c["img_size"])))  # the largest input
    torch.manual_seed(args.seed)
    loaded.append(("untrained", "untrained", ViT(**vit.config), config | dict(method="untrained")))
    models = measure_all(loaded, sets, args, device)
    claims = verdicts(models, results, {file: kind for file, kind, *_ in loaded})
    if len({(*config["img_size"], config["patch"]) for *_, config in loaded}) > 1:  # of grids that differ
        for claim in (c for c in claims if c["claim"] in (1, 2, 5)):
            claim["verdict"] = "not comparable"

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tables = {name: curves(m["found"]) for name, m in models.items()}
    draw_sheet(models, tables, out / "analysis.png", vit.patch, vit.grid)
    encoders = dict(zip(models, ((v, c) for *_, v, c in loaded), strict=True))
    sample = sets["test"].subset(3)
    draw_queries(encoders, next(stream(sample, in_order(sample, 3), device, 0)), out / "queries.png")
    print_table(tables)
    print_claims(claims)
    full = dict(images=len(sets["test"]), models={})
    for name, m in models.items():
        full["models"][name] = plain(m)
    full["claims"] = plain(claims)
    (out / "analysis.json").write_text(json.dumps(full, indent=1))
    summary = dict(out=str(out), images=len(sets["test"]), verdicts=[f"{c['claim']}: {c['verdict']}" for c in claims])
    args.checkpoint = args.checkpoints  # report reads it
    return report("analyze", args, {}, summary) | dict(results=full)


if __name__ == "__main__":
    main()
