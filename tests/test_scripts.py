"""What holds for all scripts: parts can be copied alone, options and docs are true, wrong input is named."""

import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench
import dino
import embed
import hybrid
import mae_pcae
import siameseim
import vit
from conftest import MAIN, ROOT, dino_fast, encoder, environment, fails, tiny

TOOLS = [ROOT / f"tools/{name}.py" for name in ("bench", "convert", "draw", "embed")]
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py"), *TOOLS])
METHODS = [ROOT / f for f in ("dino.py", "mae_pcae.py", "siameseim.py")]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_all_that_is_long_has_a_docstring(file):
    parts = [n for n in ast.parse(file.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert all(ast.get_docstring(n) or len(n.body) < 12 for n in parts if n.name != "main")


@pytest.mark.parametrize("file", METHODS, ids=lambda f: f.name)
def test_a_method_imports_vit_alone(file):
    nodes = list(ast.walk(ast.parse(file.read_text())))  # also those inside of functions
    imports = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    imports |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    assert imports & {f.stem for f in FILES} == {"vit"}


def section(number):
    return re.split(r"^# \d [a-z ]+ -{20,}$", (ROOT / "vit.py").read_text(), flags=re.M)[number]


def run_alone(*code):
    """Runs code with the imports that the docstring of vit.py names, and nothing else of ours."""
    scope = {"__name__": "copied"}
    imports = "import math, torch; import torch.nn.functional as F; from einops import rearrange; from torch import nn"
    exec("\n".join([imports, *code]), scope)
    return scope


def test_the_network_can_be_copied_alone():
    """Section 1 of vit.py gives the same numbers and refuses the same input."""
    alone, x = run_alone(section(1)), torch.randn(2, 3, 16, 24)
    for pos in ("learned", "sincos"):
        nets = []
        for make in (alone["ViT"], vit.ViT):
            torch.manual_seed(0)
            nets.append(make(16, 4, pos=pos, **vit.SIZES["test"]).eval())
        assert torch.equal(*(net(x) for net in nets)) and torch.equal(*(net.cls(x) for net in nets))
    for wrong in (dict(img_size=15), dict(heads=3), dict(dim=6, heads=1, pos="sincos")):
        with pytest.raises(alone["InputError"]):
            alone["ViT"](**dict(img_size=16, patch=4, dim=32, depth=1, heads=2) | wrong)


def test_dino_s_views_head_and_loss_can_be_copied_alone():
    """The views with section 2 of vit.py, the head and the loss with nothing."""
    views = run_alone(section(2), *map(inspect.getsource, (dino.sample_views, dino.augment)))
    how = (4, 2, 16, (0.4, 1.0), [1.0, 0.1], [0.0, 0.2], 1.0)
    generator = lambda: torch.Generator().manual_seed(3)
    imgs = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    crops = lambda m: m["augment"](imgs, m["sample_views"](*how, generator()), 8, 0.1, 0.5, 0.2)
    assert torch.equal(crops(views), crops(vars(dino)))
    alone = run_alone(*map(inspect.getsource, (dino.DINOHead, dino.dino_loss)))
    torch.manual_seed(0)
    out = alone["DINOHead"](8, 16)(torch.randn(10, 8)).unflatten(0, (5, 2))
    loss = lambda m: m["dino_loss"](out, out[:2], torch.zeros(16))[0]
    assert torch.equal(loss(alone), loss(vars(dino)))


def understood(command, npz):
    """Raises SystemExit where a script does not know an option of a command."""
    words = shlex.split(command.split(";")[-1])
    script = next(w for w in words if w.endswith(".py"))
    if "--help" in words:
        return
    argv = [npz if w in ("photos/", "imagenet/") else w for w in words[words.index(script) + 1 :]]
    module = importlib.import_module(Path(script).stem)
    if script.endswith("bench.py"):
        rows = argv[1 : next((i for i, w in enumerate(argv) if w.startswith("--") and i), None)] or ["dino"]
        for row in rows:
            module.run_args(row, [w for w in argv if w not in rows and w != "--rows"])
    else:
        vit.options("", module.OPTIONS, argv)


@pytest.mark.parametrize("file", ["README.md", *(str(f.relative_to(ROOT)) for f in FILES)])
def test_commands_in_docstrings_and_the_readme_are_understood(file, npz):
    text = (ROOT / file).read_text()
    text = text if file == "README.md" else ast.get_docstring(ast.parse(text))
    found = [line.split("  #")[0] for line in re.findall(r"^ *((?:python|torchrun \S+) [\w/]+\.py.*)", text, re.M)]
    assert len(found) >= {"README.md": 3, "vit.py": 0, "hubconf.py": 0}.get(file, 1)
    for command in found:
        understood(command, npz)


def test_the_snippet_in_the_readme_runs():
    code, neighbours = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[:2]
    for folder in ("weights", "examples/images"):
        os.makedirs(folder)
    encoder("weights/dino-cifar10.pt")
    for i in range(7):
        Image.radial_gradient("L").rotate(30 * i).save(f"examples/images/{i}.jpg")
    Path("examples/images/3.jpg").write_bytes(b"broken")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), dict(__name__="__main__"))
        embed.main(["weights/dino-cifar10.pt", "examples/images", "--device", "cpu"])
        exec(compile(neighbours, "README.md", "exec"), {})
    assert "torch.Size([6, 32])" in out.getvalue() and "['examples/images/0.jpg' " in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_the_snippet_in_the_readme_runs_where_processes_import_it_again(method):
    """On Windows and macOS, and with images too many for memory."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    os.makedirs("weights")
    encoder("weights/dino-cifar10.pt")
    pictures_of(5, "examples/images")
    begin = f"import multiprocessing\nif __name__ == '__main__':\n    multiprocessing.set_start_method('{method}')\n"
    Path("snippet.py").write_text(f"{begin}import vit\nvit.IN_MEMORY = 0\n{code}")
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "snippet.py"], env=env, capture_output=True, text=True, timeout=120)
    assert "torch.Size([5, 32])" in done.stdout, done.stderr[-2000:]


def pictures_of(n, folder):
    os.makedirs(folder)
    for i in range(n):
        Image.radial_gradient("L").rotate(30 * i).save(f"{folder}/{i}.jpg")


@pytest.mark.parametrize("part", [2, 1000])
def test_embed_names_the_file_of_each_vector(part, monkeypatch):
    net, config = encoder("x.pt", feature="mean")
    pictures_of(7, "photos/2024")
    for i in (2, 3):
        Path(f"photos/2024/{i}.jpg").write_bytes(b"broken")
    monkeypatch.setattr(embed, "PART", part)  # with 2 one part has nothing that can be read
    embed.main(["x.pt", "photos", "--device", "cpu", "--precision", "fp32", "--layers", "2", "--feature", "both"])
    found = np.load("vectors.npz")
    assert found["files"].tolist() == [f"photos/2024/{i}.jpg" for i in (0, 1, 4, 5, 6)]
    assert found["unreadable"].tolist() == [f"photos/2024/{i}.jpg" for i in (2, 3)]
    assert found["vectors"].dtype == np.float32 and found["vectors"].shape == (5, 128)
    with torch.no_grad():
        for vector, file in zip(found["vectors"], found["files"], strict=True):
            x = vit.prepare(vit.square(vit.decode(file, 16))[None], config)
            expected = [vit.pooled(tokens, "both") for tokens in net.layers(x)]
            torch.testing.assert_close(torch.from_numpy(vector), torch.cat(expected, 1)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["import vit\n{load}", "{load}\nimport vit"])
def test_the_hub_from_a_project_that_has_a_vit_of_its_own(order):
    Path("vit.py").write_text("class Mine: pass")
    load = f"import torch\nnet, config = torch.hub.load({str(ROOT)!r}, 'dino_cifar10', source='local')"
    Path("project.py").write_text(order.format(load=load) + "\nvit.Mine, net.blocks")
    done = subprocess.run([sys.executable, "project.py"], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


def test_json_has_no_nan():
    row = dict(a=[1.5, float("nan")], b={1: float("inf"), "c": (True, None, "x")})
    assert json.loads(vit.to_json(row)) == {"a": [1.5, None], "b": {"1": None, "c": [True, None, "x"]}}


@pytest.mark.parametrize("file", [f for f in FILES if f.stem not in ("vit", "hubconf")], ids=lambda f: f.name)
def test_help_needs_no_network_and_no_data(file, capsys):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(file.stem).main(["--help"])
    assert stop.value.code == 0 and "options:" in capsys.readouterr().out


OTHERS = {*TOOLS, ROOT / "vit.py", ROOT / "hubconf.py"}
TABLES = [importlib.import_module(f.stem).OPTIONS for f in FILES if f not in OTHERS]
OWN_MEANING = {"out", "drop_path", "momentum", "clip", "weight_decay", "crop_scale", "mask_ratio", "epochs", "batch"}
OWN_MEANING |= {"checkpoint", "data", "train", "lr", "limit", "seed", "img_size", "decoder_dim", "decoder_heads"}
OWN_MEANING |= {"precision", "labels", "test", "results"}


def test_options_of_one_name_have_one_meaning():
    """Where two scripts have an option of one name, its help is the same; OWN_MEANING lists those that say more."""
    seen = {}
    for table in TABLES:
        for name, (_, text, *_) in table.items():
            seen.setdefault(name, set()).add(text)
    assert {name for name, texts in seen.items() if len(texts) > 1} <= OWN_MEANING
    assert sum(len(t) for t in TABLES) > 150 and len(dino.OPTIONS) <= 36  # not too many to read


WRONG = {  # a script or method with its options, and words of the one line that it answers
    "eval_knn x.pt --data bare.npz": "bare.npz cannot be tested on: this needs two class folders",
    "eval_knn wide.pt": "takes [16, 8] px, but images are cut square",
    "dense x.pt --data foreground": "store the foreground as 1",
    "dino --img-size 16 8": "unrecognized arguments: 8",
    "dino --teacher-temp 0.02 0.04 0.07": "give one temperature above 0, or the first",
    "dino --ablate no-momentum --momentum 0.5": "--ablate no-momentum sets --momentum 0.0: leave",
    "siameseim --ablate no-color --blur 1 1": "--ablate no-color sets --blur",
    "eval_knn x.pt --temperature 0": "not above 0",
    "eval_knn x.pt --hits nowhere/f.npz": "no such folder",
    "eval_knn x.pt --img-size 15": "not a multiple of the patch size, 4",
    "eval_knn x.pt --data bands.npz": "takes 3 channels, bands.npz has 2",
    "linear x.pt --labels 0": "--labels and --rates must be above 0",
    "finetune x.pt --drop-path 1": "--drop-path and --smoothing below 1",
    "finetune x.pt --seed -1": "--seed and --mixup must be 0 or more",
    "finetune x.pt --batch 1": "--batch 1 of 64 training images is too few",
    "finetune x.pt --batch 16 --lr 1e5 --epochs 3": "lower --lr",
    "linear x.pt --batch 1": "BatchNorm needs two in a batch",
    "linear x.pt --rates 0": "--labels and --rates must be above 0",
    "dino --clip -1": "argument --clip: must be 0 or more",
    "finetune x.pt --crop-scale 5 9": "--crop-scale must be two shares of the image",
    "linear x.pt --layers 9": "this encoder has 2 blocks",
    "linear x.pt --data nowhere": "no such .npz file or folder",
    "dense x.pt --data tiny.npz": "no folder with images/ and masks/",
    "dense x.pt --data empty": "has a mask of the same folder and name",
    "dense x.pt --train voc": "--train and --test: give both",
    "dense x.pt --limit 0": "--limit must be 2 or more",
    "analyze x.pt --data x": "no such",
    "draw x.pt text.jpg": "text.jpg is not a readable image",
    "draw nowhere.pt x.jpg": "no checkpoint at nowhere.pt",
    "embed x.pt nowhere": "no images in nowhere",
    "embed five.pt .": "images have 3 channels, but the network takes 5",
    "embed x.pt . --out nowhere/v.npz": "--out nowhere/v.npz: no such folder",
    "draw five.pt x.jpg": "3 channels, but the network takes 5",
    "pcae --keep 0": "would keep no token",
    "pcae --stages 9": "blocks are numbered 0 to 1",
    "mae --decoder-dim 16 --decoder-heads 3": "cannot be divided among 3 attention heads",
    "mae --decoder-dim 18 --decoder-heads 3": "is not a multiple of 4",
    "siameseim --mask-ratio 1": "leaves none of 16 patches",
    "hybrid --mask-ratio 0": "leaves all or none of",
    "hybrid --ablate mse": "unrecognized arguments: --ablate",
}
WRONG |= {f"pcae --mask-ratio {ratio}": "leaves all or none of 16 patches" for ratio in (0, 0.99, 1)}
for command in ("dense x.pt --mass 7", "pcae --keep 2", "siameseim --mask-ratio -1", "hybrid --weight 2"):
    WRONG[command] = f"argument {command.split()[-2]}: must be between 0 and 1"
for command in ("eval_knn x.pt --k 0", "analyze x.pt --limit 0", "analyze x.pt --batch 0"):
    WRONG[command] = f"argument {command.split()[-2]}: must be 1 or more"
for name in ("eval_knn", "linear", "finetune", "dense", "analyze"):
    WRONG[name] = "no checkpoint given; `python dino.py` makes one"
    WRONG[f"{name} nowhere.pt"] = "no checkpoint at nowhere.pt"


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input(npz, capsys, command):
    encoder("x.pt", data=npz)
    encoder("five.pt", channels=5)
    Image.radial_gradient("L").save("x.jpg")
    Path("text.jpg").write_text("no picture")
    os.makedirs("empty/images"), os.makedirs("empty/masks")
    wide = vit.ViT([16, 8], 4, **vit.SIZES["test"])
    config = dict(wide.config, mean=[0.5] * 3, std=[0.2] * 3, feature="cls", data=npz)
    torch.save(dict(encoder=wide.state_dict(), config=config), "wide.pt")
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        os.makedirs(f"foreground/{kind}")
        for i in range(3):
            Image.new("L", (16, 16), 255 * (i % 2)).convert(mode).save(f"foreground/{kind}/{i}.png")
    with np.load(npz) as z:
        np.savez("bare.npz", images=z["train_images"])
        np.savez("bands.npz", images=z["train_images"][..., :2], labels=z["train_labels"])
    name, *argv = command.split()
    main = MAIN.get(name) or importlib.import_module(name).main
    argv = tiny(*argv, method=name) if name in MAIN else argv
    assert WRONG[command] in fails(main, argv, capsys)


@dino_fast
def test_bench_measures_a_small_step(method, capsys):
    options = ["--size", "test", "--patch", "8", "--batch", "4", "--precision", "fp32", "--steps", "1", "--turns", "1"]
    heads = "--prototypes 64 --hidden 32 --local-crops 2"
    decoder = "--decoder-dim 16 --decoder-depth 1 --decoder-heads 2"
    own = dict(dino=heads, siameseim="--decoder-dim 16 --decoder-heads 2", hybrid=f"{heads} {decoder}")
    row = f"{method} {own.get(method, decoder)}"
    result = bench.main(["--rows", row, row + " --seed 1", *options])["rows"]
    first, last = result.values()
    assert first["images_per_s"] > 0 and 0 < first["gmacs"] < 1 and 0 < first["mfu"] < 1
    assert first["speed"] == pytest.approx(first["images_per_s"] / last["images_per_s"], rel=1e-3)
    assert first["phases_ms"].keys() == set(bench.PHASES)
    busy = {k for k, v in first["phases_ms"].items() if v > 0}
    assert busy >= {"data", "augment", "forward", "backward", "optimiser"}, "a phase's function is called otherwise now"
    assert ("ema" in busy) == (method != "mae")


def test_tests_that_the_docs_name_are_there():
    text = "".join((ROOT / f).read_text() for f in ("docs/users.md", "docs/trust.md", "CONTRIBUTING.md"))
    here = "".join(f.read_text() for f in (ROOT / "tests").glob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 25 and all(f"def {name}(" in here for name in named)
    assert all((ROOT / "tests" / name).exists() for name in re.findall(r"`(test_\w+\.py)`", text))


SHARED = "options launch load_data manual_seed start_from adamw step_memory describe resume encoder_config Log Monitor "
SHARED += (
    "before distribute compile steps schedules shard sample_step train_step due step when_due save_due save result"
)


@pytest.mark.parametrize("module", [mae_pcae, siameseim, hybrid])
def test_mains_do_the_same_in_the_same_order(module):
    """They are repeated on purpose: what is shared is called in dino.py's order."""
    found = lambda m: dict.fromkeys(c for c in re.findall(r"(\w+)\(", inspect.getsource(m.main)) if c in SHARED.split())
    assert [*found(module)] == [*found(dino)] and found(dino).keys() == set(SHARED.split())
    assert len(inspect.getsource(module.main).splitlines()) <= 55


def test_byol_s_recipe_is_the_same_in_both_scripts():
    recipe = lambda m: inspect.getsource(m.augment).partition("if x.shape[1] == 3:")[2]
    assert recipe(dino) == recipe(siameseim) != ""
