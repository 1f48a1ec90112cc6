#!/usr/bin/env bash
# A real SLURM cluster of some nodes on this one Debian or Ubuntu machine, for tests and for trying `launcher=slurm` out.
#
#   tools/slurm_lab.sh install     packages slurm-wlm, munge, iproute2 (apt-get, as root); says why if that is impossible
#   tools/slurm_lab.sh up          start controller and nodes; returns when all nodes are idle
#   eval "$(tools/slurm_lab.sh env)"   then sbatch, squeue, lctrain train launcher=slurm ... talk to it
#   tools/slurm_lab.sh status | down
#   tools/slurm_lab.sh kill N | start N | cut N | join N     power off or on, unplug or replug the network of node N
#   tools/slurm_lab.sh crash N     SIGKILL for the slurmd of node N; its jobs live on, until `start N` or beyond
#
# Settings (environment): NODES=2, CPUS=4 and MEMORY_MB=8000 per node (what SLURM believes, not what is there), LAB=0..99 (several
# labs side by side), MODE=netns|loop. netns (root): every node has its own address, hostname, processes and /dev/shm, so it can
# be killed or unplugged. loop (any user): all slurmd share this machine, each on a port of its own.
set -euo pipefail

LAB=${LAB:-0}
ROOT=${LAB_ROOT:-/tmp/lctrain-slurm-$LAB}
saved() { cat "$ROOT/$1" 2>/dev/null || echo "$2"; }
NODES=${NODES:-$(saved nodes 2)}
CPUS=${CPUS:-4}
MEMORY_MB=${MEMORY_MB:-8000}
NETWORK=10.77.$LAB
BRIDGE=lcs${LAB}br
PORTS=$((16000 + 20 * LAB))
SOCKET=$ROOT/munge/socket
export SLURM_CONF=$ROOT/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin

say() { echo "slurm_lab: $*" >&2; }

lacking() { # COMMAND...: the first that this machine does not have
  local name
  for name in "$@"; do command -v "$name" >/dev/null || { echo "$name"; return; }; done
}

can_make_networks() {
  [ "$(id -u)" = 0 ] && [ -z "$(lacking ip nsenter unshare)" ] || return 1
  ip link add "lcs${LAB}t0" type veth peer name "lcs${LAB}t1" 2>/dev/null || return 1
  ip link del "lcs${LAB}t0"
  unshare --net --pid --uts --ipc --mount --fork true 2>/dev/null
}

choose_mode() {
  MODE=${MODE:-$(saved mode "")}
  if [ -z "$MODE" ]; then if can_make_networks; then MODE=netns; else MODE=loop; fi; fi
}

install() {
  [ -n "$(lacking slurmctld slurmd sbatch munged ip)" ] || return 0
  command -v apt-get >/dev/null || { say "not installed: this is no Debian or Ubuntu (no apt-get)"; return 1; }
  [ "$(id -u)" = 0 ] || { say "not installed: run 'tools/slurm_lab.sh install' as root"; return 1; }
  local log
  log=$(mktemp)
  if ! { timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive timeout 300 \
    apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2; } >"$log" 2>&1; then
    say "not installed: apt-get failed: $(tail -n 1 "$log")"
    return 1
  fi
  rm -f "$log"
}

address() { if [ "$MODE" = netns ]; then echo "$NETWORK.$((10 + $1))"; else echo 127.0.0.1; fi; }

# ---- processes: started in sessions of their own, believed in only while they live

launch() { # NAME COMMAND...
  local name=$1
  shift
  setsid "$@" </dev/null >>"$ROOT/log/$name.out" 2>&1 &
  echo $! >"$ROOT/run/$name"
}

lives() { # NAME
  local pid
  pid=$(cat "$ROOT/run/$1" 2>/dev/null) && grep -qaE 'munged|slurm|unshare' "/proc/$pid/cmdline" 2>/dev/null
}

end() { # NAME [SIGNAL]
  local _
  if lives "$1"; then
    kill "-${2:-TERM}" "$(cat "$ROOT/run/$1")" || true
    for _ in $(seq 100); do lives "$1" || break; sleep 0.05; done
    lives "$1" && kill -KILL "$(cat "$ROOT/run/$1")"
  fi
  rm -f "$ROOT/run/$1"
}

wait_for() { # SECONDS COMMAND...
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $deadline ] || return 1
    sleep 0.1
  done
}

# ---- the cluster's configuration

configure() {
  mkdir -p "$ROOT"/{state,spool,log,run,munge,dev}
  chmod 755 "$ROOT" "$ROOT/munge" # munged refuses folders that others may write to
  [ -s "$ROOT/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$ROOT/munge/key")
  local me node controller="localhost(127.0.0.1)"
  me=$(id -un)
  [ "$MODE" = netns ] && controller="ctl($NETWORK.1)"
  ln -sf /dev/null "$ROOT/dev/gpu0" # make-believe GPUs must be character devices, or SLURM sets no CUDA_VISIBLE_DEVICES
  ln -sf /dev/null "$ROOT/dev/gpu1"
  echo "Name=gpu File=$ROOT/dev/gpu[0-1]" >"$ROOT/gres.conf"
  echo "CgroupPlugin=cgroup/v1" >"$ROOT/cgroup.conf" # not used, but its absence makes slurmd look for cgroups and die
  cat >"$ROOT/slurm.conf" <<END
ClusterName=lab$LAB
SlurmctldHost=$controller
SlurmctldPort=$PORTS
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as a credential lives (120 s if not said otherwise).
AuthInfo=socket=$SOCKET,cred_expire=5
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/_slurmctld.pid
SlurmdPidFile=$ROOT/run/_slurmd-%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
SlurmdTimeout=15
MessageTimeout=20
MinJobAge=3600
END
  echo "127.0.0.1 localhost" >"$ROOT/hosts"
  echo "$NETWORK.1 ctl" >>"$ROOT/hosts"
  for node in $(seq "$NODES"); do
    mkdir -p "$ROOT/spool/node$node"
    echo "$(address "$node") node$node" >>"$ROOT/hosts"
    local where="Port=$((PORTS + 1))"
    [ "$MODE" = loop ] && where="NodeHostname=localhost Port=$((PORTS + 1 + node))"
    echo "NodeName=node$node NodeAddr=$(address "$node") $where CPUs=$CPUS RealMemory=$MEMORY_MB Gres=gpu:2 State=UNKNOWN"
  done >>"$ROOT/slurm.conf"
  cat >>"$ROOT/slurm.conf" <<END
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
END
  echo "$MODE" >"$ROOT/mode"
  echo "$NODES" >"$ROOT/nodes"
}

# ---- nodes

slurmd_on() { # N SIGNAL: to the slurmd inside a node
  nsenter "--pid=/proc/$(cat "$ROOT/run/node$1")/ns/pid_for_children" bash -c "kill -$2 $(cat "$ROOT/run/_slurmd-node$1.pid")" 2>/dev/null
}

start_node() { # N
  if lives "node$1"; then
    [ "$MODE" = loop ] || slurmd_on "$1" 0 || touch "$ROOT/run/wanted-node$1"
    return
  fi
  if [ "$MODE" = loop ]; then
    launch "node$1" slurmd -D -N "node$1"
    return
  fi
  local net=lcs$LAB-node$1 plug=lcs${LAB}v$1
  ip netns add "$net" 2>/dev/null || true
  # The last life's cable goes away some time after its namespace: make a new one each time.
  ip link del "$plug" 2>/dev/null || true
  wait_for 5 ip link add "$plug" type veth peer name eth0 netns "$net"
  ip link set "$plug" master "$BRIDGE" up
  ip -n "$net" link set lo up
  ip -n "$net" addr replace "$(address "$1")/24" dev eth0
  ip -n "$net" link set eth0 up
  # bash is the node's first process: when it is killed, everything on the node is. It outlives its slurmd, as the jobs do.
  launch "node$1" nsenter "--net=/run/netns/$net" \
    unshare --uts --ipc --mount --pid --fork --kill-child --mount-proc --propagation private \
    bash -c "hostname node$1 && mount --bind $ROOT/hosts /etc/hosts && mount -t tmpfs -o size=4g shm /dev/shm
             while rm -f $ROOT/run/wanted-node$1; do
               slurmd -D
               until [ -e $ROOT/run/wanted-node$1 ]; do sleep 0.1; done
             done"
}

kill_node() { # N
  if [ "$MODE" = netns ]; then end "node$1" KILL; else end "node$1"; fi
}

crash_node() { # N
  if [ "$MODE" = netns ]; then slurmd_on "$1" KILL; else end "node$1" KILL; fi
}

idle_nodes() { sinfo -h -N -p low -t idle,mixed,alloc -o %N | wc -l; }
all_idle() { [ "$(idle_nodes)" = "$NODES" ]; }
no_jobs() { [ -z "$(squeue -h)" ]; }
controller_up() { scontrol ping | grep -q "is UP"; }

up() {
  local missing node
  missing=$(lacking slurmctld slurmd sbatch munged)
  [ -z "$missing" ] || { say "$missing is not installed: tools/slurm_lab.sh install (as root)"; return 1; }
  choose_mode
  configure
  if [ "$MODE" = netns ]; then
    ip link show "$BRIDGE" >/dev/null 2>&1 || ip link add "$BRIDGE" type bridge
    ip addr replace "$NETWORK.1/24" dev "$BRIDGE"
    ip link set "$BRIDGE" up
  fi
  if ! lives munged; then
    rm -f "$SOCKET" "$SOCKET.lock"
    launch munged munged --foreground --num-threads=4 --key-file="$ROOT/munge/key" --socket="$SOCKET" \
      --pid-file="$ROOT/run/_munged.pid" --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munge/seed"
  fi
  wait_for 5 munge -n -S "$SOCKET" || { say "munged does not answer: $(tail -n 1 "$ROOT/log/munged.out")"; return 1; }
  if ! lives slurmctld; then
    if [ "$MODE" = netns ]; then
      launch slurmctld unshare --uts bash -c 'hostname ctl; exec slurmctld -D'
    else
      launch slurmctld slurmctld -D
    fi
  fi
  wait_for 10 controller_up || { say "slurmctld does not answer: $(tail -n 1 "$ROOT/log/slurmctld.log")"; return 1; }
  for node in $(seq "$NODES"); do start_node "$node"; done
  wait_for 15 all_idle || { say "$(idle_nodes) of $NODES nodes came up: $(tail -qn 1 "$ROOT"/log/node*.out)"; return 1; }
}

down() {
  choose_mode
  local node
  if [ "$MODE" = loop ] && lives slurmctld; then # killing a slurmd does not end its jobs
    scancel --full --signal=KILL --user="$(id -un)" 2>/dev/null || true
    scancel --user="$(id -un)" 2>/dev/null || true
    wait_for 25 no_jobs || say "some jobs did not end"
  fi
  for node in $(seq "$NODES"); do kill_node "$node"; done
  end slurmctld
  end munged
  if [ "$MODE" = netns ]; then
    for node in $(seq "$NODES"); do
      ip link del "lcs${LAB}v$node" 2>/dev/null || true
      ip netns del "lcs$LAB-node$node" 2>/dev/null || true
    done
    ip link del "$BRIDGE" 2>/dev/null || true
  fi
  rm -rf "$ROOT"
}

case ${1:-} in
  install) install ;;
  up) up ;;
  down) down ;;
  status) choose_mode; sinfo -N -l; squeue ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  kill) choose_mode; kill_node "$2" ;;
  start) choose_mode; start_node "$2" ;;
  crash) choose_mode; crash_node "$2" ;;
  cut) ip link set "lcs${LAB}v$2" down ;;
  join) ip link set "lcs${LAB}v$2" up ;;
  *) sed -n '2,15p' "$0"; exit 2 ;;
esac
