"""SIGTERM and SIGINT end a run between two steps; processes that load images outlive them."""

import atexit
import multiprocessing
import signal

KINDS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Notes what came, so that a run ends between two steps; the same again ends it at once.

    Not the other kind: torchrun answers Ctrl-C, which all processes get, with SIGTERM to each.
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
    """A DataLoader's `worker_init_fn`: whoever signals a whole group still gets a checkpoint."""
    for kind in KINDS:
        signal.signal(kind, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Before Python waits for them: after an error a traceback holds them, and SIGTERM does not."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise at each one's end
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
