#!/usr/bin/env bash
# Set up, train configs/debug.toml through its three phases on this machine, and draw it. Arguments go to train.py.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
torchrun --nproc_per_node=1 train.py --config configs/debug.toml "$@"
python -m scripts.plot outputs/debug
