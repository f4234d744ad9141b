"""SIGTERM and SIGINT end a run between two steps; the processes that load images ignore them."""

import atexit
import multiprocessing
import signal

KINDS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Notes a signal, so that a run ends between two steps; the same signal again ends it at once.

    The other signal does not: after Ctrl-C, torchrun also sends SIGTERM to each process.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "Signals":
        self.before = [signal.signal(kind, self._note) for kind in KINDS]
        return self

    def __exit__(self, *error) -> None:
        for kind, handler in zip(KINDS, self.before, strict=True):
            signal.signal(kind, handler)

    def _note(self, kind: int, frame) -> None:
        self.received = kind
        signal.signal(kind, signal.SIG_DFL)


def ignore_signals(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a signal to the whole group does not end the loaders."""
    for kind in KINDS:
        signal.signal(kind, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Kills loaders before Python waits for them: they ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or PyTorch's handler would raise
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
