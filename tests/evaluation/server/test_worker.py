"""The queue is bounded and fair, a job may leave it, and whatever a job does the thread goes on."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from configs.load import UserError
from evaluation.server.errors import ApiError
from evaluation.server.work import Cancelled, Done, Event, Job, Work
from evaluation.server.worker import Worker

WORK = Work([[1]], [1])
DONE = Done(1, 1, 0, {})
WAIT_SECONDS = 60


class Acting:
    """A server of jobs that does what the test says, in the worker's thread."""

    def __init__(self) -> None:
        self.resets = 0
        self.acts: dict[Job, Callable[[], Any]] = {}

    def run(self, job: Job) -> Done:
        self.acts.get(job, lambda: None)()
        return DONE

    def recover(self) -> None:
        self.resets += 1


class Client:
    """Submits one job and reads its events."""

    def __init__(self, server: Acting, act: Callable[[], Any] | None = None) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.job = Job(WORK, self.events.put)
        if act:
            server.acts[self.job] = act

    def next(self) -> Event:
        return self.events.get(timeout=WAIT_SECONDS)

    def error(self) -> ApiError:
        event = self.next()
        assert isinstance(event, ApiError)
        return event


class Gate:
    """A job that holds the thread until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(WAIT_SECONDS)


def test_jobs_are_served_in_order_and_a_full_queue_is_told_when_to_come_again() -> None:
    server, gate, order = Acting(), Gate(), list[int]()
    with Worker(server.run, recover=server.recover, max_queue=2) as worker:
        running = Client(server, gate)
        worker.submit(running.job)
        assert gate.entered.wait(WAIT_SECONDS)
        waiting = [Client(server, lambda i=i: order.append(i)) for i in range(2)]
        for client in waiting:
            worker.submit(client.job)
        late = Client(server)
        with pytest.raises(
            ApiError, match="the queue is full: --max-queue lets 2 requests wait; try again later"
        ) as refused:
            worker.submit(late.job)
        assert refused.value.status == 429
        assert refused.value.headers is not None
        assert int(refused.value.headers["Retry-After"]) >= 1
        waiting[0].job.cancel()
        worker.submit(late.job)  # its place is free
        gate.opened.set()
        assert (running.next(), waiting[1].next(), late.next()) == (DONE, DONE, DONE)
    assert order == [1], "a job that left the queue is not served"


def test_without_a_queue_one_request_is_served_at_a_time() -> None:
    server, gate = Acting(), Gate()
    with Worker(server.run, recover=server.recover, max_queue=0) as worker:
        first, second = Client(server, gate), Client(server)
        worker.submit(first.job)
        with pytest.raises(ApiError, match="lets 0 requests wait"):
            worker.submit(second.job)
        gate.opened.set()
        assert first.next() == DONE
        worker.submit(second.job)  # who has an answer finds the place free
        assert second.next() == DONE


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(5, "Input/output error"), r"the model cannot be read: .*Input/output error"),
        (UserError("short read of layer 0"), "the model cannot be read: short read of layer 0"),
        (RuntimeError("secret details"), "internal error; the server's log says more"),
    ],
)
def test_a_job_that_fails_is_told_so_and_the_next_starts_from_an_empty_cache(error: Exception, message: str) -> None:
    server = Acting()
    with Worker(server.run, recover=server.recover, max_queue=1) as worker:
        failing, sound = Client(server, raising(error)), Client(server)
        worker.submit(failing.job)
        told = failing.error()
        worker.submit(sound.job)
        assert sound.next() == DONE
    assert told.status == 500
    with pytest.raises(ApiError, match=message):
        raise told
    assert server.resets == 1


def test_stopping_breaks_off_what_runs_and_refuses_what_waits() -> None:
    server, entered = Acting(), threading.Event()

    def until_cancelled() -> None:
        entered.set()
        assert running.job._cancelled.wait(WAIT_SECONDS)
        raise Cancelled

    with Worker(server.run, recover=server.recover, max_queue=1) as worker:
        running, waiting = Client(server, until_cancelled), Client(server)
        worker.submit(running.job)
        assert entered.wait(WAIT_SECONDS)
        worker.submit(waiting.job)
        assert worker.is_alive
    assert not worker.is_alive
    assert [running.error().status, waiting.error().status] == [503, 503]
    with pytest.raises(ApiError, match="the server is stopping"):
        worker.submit(Client(server).job)
    assert server.resets == 0
