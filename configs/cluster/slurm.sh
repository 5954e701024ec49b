#!/bin/bash
# sbatch --nodes=8 configs/cluster/slurm.sh configs/imagenet1k_dm_ipc10.yaml data.path=/shared/imagenet run.dir=/shared/runs/dm
#
# From the root of this repository, installed with `.[cluster]` in .venv on a disk that all nodes share. One Ray node on each
# machine, the command on the first of them; Ray ends with the job. A job that was cut off or requeued resumes.
#SBATCH --job-name=distill-at-scale
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=24:00:00
set -euo pipefail
umask 077

[ $# -ge 1 ] || { echo "usage: sbatch configs/cluster/slurm.sh CONFIG [section.key=value ...]" >&2; exit 2; }
source .venv/bin/activate

# One token for this job, which only its owner can read; it is removed when the job ends.
token=$(mktemp "$PWD/.ray-token-$SLURM_JOB_ID-XXXXXX")
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token" RAY_USAGE_STATS_ENABLED=0

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000))

# `--block` keeps each node of Ray inside its step, so ending the steps ends Ray and nothing else.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --block --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 &
steps=($!)
trap 'kill "${steps[@]}" 2> /dev/null || true; wait || true; rm -f "$token"' EXIT
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    workers=$((SLURM_JOB_NUM_NODES - 1))
    srun --overlap --nodes="$workers" --ntasks="$workers" --exclude="$head" bash -c \
        "until ray start --block --address=$address:$port; do sleep 5; done" &
    steps+=($!)
fi

# The command waits until the head answers; workers join when they are ready.
until srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray health-check --address "$address:$port"; do sleep 5; done
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    python jobs/pipeline.py "$@" "cluster.address=$address:$port" ${SLURM_GPUS_ON_NODE:+"cluster.gpus_per_worker=1"}
