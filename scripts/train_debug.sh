#!/usr/bin/env bash
# Set up, train configs/debug.toml through its three phases on this machine, and draw it. Arguments go to train.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
torchrun --nproc_per_node=1 train.py --config configs/debug.toml "$@"
folder=outputs/debug
while [ $# -gt 0 ]; do # the run's own folder is drawn
    case $1 in
        --job.dump_folder) folder=${2:-$folder} ;;
        --job.dump_folder=*) folder=${1#*=} ;;
    esac
    shift
done
python -m scripts.plot "$folder"
