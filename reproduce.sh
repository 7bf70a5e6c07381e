#!/usr/bin/env bash
# Trains DINO, MAE, PCAE, SiameseIM and their hybrid for the same time each, evaluates all, and writes the table.
#
#   ./reproduce.sh                                  # CIFAR-10, 60 minutes of training a method; a GPU is what one wants
#   ./reproduce.sh --only mae --minutes 30
#   ./reproduce.sh --data demo.npz --minutes 2 --finetune-epochs 3 -- --size nano     # on a CPU; after --: all trainings
#
# In --out (runs/reproduce): one folder a method, and table.md. The data needs labels. What is done is not done again: to
# go on after a cut, give the same command; for other minutes, another --out. A run's length in epochs follows from its
# speed over a few steps, measured on the machine; the test images are read once for each number of the table. Besides
# training: k-NN, linear probe and fine-tuning.
set -euo pipefail
methods="dino mae pcae siameseim hybrid" minutes=60 data=cifar10 out=runs/reproduce finetune=100 rest=()
while [ $# -gt 0 ]; do
    [ "$1" = -- ] || [ $# -gt 1 ] || set -- help # an option without its value
    case $1 in
    --only) methods=$2 ;; --minutes) minutes=$2 ;; --data) data=$2 ;; --out) out=$2 ;; --finetune-epochs) finetune=$2 ;;
    --) shift; rest=("$@"); break ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; exit 2 ;;
    esac
    shift 2
done
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)

script_of() { case $1 in mae | pcae) echo "mae_pcae.py --method $1" ;; *) echo "$1.py" ;; esac; }

train() { # method, folder, options
    local method=$1 folder=$2; shift 2
    # shellcheck disable=SC2046
    python "$here"/$(script_of "$method") --data "$data" --out "$folder" "$@" ${rest[@]+"${rest[@]}"}
}

json() { # file, command: the last line it prints, kept in the file once it has ended well
    local file=$1; shift
    [ -s "$file" ] || { "$@" | tee "$file.out" >&2 && tail -n 1 "$file.out" >"$file.part" && mv "$file.part" "$file"; }
}

for m in $methods; do
    run=$out/$m
    mkdir -p "$run"
    if [ ! -s "$run/epochs" ]; then # images/s over the last of a few steps say how many epochs fit
        rm -rf "$out/speed-$m"
        train "$m" "$out/speed-$m" --epochs 2 --warmup 0 --steps 40 --log-every 10
        python - "$out/speed-$m/log.jsonl" "$minutes" >"$run/epochs" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
speed = [r["images_per_s"] for r in rows if "images_per_s" in r][-1]
print(max(2, round(float(sys.argv[2]) * 60 * speed / rows[0]["images"])))
PY
        rm -rf "$out/speed-$m"
    fi
    train "$m" "$run" --epochs "$(cat "$run/epochs")"
    json "$run/knn.json" python "$here/eval_knn.py" "$run/last.pt" --precision auto
    json "$run/linear.json" python "$here/eval_linear.py" "$run/last.pt"
    json "$run/finetune.json" python "$here/eval_linear.py" "$run/last.pt" --finetune --epochs "$finetune"
    json "$out/scratch.json" python "$here/eval_linear.py" "$run/last.pt" --finetune --scratch --epochs "$finetune"
done
analysis() { # of all methods, with their read-outs for the claims on them
    local runs=() results=() m
    for m in $methods; do
        runs+=("$out/$m/last.pt") results+=("$out/$m/linear.json" "$out/$m/finetune.json")
    done
    python "$here/analyze.py" "${runs[@]}" --out "$out/analysis" --results "${results[@]}"
}
[ "$(cat "$out/analysis/of" 2>/dev/null)" = "$methods" ] || { analysis && echo "$methods" >"$out/analysis/of"; }

python - "$out" $methods >"$out/table.md" <<'PY'
import json, sys
from pathlib import Path

out, read = Path(sys.argv[1]), lambda f: json.loads(f.read_text())
print("| | epochs | minutes | k-NN, k = 20 | untrained | linear probe | fine-tuned |\n|---|---|---|---|---|---|---|")
near = lambda by_k: by_k[min(by_k, key=lambda k: abs(int(k) - 20))]  # of very small sets, fewer
scratch = read(out / "scratch.json")
pixels = near(read(out / sys.argv[2] / "knn.json")["knn"]["pixels"])
print(f"| raw pixels | | | {pixels:.1f} | | | |")
print(f"| from scratch ({scratch['method']}'s network) | | | | | | {scratch['finetuned']:.1f} |")
for m in sys.argv[2:]:
    knn, rows = read(out / m / "knn.json"), [json.loads(line) for line in (out / m / "log.jsonl").open()]
    minutes, epochs = max(row.get("seconds", 0) for row in rows) / 60, (out / m / "epochs").read_text().strip()
    found = [near(knn["knn"][row]) for row in (knn["feature"], "untrained")]
    found += [read(out / m / "linear.json")["linear"], read(out / m / "finetune.json")["finetuned"]]
    print(f"| {m} | {epochs} | {minutes:.0f} | " + " | ".join(f"{v:.1f}" for v in found) + " |")
PY
cat "$out/table.md"
