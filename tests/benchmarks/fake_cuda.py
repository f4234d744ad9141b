"""A GPU that works through a queue while the host goes on; times in ms, no clock but its own."""

import contextlib

CYCLES_PER_MS = 1_500_000


class Event:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = max(self.cuda.free_at, self.cuda.host)

    def query(self):
        return self.at <= self.cuda.host

    def synchronize(self):
        self.cuda.host = max(self.cuda.host, self.at)

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    """The kernels of a call, launched together."""

    def __init__(self, cuda):
        self.cuda, self.ms = cuda, 0.0

    def replay(self):
        self.cuda.replays += 1
        self.cuda.launch(host=0.01, device=self.ms)

    def pool(self):
        return self


class Stream:
    def wait_stream(self, other):
        pass


class FakeCuda:
    """What a clock uses of torch.cuda; `queue` launches wait at most, then the host does."""

    def __init__(self, queue=1024, name="NVIDIA H200"):
        self.host = self.free_at = 0.0
        self.queue, self.name = queue, name
        self.ends, self.captured, self.flushes = [], None, 0
        self.current, self.replays = Stream(), 0

    def launch(self, host, device):
        """A kernel: time of the host to launch it, time of the device to run it."""
        self.host += host
        if self.captured is not None:
            self.captured.ms += device
            return
        if len(self.ends) >= self.queue:
            self.host = max(self.host, self.ends[-self.queue])
        self.free_at = max(self.free_at, self.host) + device
        self.ends.append(self.free_at)

    def flush(self):
        self.flushes += 1
        self.launch(host=0.005, device=0.1)

    def now(self):
        return self.host / 1e3

    def synchronize(self):
        if self.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.free_at)

    def Event(self, enable_timing):  # noqa: N802  (torch's name)
        return Event(self)

    def CUDAGraph(self):  # noqa: N802
        return Graph(self)

    def Stream(self):  # noqa: N802
        return Stream()

    def current_stream(self):
        return self.current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool=None):
        """Like PyTorch's, it stays on its stream where a capture fails."""
        before, self.current, self.captured = self.current, Stream(), graph
        try:
            yield
        finally:
            self.captured = None
        self.current = before

    def get_device_name(self):
        return self.name

    def _sleep(self, cycles):
        self.launch(host=0.005, device=cycles / CYCLES_PER_MS)
