"""Two real processes on loopback, and every way to ask for several that cannot work."""

import os
import signal
import threading

import pytest
from processes import run_processes

from jaxgen import distributed
from jaxgen.errors import UserError


def test_two_processes_share_meet_and_stop_at_one_step():
    outputs = run_processes("""
        print("devices", jax.device_count(), jax.process_count())
        print("shared", distributed.share("word", "hello" if me == 0 else None))
        print("shared", distributed.share("word", "again" if me == 0 else None))
        distributed.barrier("all here", 30)
        if me == 0:
            try:
                distributed.barrier("nobody else comes", 0.5)
            except TimeoutError as error:
                print("late:", error)
        distributed.barrier("go", 30)
        with distributed.Preemption() as preemption:
            for step in range(1, 400):
                time.sleep(0.01 + 0.01 * me)  # One is slower: they are not at the same step.
                if step == 10 and me == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if preemption.reached(step):
                    print("stopped", step)
                    break
        """)
    for output in outputs:
        assert "devices 4 2" in output
        assert "shared hello\nshared again" in output
    assert "at barrier 'nobody else comes' for process 1;" in outputs[0]
    stopped = [out.split("stopped ")[1].strip() for out in outputs]
    assert stopped[0] == stopped[1]
    assert int(stopped[0]) >= 10


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES is not; set"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not"),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "h:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_NUM_PROCESSES='two' is not a number",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "numbered from 0",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "h", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            "JAX_COORDINATOR_ADDRESS='h' is not host:port",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            "could not reach JAX_COORDINATOR_ADDRESS=127.0.0.1:1 within 0.2 s",
        ),
    ],
)
def test_what_cannot_start_is_one_line(environ, message):
    with pytest.raises(UserError, match=message) as caught:
        distributed.initialize(environ, timeout_s=0.2)
    assert "\n" not in str(caught.value)


def test_one_process_needs_nothing():
    distributed.initialize({})
    distributed.initialize({"SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_ID": "7"})
    one = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}
    distributed.initialize(one)
    distributed.barrier("alone", 0.1)
    assert distributed.share("word", "mine") == "mine"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_the_handlers_come_back(number, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with distributed.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), number)
        assert preemption.reached(2)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert f"{signal.Signals(number).name}: saving after this step" in capfd.readouterr().err


def test_a_second_interrupt_is_at_once():
    with distributed.Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.reached(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_is_installed():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def enter():
        with distributed.Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.reached(1)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
