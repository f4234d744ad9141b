"""Time, in one place: wall and CPU time, and how they are added to a run."""

import time


def now() -> float:
    """Seconds of wall time, from a fixed moment on."""
    return time.monotonic()


def cpu_now() -> float:
    """Seconds of CPU time of all threads."""
    return time.process_time()


class Clock:
    """Adds the time that passes to a run's counters of seconds."""

    def __init__(self, run) -> None:
        self.run, self.last, self.last_cpu = run, now(), cpu_now()

    def tick(self, is_training: bool) -> None:
        """Counts what has passed since the last tick."""
        wall, cpu = now() - self.last, cpu_now() - self.last_cpu
        self.last, self.last_cpu = self.last + wall, self.last_cpu + cpu
        self.run.seconds += wall
        self.run.cpu_seconds += cpu
        if is_training:
            self.run.trained_seconds += wall
