#!/usr/bin/env bash
# Sweeps on a real SLURM: installs one of a single node from Debian's packages, runs them, and removes it again.
#
#   sudo PYTHON=.venv/bin/python experiments/sweep/slurm_check.sh      (three minutes on two idle cores; in a container, at best)
#
# 1 of 4 jobs, 2 diverge   2 a preempted job goes on   3 a job of two processes   4 a killed sweep finds its queued job
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(command -v "${PYTHON:-python}")
fail() { echo "slurm_check: $1" >&2; exit 1; }
[[ $EUID == 0 ]] || fail "installs packages: run it as root"
command -v apt-get > /dev/null || fail "needs Debian's packages: run it on Debian or Ubuntu"
! command -v srun > /dev/null || fail "there is a SLURM already: run it where there is none"
"$python" -c "import submitit" || fail 'needs submitit: pip install ".[slurm]"'

home=$(mktemp -d)
packages() { dpkg-query -W -f '${Package}\n' | sort; }
packages > "$home/before"
remove() {
    code=$?
    [[ $code == 0 ]] || tail -n 20 "$home"/{slurmctld,slurmd}.log "$home"/*.out 2> /dev/null || true
    kill -9 $(jobs -p) 2> /dev/null || true
    scancel --user=root 2> /dev/null || true
    for _ in {1..60}; do # slurmd does not end before its jobs
        [[ -z $(squeue --noheader 2> /dev/null) ]] && break
        sleep 0.5
    done
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$home/$daemon.pid" 2> /dev/null) || continue
        kill "$pid" && timeout 10 tail --pid="$pid" -f /dev/null || kill -9 "$pid" 2> /dev/null || true
    done
    packages | comm -13 "$home/before" - > "$home/added"
    [[ ! -s $home/added ]] || xargs apt-get purge -qq -y < "$home/added" > "$home/apt.log" 2>&1 || cat "$home/apt.log"
    rm -rf /etc/slurm "$home"
    ! command -v srun > /dev/null || { echo "slurm_check: SLURM is still there" >&2; code=1; }
    exit $code
}
trap remove EXIT

export STU_RUNS=$home/runs STU_DATA=$home/data PYTHONUNBUFFERED=1
unset OMP_NUM_THREADS
tiny=(task=lds model=lru trainer=cpu logger=csv figures.when=never model.d_model=8 model.depth=1 task.data.train=40
    task.data.val=10 task.data.test=10 task.seq_len=64 loader.batch_size=4 log_every=2 trainer.max_epochs=null)
long=(trainer.max_steps=400 trainer.val_check_interval=200 seed=3) # some seconds
"$python" train.py -m hydra.launcher.workers="$(nproc)" "${tiny[@]}" "${long[@]}" name=whole > "$home/whole.out" 2>&1

DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > "$home/apt.log" 2>&1 ||
    { cat "$home/apt.log"; fail "cannot be installed"; }
host=$(hostname -s)
mkdir -p /etc/slurm /run/munge "$home/state"
chown munge: /run/munge
cat > /etc/slurm/slurm.conf << EOF
ClusterName=check
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
NodeName=$host CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOF
[[ -e /etc/munge/munge.key ]] || mungekey || fail "munge has no key"
munge -n > /dev/null 2>&1 || runuser -u munge -- munged  # unless its package has started it
cp /run/munge/munged.pid "$home/munged.pid"
slurmctld
slurmd
for _ in {1..60}; do
    [[ $(sinfo --noheader --format=%T 2> /dev/null) == idle ]] && break
    sleep 0.5
done
[[ $(sinfo --noheader --format=%T) == idle ]] || fail "the node does not come up"
echo "$(sinfo --version) on $host, $(nproc) cores"

slurm=(hydra/launcher=slurm hydra.launcher.gpus_per_task=0 hydra.launcher.cpus_per_task=1)
sweep=("$python" train.py -m "${slurm[@]}" "${tiny[@]}")
wait_for() { for _ in {1..1500}; do eval "$1" && return; sleep 0.2; done; fail "waits in vain for: $1"; }
finished() { find "$STU_RUNS" -path "*$1*" -name summary.json | wc -l; }
state() { squeue --noheader --format=%T; }

# 1: a finished job, and one whose loss is not finite, for each of two seeds
code=0
"${sweep[@]}" trainer.max_steps=6 trainer.val_check_interval=3 seed=0,1 optimizer.lr=1e-3,1e30 > "$home/1.out" 2>&1 || code=$?
[[ $code == 1 && $(finished seed=) == 2 && $(grep -c "not finite" "$home/1.out") -ge 2 ]] || fail "1: $code"
echo "1 ok: 2 jobs finished, 2 diverged, exit code 1"

# 2: interrupted
"${sweep[@]}" "${long[@]}" name=preempted > "$home/2.out" 2>&1 &
wait_for 'grep -qs train/loss "$STU_RUNS/lds/lru/preempted/metrics.csv"'
for signal in TERM CONT USR2; do # as SLURM preempts
    scancel --signal=$signal "$(squeue --noheader --format=%A)"
done
wait_for '[[ $(state) == PENDING ]]'
wait $! || fail "2: exit code $?"
"$python" - "$STU_RUNS"/lds/lru/{preempted,whole} << 'EOF' || fail "2: another result"
import json, sys
from pathlib import Path
(once, whole) = [json.loads((Path(run) / "summary.json").read_text()) for run in sys.argv[1:]]
starts = json.loads((Path(sys.argv[1]) / "manifest.json").read_text())["starts"]
print([start["resumed"] for start in starts], once["test"], whole["test"])
sys.exit([start["resumed"] for start in starts] != [False, True] or once["test"] != whole["test"])
EOF
echo "2 ok: preempted, queued again, the same result"

# 3: SLURM's own two tasks are the two processes
"${sweep[@]}" trainer=ddp trainer.accelerator=cpu trainer.devices=2 trainer.max_steps=6 trainer.val_check_interval=3 seed=4 \
    name=ddp > "$home/3.out" 2>&1 || fail "3: exit code $?"
grep -q "ntasks-per-node=2" "$STU_RUNS"/.sweeps/*/slurm/*submission.sh && [[ $(finished ddp) == 1 ]] || fail "3: no result"
echo "3 ok: one run on two tasks"

# 4: the queue is closed while the sweep is killed
scontrol update PartitionName=main State=DOWN
once=(trainer.max_steps=6 trainer.val_check_interval=3 seed=5 name=queued)
"${sweep[@]}" "${once[@]}" > "$home/4.out" 2>&1 &
wait_for '[[ $(state) == PENDING ]]'
{ kill -9 $! && wait $!; } 2> /dev/null || true
"${sweep[@]}" "${once[@]}" >> "$home/4.out" 2>&1 &
wait_for '[[ $(cat "$STU_RUNS"/.sweeps/*/jobs.jsonl | grep lru/queued | grep -c running) == 2 ]]'
[[ $(state) == PENDING ]] || fail "4: queued twice"
scontrol update PartitionName=main State=UP
wait $! || fail "4: exit code $?"
[[ $(finished queued) == 1 ]] || fail "4: no result"
wait_for '[[ -z $(state) ]]'
echo "4 ok: the killed sweep has found its job in the queue"
echo "slurm_check: all well"
