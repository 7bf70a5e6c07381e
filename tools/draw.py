"""Pictures of your own image files from any checkpoint: where attention goes, and what a decoder reconstructs.

    python tools/draw.py runs/dino-demo/last.pt cat.jpg dog.png        # writes runs/dino-demo/attention-cat.png, ...
    python tools/draw.py runs/mae-demo/last.pt cat.jpg --out pictures  # and reconstruction-cat.png: it has a decoder
    python tools/draw.py dino_deitsmall16_pretrain.pth cat.jpg         # the authors' weights
    python tools/draw.py weights/dino-cifar10.pt cat.jpg --img-size 480    # attention of the image at another size

attention: for each head, where the CLS token attends in the last block, then the patches that hold 60 % of it.
reconstruction: of MAE and the hybrid, what is visible, what the network makes of it, the image. Of PCAE, tokens: the
image, what the student and the teacher see, and the tokens left after each stage.
"""

import sys
from argparse import Namespace
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dino
import hybrid
import mae_pcae
from tools.convert import HARMLESS, read_encoder

# isort: off
from vit import InputError, ViT  # 1 network
from vit import decode, mean_and_std, prepare, reading, resize_side, square  # 4 images
from vit import attention_mask, save_grid  # 5 evaluation
from vit import load_checkpoint  # 6 checkpoints
from vit import COUNT, DEVICE, cli, launch, options, vit_kwargs  # 7 runs

OPTIONS = dict(
    checkpoint=(None, "last.pt of a run, a file of weights/, the authors' or timm's", dict(flag="checkpoint")),
    files=(None, "image files", dict(flag="files", nargs="+")),
    out=(None, "folder for the pictures (that of the checkpoint)"),
    img_size=(None, "side of the image for attention, px; positions are interpolated (the network's)", COUNT),
    heads=(None, "attention heads, for files of others, which do not tell", dict(type=int)),
    device=DEVICE,
)
NETWORKS = dict(mae=mae_pcae.MAE, pcae=mae_pcae.PCAE, hybrid=hybrid.Hybrid)  # these have a decoder


def load_network(file, config, device):
    """The whole network of a run with a decoder, or None: other methods, and files with an encoder alone."""
    state = load_checkpoint(file, HARMLESS)
    if config.get("method") not in NETWORKS or "net" not in state:
        return None
    with reading(file, "run"):
        args = Namespace(**state["options"])
        net = NETWORKS[args.method](vit_kwargs(args, config["in_chans"]), args, config["mean"], config["std"])
        net.load_state_dict(state["net"])
    net = net.to(device).eval()
    return net.mae if args.method == "hybrid" else net


def read_square(file, config, device):
    """The middle square of an image file as input of a network of 3 channels or 1: (1, C, h, w)."""
    img = square(decode(file, resize_side(config["img_size"])))[None]
    if config["in_chans"] not in (1, 3):
        raise InputError(f"{file} is an image of 3 channels, but the network takes {config['in_chans']}")
    img = img if config["in_chans"] == 3 else img.float().mean(dim=1, keepdim=True).round().byte()
    return prepare(img.to(device), config)


def masked_columns(maps, image):
    """The patches that hold 60 % of each head's attention, maps (B, H, h/P, w/P); the rest of the image is dark."""
    kept = attention_mask(maps.flatten(2)).float().view_as(maps)
    shown = image[:, None] * (0.15 + 0.85 * F.interpolate(kept, size=image.shape[-2:])[:, :, None])
    return {f"head {i}: 60 %": column for i, column in enumerate(shown.unbind(1), 1)}


@cli
def main(argv=None):
    args = options(__doc__, OPTIONS, argv, precision="fp32")
    device = launch(args)
    vit, config = read_encoder(args.checkpoint, args.heads)
    vit, net = vit.to(device), load_network(args.checkpoint, config, device)
    mean, std = mean_and_std(config, device)
    size = [args.img_size] * 2 if args.img_size else config["img_size"]
    ViT.grid_of(size, vit.patch)  # refuses a size that patches do not divide
    out = Path(args.out or Path(args.checkpoint).parent)
    out.mkdir(parents=True, exist_ok=True)
    kind, written = "tokens" if config.get("method") == "pcae" else "reconstruction", []
    for name in args.files:
        x = read_square(name, config | dict(img_size=size), device)
        written.append(out / f"attention-{Path(name).stem}.png")
        maps, image = dino.cls_attention(vit, x), x * std + mean
        columns = dino.attention_columns(maps, image) | masked_columns(maps, image)
        save_grid(columns, written[-1], args.img_size or 96)
        if net:
            written.append(out / f"{kind}-{Path(name).stem}.png")
            mae_pcae.draw(net, read_square(name, config, device), written[-1])
    print("\n".join(map(str, written)))
    return written


if __name__ == "__main__":
    main()
