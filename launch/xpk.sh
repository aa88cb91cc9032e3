#!/usr/bin/env bash
# Train on a GKE cluster that xpk has made, on one slice of TPUs or several.
#
#   launch/xpk.sh --cluster CLUSTER --workload NAME --tpu-type TYPE --image IMAGE [options] CONFIG [key=value ...]
#
#   --cluster CLUSTER    the cluster
#   --workload NAME      what the run is called there; its start is refused while another of the name exists
#   --tpu-type TYPE      of a slice, such as v5litepod-256
#   --image IMAGE        container image in which blm is installed
#   --slices N           slices, as one run (1)
#   --zone ZONE, --project PROJECT   where the cluster is (gcloud's own)
#   --env NAME[=VALUE]   set a variable in all containers; may be repeated
#   --restarts N         start again so often if it fails on the way (10)
#   --dry-run            print what would run, and run nothing
#   --help
#
# BLM is the program to run in the containers (blm). Paths are in a bucket, or in the image.

# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

cluster='' workload='' tpu_type='' image='' slices=1 zone='' project=''
while [[ ${1-} == -* ]]; do
  case $1 in
    --cluster) cluster=$(value "$@") words=2 ;;
    --workload) workload=$(value "$@") words=2 ;;
    --tpu-type) tpu_type=$(value "$@") words=2 ;;
    --image) image=$(value "$@") words=2 ;;
    --slices) slices=$(number "$@") words=2 ;;
    --zone) zone=$(value "$@") words=2 ;;
    --project) project=$(value "$@") words=2 ;;
    *) common_option "$@" ;;
  esac
  shift "$words"
done
train_command "$@"
for option in cluster workload tpu_type image; do
  [ -n "${!option}" ] || die "--${option//_/-} is missing: see --help"
done
require xpk "pip install xpk; it wants gcloud and kubectl too"

create=(xpk workload create "--cluster=$cluster" "--workload=$workload" "--tpu-type=$tpu_type" "--num-slices=$slices")
[ -z "$zone" ] || create+=("--zone=$zone")
[ -z "$project" ] || create+=("--project=$project")
# Of its own accord xpk starts again only what a signal ended; a run that lost a host ends with 1, a wrong request with 2.
create+=("--docker-image=$image" "--max-restarts=$restarts" --restart-on-exit-codes=1)
create+=("--command=$(quoted "${train[@]}")")
if [ "$dry_run" = yes ]; then
  quoted "${create[@]}"
  printf '\n'
else
  "${create[@]}"
fi
