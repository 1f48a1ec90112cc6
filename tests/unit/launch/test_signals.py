"""Stop signals become an attribute, and nothing else."""

import os
import signal
import threading

import pytest

from lctrain.launch import signals
from lctrain.launch.signals import STOP_SIGNALS, StopRequest, alarm_on_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_first_signal_is_named(number):
    with StopRequest() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        assert not stop.insisted


def test_repetition_within_a_second_is_the_same_request(monkeypatch):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.requested, stop.insisted) == ("SIGTERM", False)
        monkeypatch.setattr(signals, "SAME_REQUEST_S", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.requested, stop.insisted) == ("SIGTERM", True)


def test_handlers_are_put_back_also_after_an_error():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_ignored_signals_stay_ignored():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_outside_of_the_main_thread_nothing_is_requested():
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]


@pytest.mark.timeout(20)
def test_alarm_wakes_for_signals_and_for_ended_children():
    with StopRequest(), alarm_on_signals() as alarm:
        os.kill(os.getpid(), signal.SIGUSR1)
        alarm.wait(60)
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        alarm.wait(60)
        os.waitpid(pid, 0)
        alarm.wait(0.01)
