#!/usr/bin/env bash
# Train on all hosts of a Cloud TPU VM, or of several slices of a queued resource.
#
#   launch/tpu_vm.sh --name NAME --zone ZONE [options] CONFIG [key=value ...]
#
#   --name NAME          the TPU VM; with --multislice, the queued resource
#   --zone ZONE          where it is
#   --project PROJECT    whose it is (gcloud's own)
#   --multislice         all nodes of a queued resource, as one run
#   --dir DIR            directory on the hosts to run in, from the home directory on (the home directory)
#   --env NAME[=VALUE]   set a variable on all hosts; may be repeated
#   --restarts N         start again so often if it fails on the way (10)
#   --dry-run            print what would run, and run nothing
#   --help
#
# BLM is the program to run on the hosts (blm). Paths are the hosts' own, or in a bucket.

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name='' zone='' project='' dir='' multislice=no
while [[ ${1-} == -* ]]; do
  case $1 in
    --name) name=$(value "$@") words=2 ;;
    --zone) zone=$(value "$@") words=2 ;;
    --project) project=$(value "$@") words=2 ;;
    --dir) dir=$(value "$@") words=2 ;;
    --multislice) multislice=yes words=1 ;;
    *) common_option "$@" ;;
  esac
  shift "$words"
done
train_command "$@"
[ -n "$name" ] || die "--name is missing: gcloud compute tpus tpu-vm list --zone=ZONE shows what there is"
[ -n "$zone" ] || die "--zone is missing: the zone of $name"
require gcloud "install the Google Cloud SDK (cloud.google.com/sdk), then gcloud auth login"

# Where a lost connection left a run behind, the next start waits for its end, and never trains beside it.
remote=$(quoted flock -w 600 /tmp/blm_train.lock "${train[@]}")
[ -z "$dir" ] || remote="cd $(quoted "$dir") && $remote"
if [ "$multislice" = yes ]; then
  ssh=(gcloud compute tpus queued-resources ssh "$name" --node=all)
else
  ssh=(gcloud compute tpus tpu-vm ssh "$name")
fi
ssh+=("--zone=$zone")
[ -z "$project" ] || ssh+=("--project=$project")
run_with_restarts "${ssh[@]}" --worker=all "--command=$remote"
