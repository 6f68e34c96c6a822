#!/usr/bin/env bash
# One node with several GPUs: one process drives all of them, so there is nothing to coordinate.
#
#   launch/gpu_node.sh ppo --config=ppo/storyland --workdir=runs/ppo --config.mesh='(1,-1,1)'
#
# The stage starts again after a crash (not after a mistake, a stop or success) and goes on from its last checkpoint.
# CUDA_VISIBLE_DEVICES chooses the GPUs. From the root of the checkout, or anywhere with PYTHON=python of an environment
# in which rlhf_jax is installed.
set -uo pipefail
PYTHON=${PYTHON:-.venv/bin/python}
RESTARTS=${RESTARTS:-5}

for ((restart = 0; ; restart++)); do
  # The child runs beside the shell, so that a signal to the shell reaches it at once.
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
