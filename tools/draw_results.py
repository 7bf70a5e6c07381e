"""Draws curves of several runs into one picture, over steps or over minutes of training.

python tools/draw_results.py OUT.png KEY,KEY,... [--minutes] RUN_FOLDER...
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def main(out, keys, *folders):
    keys, over = keys.split(","), "minutes" if "--minutes" in folders else "step"
    folders = [folder for folder in folders if folder != "--minutes"]
    figure = Figure((max(6, 4 * len(keys)), 3.4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for folder in folders:
            rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
            x, y = zip(*((r["step"], r[key]) for r in rows if r.get(key) is not None), strict=True)
            if over == "minutes":  # of k-NN only the step is logged
                steps, seconds = zip(*((r["step"], r["seconds"]) for r in rows if "seconds" in r), strict=True)
                x = np.interp(x, steps, seconds) / 60
            axes.plot(x, y, marker="." if len(y) < 30 else "", label=Path(folder).name)
        axes.set(xlabel=over, title=key)
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
