import threading
import time
import weakref

import pytest
import torch

from deltacome_core.pipeline import read_ahead, run_jobs

CPU = torch.device("cpu")


def test_reading_keeps_the_order_and_stays_one_item_ahead():
    begun, taken = [], []

    def load(item):
        begun.append(item)
        assert item <= len(taken) + 2
        return item * item

    for value in read_ahead(range(20), load):
        time.sleep(0.001)
        taken.append(value)
    assert taken == [item * item for item in range(20)]
    assert begun == list(range(20))


def test_what_loading_raises_comes_out_where_the_item_would():
    def load(item):
        if item == 2:
            raise OSError("gone")
        return item

    items = read_ahead(range(5), load)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(items)


@pytest.mark.parametrize("made_on_first", [True, False])
@pytest.mark.parametrize("n_devices", [1, 2, 3])
def test_every_job_is_done_and_stored_once(n_devices, made_on_first):
    stored, storing = [], threading.Lock()

    def prepare(job, device):
        assert device == CPU

        def store():
            assert storing.acquire(blocking=False)
            stored.append(job)
            storing.release()

        return store

    run_jobs(iter(range(30)), prepare, devices=[CPU] * n_devices, made_on_first=made_on_first)
    assert sorted(stored) == list(range(30))
    if n_devices == 1:
        assert stored == list(range(30))


def test_several_devices_work_at_the_same_time():
    both = threading.Barrier(2, timeout=20)

    def prepare(_job, _device):
        both.wait()
        return lambda: None

    run_jobs(iter(range(2)), prepare, devices=[CPU, CPU], made_on_first=False)


def test_the_first_device_does_not_work_while_a_job_is_made_on_it():
    first, second = torch.device("cpu"), torch.device("cpu", 0)
    busy = threading.Lock()

    def jobs():
        for job in range(8):
            with busy:
                time.sleep(0.001)
            yield job

    def prepare(_job, device):
        if device is first:
            assert busy.acquire(blocking=False)
            time.sleep(0.005)
            busy.release()
        return lambda: None

    run_jobs(jobs(), prepare, devices=[first, second], made_on_first=True)


class Held:
    """Stands for a layer's Hessians: gigabytes, of which only one set fits."""


def test_a_job_is_let_go_before_the_next_one_is_made():
    held = []

    def jobs():
        for _ in range(4):
            assert not any(each() for each in held)
            job = Held()
            held.append(weakref.ref(job))
            yield job
            del job

    run_jobs(jobs(), lambda _job, _device: lambda: None, devices=[CPU], made_on_first=True)
    assert len(held) == 4


@pytest.mark.parametrize("where", ["prepare", "store"])
@pytest.mark.parametrize("n_devices", [1, 2])
def test_an_error_ends_the_run(where, n_devices):
    stored = []

    def prepare(job, _device):
        if where == "prepare" and job == 3:
            raise ValueError("bad job")

        def store():
            if where == "store" and job == 3:
                raise ValueError("bad job")
            stored.append(job)

        return store

    with pytest.raises(ValueError, match="bad job"):
        run_jobs(iter(range(100)), prepare, devices=[CPU] * n_devices, made_on_first=False)
    assert 3 not in stored
    assert len(stored) < 100
