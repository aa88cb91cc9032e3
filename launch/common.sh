# shellcheck shell=bash
# What the launchers share: their common options, quoting, and starting again. Sourced, not run.
set -euo pipefail

BLM=${BLM:-blm}
dry_run=no
restarts=10
variables=()

die() {
  printf '%s: error: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# The comment at the head of a launcher is its help.
show_help() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

# value OPTION [VALUE ...]: the word after an option.
value() {
  [ $# -ge 2 ] || die "$1 wants a value: see --help"
  printf '%s' "$2"
}

number() {
  [[ ${2-} =~ ^[0-9]+$ ]] || die "$1 wants a whole number, not '${2-}'"
  printf '%s' "$2"
}

# An option that all launchers have, of the words given; sets `words`, how many it took.
# shellcheck disable=SC2034 # who sources this looks at it
common_option() {
  words=2
  case $1 in
    --dry-run) dry_run=yes words=1 ;;
    --help | -h) show_help ;;
    --restarts) restarts=$(number "$@") ;;
    --env) variable "$@" ;;
    *) die "unknown option $1: see --help; options of blm come after CONFIG" ;;
  esac
}

# --env NAME=VALUE, or NAME for its value here.
variable() {
  local set name
  set=$(value "$@")
  name=${set%%=*}
  [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || die "--env $set: write NAME=VALUE, or NAME to pass on its value here"
  if [ "$name" = "$set" ]; then
    [ -n "${!name+set}" ] || die "--env $name: it has no value here; write $name=VALUE"
    set="$name=${!name}"
  fi
  variables+=("$set")
}

require() {
  [ "$dry_run" = yes ] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# The words of a command as a shell reads them back.
quoted() {
  local text
  text=$(printf '%q ' "$@")
  printf '%s' "${text% }"
}

# What every process runs, in `train`.
train_command() {
  [ $# -ge 1 ] || die "CONFIG is missing: see --help"
  train=("$BLM" train "$@")
  if [ ${#variables[@]} -gt 0 ]; then
    train=(env "${variables[@]}" "${train[@]}")
  fi
}

# Pass a signal on to the command of run_with_restarts, if there is one yet.
stop_child() {
  stopped=$1
  [ -z "$child" ] || kill "-$1" "$child" 2>/dev/null || true
  told=$child
}

# Run a command, again and again while it fails on the way: training goes on from its last checkpoint.
# Exit code 2 is a wrong request, which stays wrong; who stops this script stops the command, and that is the end.
run_with_restarts() {
  local try=0 code stopped=no child= told=
  if [ "$dry_run" = yes ]; then
    quoted "$@"
    printf '\n'
    return
  fi
  set -m # a background command without it would not hear Ctrl-C
  # Before there is a run: a signal that comes between its start and a trap would be lost.
  trap 'stop_child TERM' TERM
  trap 'stop_child INT' INT
  while :; do
    "$@" </dev/null &
    child=$!
    [ "$stopped" = no ] || [ "$told" = "$child" ] || stop_child "$stopped"
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting, not the command
      code=0
      wait "$child" || code=$?
    done
    if [ "$code" -eq 0 ] || [ "$code" -eq 2 ] || [ "$stopped" != no ] || [ "$try" -ge "$restarts" ]; then
      exit "$code"
    fi
    try=$((try + 1))
    printf '%s: it ended with code %s: start %s of %s more\n' "${0##*/}" "$code" "$try" "$restarts" >&2
    sleep "${BLM_RESTART_SECONDS:-10}"
  done
}
