"""Draws curves of several runs into one picture. `python tools/draw_results.py OUT.png KEY,KEY,... RUN_FOLDER...`"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(out, keys, *folders):
    keys = keys.split(",")
    figure = Figure((4 * len(keys), 3.4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        for folder in folders:
            rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
            points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=Path(folder).name)
        axes.set(xlabel="step", title=key)
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
