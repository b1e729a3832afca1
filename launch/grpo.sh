#!/bin/bash
# Trains Llama 3 8B on problems whose answers a program checks (GRPO).
#   launch/grpo.sh [KEY=VALUE ...]      all GPUs of this machine; grpo.group_size=8, for instance
# RECIPE: another recipe. Several machines, and what else can be set: launch/ranks.sh.
exec "$(dirname "$0")/ranks.sh" "${RECIPE:-launch/recipes/llama3-8b-grpo.yaml}" "$@"
