"""The one thread that owns the model, and the bounded queue of jobs before it. It knows neither HTTP nor tokens."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from configs.load import UserError
from evaluation.engine.memory.division import ContextTooLong
from evaluation.server.errors import ApiError
from evaluation.server.work import Cancelled, Done, Event, Job

logger = logging.getLogger(__name__)


class Worker(Collector):
    """A context manager: the thread runs inside it; leaving it cancels what is left and waits for the thread.

    Args:
        run: serves one job.
        recover: called after a job that failed, before the next one.
        max_queue: how many jobs may wait while one is served.
    """

    def __init__(self, run: Callable[[Job], Done], *, recover: Callable[[], None], max_queue: int) -> None:
        self._run, self._recover, self._max_queue = run, recover, max_queue
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._last_seconds = 1.0  # how long the last job took
        self._thread = threading.Thread(target=self._serve_all, name="model", daemon=True)

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Take no more jobs, and end the running one and those that wait with an error that says why."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancel()
            self._changed.notify()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Put a job into the queue; an `ApiError` if it is full or the server is stopping."""
        with self._changed:
            if self._closed:
                raise _stopping()
            self._forget_cancelled()
            if len(self._waiting) + (self._running is not None) > self._max_queue:
                message = f"the queue is full: --max-queue lets {self._max_queue} requests wait; try again later"
                headers = {"Retry-After": str(max(1, math.ceil(self._last_seconds)))}
                raise ApiError(message, status=429, code="queue_full", headers=headers)
            self._waiting.append(job)
            self._changed.notify()

    def collect(self) -> Iterator[Any]:
        """The lengths of the queue for `/metrics`."""
        with self._changed:
            self._forget_cancelled()
            running, waiting = int(self._running is not None), len(self._waiting)
        yield GaugeMetricFamily("remoe_num_requests_running", "being served", running)
        yield GaugeMetricFamily("remoe_num_requests_waiting", "waiting for the model", waiting)

    def _serve_all(self) -> None:
        while (job := self._next()) is not None:
            started = time.perf_counter()
            last_event = self._serve(job)
            with self._changed:
                self._running, self._last_seconds = None, time.perf_counter() - started
            job.send(last_event)  # only now: who hears it finds a place in the queue

    def _next(self) -> Job | None:
        """The next job, once there is one; None when the server stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                while self._waiting:
                    self._waiting.popleft().send(_stopping())
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _serve(self, job: Job) -> Event:
        """Run one job; whatever happens to it, the next one finds a working model."""
        try:
            if job.is_cancelled:
                raise Cancelled
            return self._run(job)
        except Cancelled:
            return _stopping()
        except ContextTooLong as error:
            return ApiError(str(error), status=400, code="context_length_exceeded")
        except (UserError, OSError) as error:
            logger.error("a request failed: %s", error)
            self._recover()
            return ApiError(f"the model cannot be read: {error}", status=500, code="read_error")
        except Exception:
            logger.exception("a request failed")
            self._recover()
            return ApiError("internal error; the server's log says more", status=500)

    def _forget_cancelled(self) -> None:
        self._waiting = deque(job for job in self._waiting if not job.is_cancelled)


def _stopping() -> ApiError:
    return ApiError("the server is stopping", status=503, code="stopping", headers={"Retry-After": "10"})
