#!/usr/bin/env bash
# A real SLURM of one node on this machine, to try the scripts: own folder, ports and key; no systemd, no cgroups.
#
#     bash scripts/slurm/loopback.sh start FOLDER      # then: export SLURM_CONF=FOLDER/slurm.conf
#     bash scripts/slurm/loopback.sh stop FOLDER
#
# For root, on a machine with slurmctld, slurmd and munged (Debian: apt-get install slurm-wlm munge). PORT, by default
# 26817, and the one after it have to be free.
set -euo pipefail
usage="usage: bash scripts/slurm/loopback.sh start|stop FOLDER"
action=${1:?$usage}
folder=$(realpath -m "${2:?$usage}")
port=${PORT:-26817}
export SLURM_CONF=$folder/slurm.conf

start() {
    mkdir -p "$folder"/{state,spool}
    chmod 755 "$folder"
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
    cat >"$SLURM_CONF" <<CONF
ClusterName=loopback
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
MpiDefault=none
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname=$(hostname -s) CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
CONF
    # --force: a shared folder such as /tmp above it is fine here.
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    slurmctld
    slurmd -N localhost
    for _ in $(seq 240); do
        if [ "$(sinfo --noheader --format=%t 2>/dev/null)" = idle ]; then
            echo "SLURM runs: export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.5
    done
    echo "error: the node is not idle after 120 seconds; logs are in $folder" >&2
    stop
    return 1
}

stop() {
    scancel --user="$(id -un)" --quiet 2>/dev/null || true
    local name pid
    for name in slurmd slurmctld munged; do
        pid=$(cat "$folder/$name.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do
            kill -0 "$pid" 2>/dev/null || continue 2
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

case $action in
    start | stop) "$action" ;;
    *) echo "$usage" >&2 && exit 2 ;;
esac
