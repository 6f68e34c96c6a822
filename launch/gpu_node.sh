#!/usr/bin/env bash
# One node with several GPUs: one process uses all of them, so there is nothing to coordinate.
#
#   launch/gpu_node.sh ppo --config=ppo/storyland --workdir=runs/ppo --config.mesh='(1,-1,1)'
#
# After a crash (not after a mistake in the command, a stop or success) the stage is restarted and
# resumes from its last checkpoint. CUDA_VISIBLE_DEVICES selects the GPUs. Run it from the root of
# the checkout, or anywhere with PYTHON set to the Python of an environment that has rlhf_jax.
set -uo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
RESTARTS=${RESTARTS:-5}

for ((restart = 0; ; restart++)); do
  # The child runs in the background, so that a signal to the shell is passed on at once.
  "$PYTHON" -m rlhf_jax "$@" &
  child=$!
  trap 'kill -TERM $child' TERM
  trap 'kill -INT $child' INT
  wait $child
  status=$?
  while kill -0 $child 2>/dev/null; do # `wait` also returns when a trap has run
    wait $child
    status=$?
  done
  case $status in
    0 | 2 | 130 | 143) exit $status ;;
  esac
  if ((restart >= RESTARTS)); then
    echo "status $status after $restart restarts: giving up" >&2
    exit $status
  fi
  echo "status $status: starting again" >&2
  sleep 5
done
