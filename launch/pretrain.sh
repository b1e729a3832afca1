#!/bin/bash
# Pretrains Llama 3 8B from random weights, ZeRO-3.
#   launch/pretrain.sh [KEY=VALUE ...]      all GPUs of this machine; parallel.engine=zero3 batch.micro=1, for instance
# RECIPE: another recipe. Several machines, and what else can be set: launch/ranks.sh.
exec "$(dirname "$0")/ranks.sh" "${RECIPE:-launch/recipes/llama3-8b-pretrain.yaml}" "$@"
