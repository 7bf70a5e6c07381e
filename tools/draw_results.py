"""Draws k-NN while training of several runs, over images seen and over minutes.

    python tools/draw_results.py OUT.png LABEL=RUN/log.jsonl ...

Minutes follow from a run's median speed, so that what ran beside it does not count.
"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(out, *runs):
    figure = Figure((10, 3.6), layout="constrained")
    by_images, by_minutes = figure.subplots(1, 2, sharey=True)
    for label, file in (run.split("=", 1) for run in runs):
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        batch = rows[0]["args"]["batch"]
        speed = statistics.median(r["images_per_s"] for r in rows if "images_per_s" in r)
        steps, accuracy = zip(*((r["step"], r["knn"]) for r in rows if r.get("knn") is not None), strict=True)
        images = [step * batch for step in steps]
        by_images.plot([n / 1e6 for n in images], accuracy, marker=".", label=label)
        by_minutes.plot([n / speed / 60 for n in images], accuracy, marker=".", label=label)
    by_images.set(xlabel="images seen, million", ylabel="k-NN while training, %")
    by_minutes.set(xlabel="minutes of one core")
    for axes in (by_images, by_minutes):
        axes.axhline(rows[1]["knn_pixels"], color="grey", linestyle=":", label="raw pixels")
    by_minutes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
