#!/bin/bash
# Aligns the fine-tuned Llama 3 8B with preference pairs (DPO), on the run that qlora.sh made.
#   launch/dpo.sh [KEY=VALUE ...]      all GPUs of this machine; dpo.beta=0.05, for instance
# RECIPE: another recipe. Several machines, and what else can be set: launch/ranks.sh.
exec "$(dirname "$0")/ranks.sh" "${RECIPE:-launch/recipes/llama3-8b-dpo.yaml}" "$@"
