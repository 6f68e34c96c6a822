#!/usr/bin/env bash
# A Cloud TPU, one VM or a pod slice: installs this checkout on every worker and runs one stage on
# all of them.
#
#   TPU=my-tpu ZONE=us-central2-b NFS=10.0.0.2:/share launch/tpu_vm.sh \
#     ppo --config=ppo/storyland --workdir=shared/runs/ppo
#
# Create the TPU first, for example:
#   gcloud compute tpus tpu-vm create my-tpu --zone=us-central2-b \
#     --accelerator-type=v4-32 --version=tpu-ubuntu2204-base
#
# The workers of a slice share one folder: NFS (a Filestore) is mounted as shared/ in each checkout;
# put the run, data and models there. A single VM needs none: leave NFS out. After a preemption,
# create the TPU again and repeat the same command.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}"
NFS=${NFS:-}

if (($# < 2)); then
  echo "usage: TPU=... ZONE=... [NFS=HOST:/SHARE] launch/tpu_vm.sh \
STAGE --config=... --workdir=..." >&2
  exit 2
fi

on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git archive --format=tar.gz --output="$folder/rlhf_jax.tgz" HEAD
gcloud compute tpus tpu-vm scp "$folder/rlhf_jax.tgz" "$TPU":rlhf_jax.tgz \
  --zone="$ZONE" --worker=all
on_all "mkdir -p rlhf_jax/shared && tar -xzf rlhf_jax.tgz -C rlhf_jax && cd rlhf_jax && \
ACCELERATOR=tpu make setup"
if [[ -n $NFS ]]; then
  on_all "sudo apt-get install -y -q nfs-common && cd rlhf_jax &&
    { mountpoint -q shared || sudo mount -t nfs $(printf %q "$NFS") shared; }"
fi

# JAX finds the workers itself; on a single VM there is one process. `exec`, so that signals reach
# Python.
on_all "cd rlhf_jax && exec .venv/bin/python -m rlhf_jax $(printf '%q ' "$@") --distributed"
