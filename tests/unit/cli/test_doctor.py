"""`lctrain doctor` finds what is broken and says so by its exit status."""

import subprocess

from lctrain.commands import doctor


def test_a_fit_machine(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "2 processes added up a tensor" in out
    assert "BROKEN" not in out


def test_a_missing_package_and_dead_processes(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "GLOO_TEST", "raise SystemExit('no network here')")
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "no network here" in out
    assert "broken: no-such-package, processes talk (gloo)" in out


def test_silent_processes_are_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "GLOO_TIMEOUT_S", 0.2)
    monkeypatch.setattr(doctor, "GLOO_TEST", "import time; time.sleep(60)")
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[-1])
    assert doctor._gloo() == doctor.Finding("processes talk (gloo)", "no answer within 0.2 s", False)
    assert all(process.returncode is not None for process in started)
