import threading
import time

import pytest
import torch

from flowcache.runtime.overlap import MAX_WAITING, Worker, should_overlap


def test_work_is_done_in_order_in_another_thread():
    order: list[int] = []

    def work(number: int) -> int:
        order.append(number)
        assert threading.current_thread() is not threading.main_thread()
        return number * number

    with Worker("test") as worker:
        results = [worker.submit(lambda i=i: work(i)) for i in range(6)]
    assert [result.result() for result in results] == [0, 1, 4, 9, 16, 25]
    assert order == list(range(6))


def test_only_so_much_waits():
    gate, submitted = threading.Event(), []

    def fill(worker: Worker) -> None:
        for number in range(MAX_WAITING + 1):
            worker.submit(gate.wait)
            submitted.append(number)

    with Worker("test") as worker:
        filler = threading.Thread(target=fill, args=(worker,))
        filler.start()
        time.sleep(0.3)
        assert len(submitted) == MAX_WAITING
        gate.set()
        filler.join(timeout=10)
        assert len(submitted) == MAX_WAITING + 1


def test_small_work_takes_no_room():
    gate, order = threading.Event(), []
    with Worker("test") as worker:
        for number in range(MAX_WAITING):  # would wait for the gate if small work counted
            worker.submit(lambda: gate.wait(timeout=10))
            worker.submit(lambda number=number: order.append(number), is_small=True)
        assert order == []
        gate.set()
    assert order == list(range(MAX_WAITING))
    assert serial().submit(lambda: 3, is_small=True).result() == 3


def serial() -> Worker:
    return Worker("test", is_concurrent=False)


def fail() -> None:
    raise ValueError("the decoder broke")


def test_what_fails_is_raised_where_it_is_asked_for_and_stops_what_follows():
    with pytest.raises(ValueError, match="the decoder broke"), Worker("test") as worker:
        broken = worker.submit(fail)
        with pytest.raises(ValueError, match="the decoder broke"):
            broken.result()
        with pytest.raises(ValueError, match="the decoder broke"):
            worker.submit(time.time)


def test_what_nobody_asks_for_is_raised_at_the_end_unless_another_error_is():
    with pytest.raises(ValueError, match="the decoder broke"), Worker("test") as worker:
        worker.submit(fail)
    with pytest.raises(KeyError, match="mine"), Worker("test") as worker:
        worker.submit(fail)
        raise KeyError("mine")


def test_after_an_interrupt_what_was_submitted_is_finished_and_no_thread_stays():
    done: list[int] = []
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Worker("test") as worker:
        worker.submit(lambda: (time.sleep(0.1), done.append(1)))
        raise KeyboardInterrupt
    assert done == [1]
    assert threading.active_count() == before


def test_a_serial_worker_works_at_once_and_raises_at_once():
    worker = serial()
    assert worker.submit(lambda: 3).result() == 3
    with pytest.raises(ValueError, match="the decoder broke"):
        worker.submit(fail)


def test_gradients_are_off_in_a_worker():
    weight = torch.ones(2, requires_grad=True)
    with Worker("test", device=torch.device("cpu"), is_concurrent=True) as worker:
        assert not worker.submit(lambda: weight * 2).result().requires_grad


def test_decoding_overlaps_on_cuda_unless_it_takes_turns():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert should_overlap(None, cuda, takes_turns=False)
    assert not should_overlap(None, cpu, takes_turns=False)
    assert should_overlap(True, cpu, takes_turns=False)
    assert not should_overlap(True, cuda, takes_turns=True)


@pytest.mark.gpu
def test_a_worker_on_cuda_waits_for_what_the_caller_has_queued():
    device = torch.device("cuda")
    x = torch.zeros(4096, 4096, device=device)
    with Worker("test", device=device, is_concurrent=True) as worker:
        for _ in range(20):
            x += 1
        now = x.clone()
        assert worker.submit(lambda: now.sum()).result().item() == 20 * 4096 * 4096
