# shellcheck shell=bash
# Shared by the sbatch scripts and sourced by them: a job that saves before its time limit, requeues itself, and resumes.
#
# SLURM signals the batch shell alone (--signal=B:USR1@seconds). It passes the signal on to the trainers until they have
# saved and ended with status 0, and then requeues the job, whose same command resumes. A job that was not signalled
# has finished. Where a process fails, torchrun starts all of them again, MAX_RESTARTS times at most (3), and they resume
# from the newest complete checkpoint. A failure after that keeps its status and is not requeued.
set -euo pipefail
# From here on: without a trap the signal would end the batch shell.
signalled=
trap 'signalled=yes' USR1
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"
export PYTHONUNBUFFERED=1
# Else the ranks that start again are given the addresses of those before (torch 2.13); the trainer refuses to start so.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# srun does not take it from sbatch by itself since SLURM 22.05.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# One torchrun on each node. Arguments are those of train.py.
train() {
    local head
    # What is refused would be refused at every restart.
    if ! WORLD_SIZE=$((SLURM_JOB_NUM_NODES * ${SLURM_GPUS_ON_NODE:-1})) python train.py "$@" --check >/dev/null; then
        echo "$(date +%T) job $SLURM_JOB_ID is refused and is not requeued"
        return 2
    fi
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The port is the job's own, so that two jobs can share a node, and below those that systems give out themselves.
    export RDZV=$head:$((20000 + SLURM_JOB_ID % 10000))
    # torchrun ignores the signal, and so do the trainers until they have their own handler: one that comes while they
    # start is lost, not deadly, and comes again.
    # shellcheck disable=SC2016  # expanded on each node
    until_signalled srun --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c '
        trap "" USR1
        exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
            --rdzv-backend=c10d --rdzv-endpoint="$RDZV" --rdzv-conf=is_host=$((SLURM_NODEID == 0)) \
            --rdzv-id="$SLURM_JOB_ID" --max-restarts="${MAX_RESTARTS:-3}" train.py "$@"' train "$@"
}

# The trainers are the children of torchrun, on each node. Signalling the step instead would reach torchrun, which
# kills after 30 seconds and fails, and the processes that compile.
pass_on() {
    # shellcheck disable=SC2016  # expanded on each node
    srun --overlap --ntasks-per-node=1 bash -c '
        launchers=$(pgrep -d, -f "^[^ ]*python[^ ]* .*--rdzv-id=$SLURM_JOB_ID ") && pkill -USR1 -P "$launchers"' || true
}

# Run a command to its end, or to the signal and then the requeue.
until_signalled() {
    local status=0
    "$@" &
    command=$!
    # A trapped signal ends `wait` early, so the command is asked for, and waited for again.
    while kill -0 "$command" 2>/dev/null; do
        if [ -n "$signalled" ]; then
            pass_on
            sleep 5 &
            wait -n || true
        else
            wait "$command" || true
        fi
    done
    wait "$command" || status=$?
    if [ "$status" -ne 0 ]; then
        echo "$(date +%T) job $SLURM_JOB_ID failed with status $status and is not requeued"
    elif [ -n "$signalled" ]; then
        echo "$(date +%T) job $SLURM_JOB_ID was signalled and is requeued"
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
    else
        echo "$(date +%T) job $SLURM_JOB_ID is finished"
    fi
    return "$status"
}
