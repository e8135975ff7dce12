#!/bin/sh
# The paper's figures from nothing: data, weights, runs, tables (docs/paper.md). Needs a GPU of 40 GB (of 24 with
# GPUS=1), 150 GB of disk and a network. Ends at the first error; started again it goes on with what is missing.
#   sh examples/paper.sh [FOLDER OF THE DATA SETS]
# To see first what it would cost: DRY_RUN=1 sh examples/paper.sh
set -eu
export ATM_FL_DATA="${1:-${ATM_FL_DATA:-/data}}"
DEVICE="${DEVICE:-A100}"    # of the dry run: the GPU that hours are reckoned for
GPUS="${GPUS:-0.5}"         # of one client: two at a time

run() {
    if [ -n "${DRY_RUN:-}" ]; then
        atm-fl run "$@" --dry-run --device-name "$DEVICE"
        return
    fi
    folder=$(folder_of "$@")
    if [ -e "$folder/report.html" ]; then
        echo "$folder: finished before"
    elif ls "$folder"/checkpoint/round-*.safetensors > /dev/null 2>&1; then
        atm-fl run "$@" --gpus "$GPUS" -c resume=true
    else
        atm-fl run "$@" --gpus "$GPUS"
    fi
}

# The run directory that the last `-c run-dir=` names, or the configuration's name.
folder_of() {
    named="runs/$(basename "$1" .toml)"
    for argument in "$@"; do
        case "$argument" in run-dir=*) named="${argument#run-dir=}" ;; esac
    done
    echo "$named"
}

if [ -z "${DRY_RUN:-}" ]; then
    atm-fl prepare --tasks cars,dtd,eurosat,gtsrb,mnist-full,resisc45,svhn,sun397 --root "$ATM_FL_DATA"
fi

# PA-ATM, 10 rounds (88.08) and 30 (90.45)
run configs/paper_pa_atm.toml -c test-every=1
run configs/paper_pa_atm.toml -c rounds=30 -c test-every=10 -c run-dir=runs/paper_pa_atm_30
# One-shot merges of ten epochs: mean (72.22)
run configs/paper_baselines.toml
# PH-ATM from that merge
run configs/paper_ph_atm.toml -c test-every=1
# Converged single-task models (93.19), their mean (72.56), DARE (72.38) and Breadcrumbs (72.19), PH-ATM from each (79.67);
# then ten epochs a row: single-task, joint training, PA-ATM, and tuned one-shot merges
for contest in paper_converged_contest paper_contest; do
    if [ -n "${DRY_RUN:-}" ]; then
        atm-fl compare "configs/$contest.toml" --dry-run --device-name "$DEVICE"
    else
        atm-fl compare "configs/$contest.toml" --jobs 1
    fi
done
