"""The lines rendered for containers, executed: by programs that check what they are given, and leave the container itself out.

apptainer is a command, so a stand-in of that name can be put in front. The options of pyxis are a plugin's, without which srun
refuses them: a stand-in for srun takes them out, so that no more than their spelling is shown.
"""

import shlex
import shutil
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
APPTAINER = """
set -eu
[ "$1" = exec ]
shift
binds=
while [ "${1#--}" != "$1" ]; do
  case $1 in
    --bind=*) source=${1#--bind=}; source=${source%%:*}; [ -e "$source" ]; binds="$binds $source" ;;
    --pwd=*) folder=${1#--pwd=} ;;
    --cleanenv | --nv) ;;
    *) echo "apptainer: unknown flag $1" >&2; exit 64 ;;
  esac
  shift
done
[ -f "$1" ] || { echo "FATAL: could not open image $1" >&2; exit 255; }
shift
for bound in $binds; do case $folder/ in $bound/*) inside=1 ;; esac; done
[ "$inside" ]
cd "$folder"
"""
SRUN = """
nodes=$1
shift
while [ "${1#--container-}" != "$1" ]; do shift; done
set -- "$nodes" "$@"
"""


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_run_in_a_container(run, reference, runtime):
    stand_ins = run.folder / "bin"
    stand_ins.mkdir()
    image = run.folder / "an image.sif"
    image.touch()
    mount = (
        next(word for word in run.settings if word.startswith("data.corpora.0.prefix=")).partition("=")[2].rpartition("/")[0]
    )
    said = run.folder / "said"
    name, body, then = ("apptainer", APPTAINER, "") if runtime == "apptainer" else ("srun", SRUN, shutil.which("srun"))
    note = f'echo "$@" >>{shlex.quote(str(said))}\n'
    (stand_ins / name).write_text(f'#!/bin/sh\n{note}{body}exec {then} "$@"\n')
    (stand_ins / name).chmod(0o755)
    flag = "--nv" if runtime == "apptainer" else "--container-remap-root"
    run.submit(
        f"launcher.slurm.setup=['export PATH={stand_ins}:$PATH']",
        f"launcher.slurm.python={sys.executable}",
        f"launcher.slurm.container={{runtime:{runtime},image:'{image}',mounts:['{mount}'],flags:['{flag}']}}",
        "launcher.preflight.enabled=false",
        "tracking.wandb.mode=disabled",
    )
    run.wait_for_end()
    assert run.metrics() == reference
    calls = said.read_text().splitlines()
    if runtime == "apptainer":
        assert len(calls) == 2 + 4  # once per node before, then once per rank
        expected = (
            f"exec --bind={run.folder}:{run.folder} --bind={mount}:{mount} --pwd={run.folder} --nv {image} {sys.executable} -m"
        )
    else:
        assert len(calls) == 2
        expected = (
            f"--nodes=2 --container-image={image} --container-mounts={run.folder}:{run.folder},{mount}:{mount}"
            f" --container-workdir={run.folder} --container-remap-root --ntasks="
        )
    assert all(call.startswith(expected) for call in calls)
