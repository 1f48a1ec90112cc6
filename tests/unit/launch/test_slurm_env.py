"""What a task of srun learns from its environment."""

import pytest

from lctrain.errors import UserError
from lctrain.launch import slurm_env
from lctrain.launch.process import Process
from lctrain.launch.slurm_env import interface_towards, set_meeting_place, tasks_per_node

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "gpu[7,9]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3,1,2",
}


def test_a_task_among_several_is_a_rank():
    assert Process.from_env(TASK) == Process(5, 6, 1, 2)


def test_torchrun_inside_a_task_goes_first():
    env = {**TASK, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert Process.from_env(env) == Process(3, 4, 1, 2)


@pytest.mark.parametrize("missing", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"])
def test_a_batch_script_is_no_rank(missing):
    assert Process.from_env({name: value for name, value in TASK.items() if name != missing}) is None


def test_an_interactive_step_of_one_task_is_no_rank():
    """In `srun --pty bash`, `lctrain train launcher.processes=4` starts processes of its own."""
    assert Process.from_env({**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize("change", [{"SLURM_STEP_TASKS_PER_NODE": "x"}, {"SLURM_NODEID": "3"}, {"SLURM_PROCID": "?"}])
def test_impossible_variables_are_refused(change):
    with pytest.raises(UserError, match="SLURM's variables of this task cannot be read"):
        Process.from_env({**TASK, **change})


@pytest.mark.parametrize(("text", "counts"), [("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("8(x2),4(x1)", [8, 8, 4])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


class TestMeetingPlace:
    def test_from_scontrol(self, monkeypatch):
        answers = {
            ("scontrol", "show", "hostnames", "gpu[7,9]"): "gpu7\ngpu9\n",
            ("scontrol", "-o", "show", "node", "gpu7"): "NodeName=gpu7 CPUTot=4 NodeAddr=127.0.0.1 NodeHostName=x",
        }
        monkeypatch.setattr(slurm_env, "_output", lambda *command: answers[command])
        env = dict(TASK)
        set_meeting_place(env)
        assert (env["MASTER_ADDR"], env["GLOO_SOCKET_IFNAME"]) == ("127.0.0.1", "lo")

    def test_every_restart_has_a_port_of_its_own(self):
        def port(job, life):
            env = {**TASK, "MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(life)}
            set_meeting_place(env)
            return int(env["MASTER_PORT"])

        ports = [port(job, life) for job in range(1000, 1100) for life in range(10)]
        assert len(set(ports)) == len(ports)
        assert all(20000 <= port < 30000 and port + 1 not in ports for port in ports)

    def test_what_is_there_stays(self):
        env = {**TASK, "MASTER_ADDR": "a", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "ib0"}
        before = dict(env)
        set_meeting_place(env)
        assert env == before

    def test_outside_of_slurm_nothing_happens(self):
        env: dict[str, str] = {}
        set_meeting_place(env)
        assert env == {}

    def test_without_scontrol_it_is_the_users_turn(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(UserError, match=r"scontrol does not tell the address of the first of gpu\[7,9\]: set MASTER_ADDR"):
            set_meeting_place(dict(TASK))


def test_interface_towards():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no such name") is None
