#!/bin/bash
# Fine-tunes Llama 3 8B: LoRA on an NF4 base (QLoRA).
#   launch/qlora.sh [KEY=VALUE ...]      all GPUs of this machine; optim.lr=1e-4, for instance
# RECIPE: another recipe. Several machines, and what else can be set: launch/ranks.sh.
exec "$(dirname "$0")/ranks.sh" "${RECIPE:-launch/recipes/llama3-8b-qlora.yaml}" "$@"
