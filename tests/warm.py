"""Command lines in processes of their own, without the seconds in which each imports torch.

A server has imported everything and forks for each command. Exit status, output, process group, signals and limits are
those of a process; what a new Python does before `main` is not tested here.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver

ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
IMPORTED = [
    "accelerate",
    "matplotlib.pyplot",
    "torch._dynamo",
    "unipre3d.cli",
    "unipre3d.features",
    "unipre3d.recipes",
]


def perform(words, out, err, folder, env, largest):
    "Be the process of a command line, in a session of its own; `out` and `err` are the ends of two pipes."
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests,
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or a shell in the background
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # or a server that is deaf to it
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    out.close()
    err.close()
    if largest is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    from unipre3d.cli import main

    sys.exit(main(words))


class Reader:
    "What comes out of a pipe, read while the process works."

    def __init__(self, end):
        self.text = ""
        self.thread = threading.Thread(target=self.read, args=(end,), daemon=True)
        self.thread.start()

    def read(self, end):
        with end, open(end.fileno(), encoding="utf-8", closefd=False) as file:
            self.text = file.read()


class Command:
    "A command line at work, with what tests use of `subprocess.Popen`."

    def __init__(
        self,
        *words,
        largest=None,  # bytes of a file that it may write
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        before = os.environ.copy()
        os.environ.update(ONE_THREAD)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(before)
        ends = [context.Pipe(duplex=False) for _ in ("output", "errors")]
        words = [str(word) for word in words]
        how = (os.getcwd(), before | ONE_THREAD, largest)
        writers = [writer for _, writer in ends]
        self.process = context.Process(target=perform, args=(words, *writers, *how))
        self.process.start()
        atexit.register(self.kill)  # where a test failed it may still work
        self.pid = self.process.pid
        for writer in writers:
            writer.close()
        self.readers = [Reader(reader) for reader, _ in ends]

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("unipre3d", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        "What it has printed, and its errors, once it has ended."
        self.wait(timeout)
        for reader in self.readers:
            reader.thread.join(timeout)
        out, err = (reader.text for reader in self.readers)
        return out, err

    def kill(self):
        if self.returncode is None:
            self.process.kill()
