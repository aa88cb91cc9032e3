#!/usr/bin/env bash
# Train on this host, with all its devices.
#
#   launch/local.sh [options] CONFIG [key=value ...]
#
#   --env NAME[=VALUE]   set a variable for the run; may be repeated
#   --restarts N         start again so often if it fails on the way (10)
#   --dry-run            print what would run, and run nothing
#   --help
#
# BLM is the program to run (blm).

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ ${1-} == -* ]]; do
  common_option "$@"
  shift "$words"
done
train_command "$@"
require "$BLM" "pip install blm-jax, or say where it is: BLM=/path/to/blm"
run_with_restarts "${train[@]}"
