#!/usr/bin/env bash
# Start this node's replicas with torchrun. Every node of a run gets the same command but for NODE_RANK.
#
# Who runs it: a person on each machine, or any scheduler that starts one command per machine.
# What to change: nothing here; the variables below. Arguments go to `dptrain train` unchanged. The exit code is that of
# the replica that failed first.
# What was run for real: one node, two nodes, and one to two nodes with a node that joins, on loopback with gloo
# (tests/launch). Not run: NCCL on GPUs.
#
#   launch/torchrun.sh --config run.yaml                                        one node
#   NNODES=2 NODE_RANK=0 HEAD=10.0.0.1 launch/torchrun.sh --config run.yaml     the first of two nodes
#   NNODES=2 NODE_RANK=1 HEAD=10.0.0.1 launch/torchrun.sh --config run.yaml     the second
#   NNODES=1:3 NODE_RANK=0 HEAD=10.0.0.1 launch/torchrun.sh …                   one to three nodes, which may come and go
#
#   NNODES        number of nodes, or MIN:MAX (1)
#   NODE_RANK     number of this node from 0; node 0 is the one that HEAD names (needed with several nodes)
#   HEAD          name or address under which all nodes reach node 0 (needed with several nodes)
#   PORT          free port on node 0 (29500)
#   RUN_ID        any word that is the same on all nodes (dptrain)
#   NPROC         replicas on this node (one per GPU; 2 without a GPU)
#   MAX_RESTARTS  restarts by torchrun (0 on one node; 3 on several, where a lost node is a restart)
#   COMMAND       sub-command of dptrain (train)
set -euo pipefail

fail() {
  echo "launch/torchrun.sh: $1" >&2
  exit 2
}

command -v torchrun >/dev/null ||
  fail "torchrun is not on PATH: activate the environment first, such as: source .venv/bin/activate"

NNODES="${NNODES:-1}"
NPROC="${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}"
[[ "$NNODES" =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
  fail "NNODES must be a whole number of at least 1, or a range such as 1:3, got '$NNODES'"
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "NPROC must be a whole number of at least 1, got '$NPROC'"
most="${NNODES#*:}"
((${NNODES%:*} <= most)) || fail "NNODES must be MIN:MAX with MIN at most MAX, got '$NNODES'"

if ((most == 1)); then
  rendezvous=(--standalone)
else
  [[ -n "${HEAD:-}" ]] || fail "NNODES is $NNODES, so HEAD must name the node that has NODE_RANK=0"
  [[ "${NODE_RANK:-}" =~ ^[0-9]+$ ]] || fail "NNODES is $NNODES, so NODE_RANK must be 0 to $((most - 1)), got '${NODE_RANK:-}'"
  ((NODE_RANK < most)) || fail "NODE_RANK must be 0 to $((most - 1)), got $NODE_RANK"
  # Without is_host torchrun guesses from the host's name which node serves the store, and the guess fails
  # where HEAD is an alias.
  rendezvous=(
    --nnodes "$NNODES"
    --rdzv-backend c10d
    --rdzv-id "${RUN_ID:-dptrain}"
    --rdzv-endpoint "$HEAD:${PORT:-29500}"
    # torchrun drops a node after three heartbeats without an answer: 9 s in place of its default 15 s, in which all others
    # wait. Once MIN nodes are there, it waits for more of them for 5 s in place of its default 30 s, which it also does
    # each time a node leaves; who comes later joins by a restart from the newest checkpoint.
    --rdzv-conf "is_host=$((NODE_RANK == 0)),keep_alive_interval=3,last_call_timeout=5"
    # torchrun's own default is 0: one lost node would end the others for good.
    --max-restarts "${MAX_RESTARTS:-3}"
  )
fi
if ((most == 1)) && [[ -n "${MAX_RESTARTS:-}" ]]; then
  rendezvous+=(--max-restarts "$MAX_RESTARTS")
fi

# With a shared store, replicas that torchrun restarts read the addresses of the attempt before, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# torchrun's own default is 1 thread; the cores of this node are shared out instead. nproc counts what this
# job may use, not what the node has.
if [[ -z "${OMP_NUM_THREADS:-}" ]]; then
  cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
  export OMP_NUM_THREADS=$((cores > NPROC ? cores / NPROC : 1))
fi

# torchrun itself ends with 1 whatever happened; this is torchrun with the exit code of the replica that failed first.
exec python -m dptrain.runtime.hosts.torchrun "${rendezvous[@]}" --nproc-per-node "$NPROC" -m dptrain "${COMMAND:-train}" "$@"
