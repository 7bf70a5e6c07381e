#!/usr/bin/env bash
# Trains DINO, MAE, PCAE, SiameseIM and their hybrid, evaluates all, and writes the table.
#
#   ./reproduce.sh                                  # CIFAR-10, 60 minutes of training a method; meant for a GPU
#   ./reproduce.sh --only mae --minutes 30 --seeds 3
#   ./reproduce.sh --cpu --data cifar10             # a small network on two CPU cores, about three hours in all
#   ./reproduce.sh --cpu --data demo.npz --seeds 3 --minutes 0  # 0: as many epochs as the preset has
#   ./reproduce.sh --only dino -- --size nano                   # after --: for all trainings
#
# In --out (runs/reproduce): one folder a method and seed, and table.md, written again after every one. The data needs
# labels. What is done is not done again: to resume after a cut, give the same command; for other minutes, another --out.
# The length of a run in epochs follows from its speed over a few steps on this machine. Minutes are of training: k-NN
# during training and saving are counted, start-up and the evaluations after it are not. --cpu: two trainings at a time,
# each on one core (faster than two processes for one training), DINO 100 minutes, the others 38. --finetune-epochs: 100
# on a GPU, 5 without.
set -euo pipefail
python=$(command -v python || command -v python3)
given=("$@")
methods="dino mae pcae siameseim hybrid" minutes= data=cifar10 out=runs/reproduce
seeds=1 finetune= cpu= at_once=1 rest=()
while [ $# -gt 0 ]; do
    [ "$1" = --cpu ] && { cpu=1 at_once=2; shift; continue; }
    [ "$1" = -- ] || [ $# -gt 1 ] || set -- help # an option without its value
    case $1 in
    --only) methods=$2 ;; --minutes) minutes=$2 ;; --data) data=$2 ;; --out) out=$2 ;; --finetune-epochs) finetune=$2 ;;
    --seeds) seeds=$2 ;; --) shift; rest=("$@"); break ;;
    *) sed -n '2,/^set/p' "$0" | grep '^#' | cut -c3-; exit 2 ;;
    esac
    shift 2
done
finetune=${finetune:-$("$python" -c "import torch; print(100 if torch.cuda.is_available() and not '$cpu' else 5)")}
mkdir -p "$out"
here=$(cd "$(dirname "$0")" && pwd)
[ -z "$cpu" ] || export OMP_NUM_THREADS=1

script_of() { case $1 in mae | pcae) echo "mae_pcae.py --method $1" ;; *) echo "$1.py" ;; esac; }

recipe() { # what --cpu gives a method, for images of 32 px; the preset of demo.npz is meant for a CPU
    case $data in *demo.npz) return ;; esac
    local decoder="--decoder-dim 64 --decoder-depth 2 --decoder-heads 4"
    local dino="--hidden 512 --prototypes 1024 --lr 2e-3 --warmup 1 --momentum .98 --drop-path 0"
    echo --preset 32 --size nano --batch 128
    case $1 in
    dino) echo --patch 8 $dino --local-crops 4 ;;
    mae) echo $decoder --lr 4e-3 --warmup 2 ;;
    pcae) echo $decoder --lr 1e-3 --warmup 2 --momentum .9995 ;;
    siameseim) echo $decoder --lr 2e-3 --warmup 1 --projector-depth 1 --neg-weight .24 ;;
    hybrid) echo --patch 8 --mask-ratio .5 $decoder $dino --local-crops 0 --global-scale .14 1 ;;
    esac
}

train() { # method, folder, options
    local method=$1 folder=$2; shift 2
    # shellcheck disable=SC2046
    "$python" "$here"/$(script_of "$method") --data "$data" --out "$folder" ${cpu:+--device cpu $(recipe "$method")} \
        "$@" ${rest[@]+"${rest[@]}"}
}

epochs_that_fit() { # method: from the images/s over a few steps
    local limit=${minutes:-60}
    [ -z "$cpu" ] || case $1 in dino) limit=${minutes:-100} ;; *) limit=${minutes:-38} ;; esac
    rm -rf "$out/speed"
    train "$1" "$out/speed" --epochs 2 --warmup 0 --steps 100 >&2
    "$python" - "$out/speed/log.jsonl" "$limit" <<'PY'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
speed = statistics.median(row["images_per_s"] for row in rows if "images_per_s" in row)
print(max(2, round(float(sys.argv[2]) * 60 * speed / rows[0]["images"])))
PY
    rm -rf "$out/speed"
}

json() { # file, command: the last line it prints, kept in the file once it has ended well
    local file=$1; shift
    [ -s "$file" ] || { "$@" ${cpu:+--device cpu} --json "$file.part" >&2 && mv "$file.part" "$file"; }
}

decay() { case $data in *demo.npz) echo --layer-decay 1 ;; esac } # so few steps, with decay, do not move the first blocks

finetune() { # folder, where to write, options
    local run=$1 to=$2; shift 2
    json "$to.json" "$python" "$here/evaluation/finetune.py" "$run/last.pt" --epochs "$finetune" --out "$to" \
        ${cpu:+--batch 64 --mixup 0 --drop-path 0 $(decay)} "$@"
}

shape_of() { # the side of a patch, and the token that is read
    local patch token
    patch=$(sed -n '1s/.*"patch": \([0-9]*\).*/\1/p' "$out/$1-0/log.jsonl")
    token=$(sed -n 's/.*"feature": "\([a-z]*\)".*/\1/p' "$out/$1-0/knn.json")
    echo "$patch-$token"
}

one() { # method, seed
    local run=$out/$1-$2 epochs=
    mkdir -p "$run"
    [ "$minutes" = 0 ] || epochs=$(cat "$out/$1.epochs")
    train "$1" "$run" ${epochs:+--epochs "$epochs"} --seed "$2"
    json "$run/knn.json" "$python" "$here/eval_knn.py" "$run/last.pt" --precision auto
    json "$run/linear.json" "$python" "$here/evaluation/linear.py" "$run/last.pt"
    finetune "$run" "$run/finetune"
    table
}

scratch() { finetune "$out/$1-0" "$out/scratch-$(shape_of "$1")" --scratch; } # a network of the same shape

several() { # lines that call a function above: runs them, --cpu two at a time
    printf '%s\n' "$@" | xargs -P "$at_once" -I{} env REPRODUCE_JOB={} bash "$0" ${given[@]+"${given[@]}"}
}

table() { # of what is there so far
    "$python" - "$out" >"$out/table.$$" <<'PY'
import json, statistics, sys
from pathlib import Path

out, read = Path(sys.argv[1]), lambda file: json.loads(file.read_text())["results"]
near = lambda by_k: by_k[min(by_k, key=lambda k: abs(int(k) - 20))]  # of very small sets, fewer
done = {}
for method in ("dino", "mae", "pcae", "siameseim", "hybrid"):
    for run in (file.parent for file in sorted(out.glob(f"{method}-*/knn.json"))):
        if all((run / f"{name}.json").exists() for name in ("linear", "finetune")):
            done.setdefault(method, []).append(run)

def cell(values):
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""

head = "| | seeds | epochs | minutes | k-NN, k = 20 | untrained | linear probe | fine-tuned | from scratch |"
print(head + "\n" + "|---" * 9 + "|")
first = next(iter(done.values()))[0]
print(f"| raw pixels | | | | {near(read(first / 'knn.json')['pixels']):.1f} | | | | |")
for method, runs in done.items():
    knn = [read(run / "knn.json") for run in runs]
    rows = [[json.loads(line) for line in (run / "log.jsonl").open()] for run in runs]
    minutes = [max(row.get("seconds", 0) for row in log) / 60 for log in rows]
    args = rows[0][0]["args"]
    shape = f"{args['patch']}-{knn[0]['feature']}"
    scratch = [read(file)["finetuned"] for file in out.glob(f"scratch-{shape}.json")]
    columns = [[near(r[r["feature"]]) for r in knn], [near(r["untrained"]) for r in knn]]
    for name, key in (("linear", "linear"), ("finetune", "finetuned")):
        columns.append([read(run / f"{name}.json")[key] for run in runs])
    cells = [method, len(runs), args["epochs"], f"{statistics.mean(minutes):.1f}", *map(cell, [*columns, scratch])]
    print("| " + " | ".join(map(str, cells)) + " |")
PY
    mv "$out/table.$$" "$out/table.md"
}

if [ "${REPRODUCE_JOB:-}" ]; then # one of those that `several` starts; sed outlives Ctrl-C, so that the last lines are seen
    $REPRODUCE_JOB 2>&1 | (trap '' INT; exec sed "s|^|$REPRODUCE_JOB: |")
    exit
fi
runs=() results=() jobs=() scratch=() shapes=" "
for m in $methods; do
    [ "$minutes" = 0 ] || [ -s "$out/$m.epochs" ] || epochs_that_fit "$m" >"$out/$m.epochs"
    for seed in $(seq 0 $((seeds - 1))); do
        jobs+=("one $m $seed")
        runs+=("$out/$m-$seed/last.pt") results+=("$out/$m-$seed/linear.json" "$out/$m-$seed/finetune.json")
    done
done
several "${jobs[@]}"
for m in $methods; do
    shape=$(shape_of "$m")
    case $shapes in *" $shape "*) ;; *) scratch+=("scratch $m") shapes+="$shape " ;; esac
done
several "${scratch[@]}"
table
json "$out/analysis.json" "$python" "$here/evaluation/analyze.py" "${runs[@]}" --out "$out/analysis" --results "${results[@]}"
cat "$out/table.md"
