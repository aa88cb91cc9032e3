#!/usr/bin/env bash
# Train on hosts that Slurm gives: one process for each GPU, or one a node where there are none.
#
#   launch/slurm.sh [options] CONFIG [key=value ...]
#
#   --nodes N            nodes (1)
#   --gpus N             GPUs of a node (0: none)
#   --sbatch OPTION      for sbatch, such as --partition=gpu or --time=24:00:00; may be repeated
#   --env NAME[=VALUE]   set a variable on all nodes; may be repeated
#   --restarts N         queue it again so often if it fails on the way or runs out of time (10)
#   --dry-run            print what would be submitted, and submit nothing
#   --help
#
# BLM is the program to run on the nodes (blm).

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nodes=1 gpus=0 sbatch=()
while [[ ${1-} == -* ]]; do
  case $1 in
    --nodes) nodes=$(number "$@") words=2 ;;
    --gpus) gpus=$(number "$@") words=2 ;;
    --sbatch) sbatch+=("$(value "$@")") words=2 ;;
    *) common_option "$@" ;;
  esac
  shift "$words"
done
train_command "$@"
require sbatch "run this where Slurm is, on a login node of the cluster"

tasks=1
submit=(sbatch --job-name=blm "--nodes=$nodes" --requeue --open-mode=append --output=%x-%j.log)
if [ "$gpus" -gt 0 ]; then
  tasks=$gpus # each process has the GPU of its number
  submit+=("--gpus-per-node=$gpus")
fi
# Two minutes before time runs out, training is told, and saves.
submit+=("--ntasks-per-node=$tasks" --signal=TERM@120 ${sbatch[@]+"${sbatch[@]}"})

# Slurm queues a job again that it preempts; one that fails, or runs out of time, does so itself.
job="#!/usr/bin/env bash
code=0
srun --kill-on-bad-exit=1 $(quoted "${train[@]}") || code=\$?
if [ \$code -ne 0 ] && [ \$code -ne 2 ] && [ \"\${SLURM_RESTART_COUNT:-0}\" -lt $restarts ]; then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$code"

if [ "$dry_run" = yes ]; then
  printf "%s <<'END_OF_JOB'\n%s\nEND_OF_JOB\n" "$(quoted "${submit[@]}")" "$job"
else
  "${submit[@]}" <<<"$job"
fi
