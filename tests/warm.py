"""Command lines and scripts in processes of their own, without the seconds in which each imports torch.

A server has imported everything and forks for each. Exit status, output, process group, signals and limits are those of
a process; what a new Python does before `main`, and a launcher beside its processes, is not tested here.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing import forkserver

ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
IMPORTED = [
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl",
    "matplotlib.pyplot",
    "scipy.optimize",
    "scipy.spatial",
    "torch._dynamo",
    "torchmetrics.functional.image",
    "unipre3d._options",
    "unipre3d.cli",
    "unipre3d.features",
    "unipre3d.kernels.groups",
    "unipre3d.kernels.points",
    "unipre3d.kernels.splat",
    "unipre3d.recipes",
]


def command_line(words):
    "The exit status of a command line."
    from unipre3d.cli import main

    return main(words)


def script(words):
    "Run a file as Python does that is given it and its arguments."
    multiprocessing.set_start_method(None, force=True)  # as on this platform
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    runpy.run_path(words[0], run_name="__main__")


def perform(entry, words, out, err, folder, env, largest):
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
    sys.exit(entry(words))


class Reader:
    "What comes out of a pipe, read while the process works."

    def __init__(self, end):
        self.text = ""
        self.thread = threading.Thread(target=self.read, args=(end,), daemon=True)
        self.thread.start()

    def read(self, end):
        with end, open(end.fileno(), encoding="utf-8", closefd=False) as file:
            for line in file:
                self.text += line


class Command:
    "A command line at work, with what tests use of `subprocess.Popen`."

    def __init__(
        self,
        *words,
        entry=command_line,  # or `script`
        env=None,  # None: that of this process
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
        how = (os.getcwd(), (before if env is None else env) | ONE_THREAD, largest)
        writers = [writer for _, writer in ends]
        self.process = context.Process(target=perform, args=(entry, words, *writers, *how))
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


class Launch:
    "Several processes that find each other, as a launcher starts them; for what a launch is, `torchrun` is used."

    def __init__(self, processes, *words, **how):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        counts = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        env = os.environ | meeting | counts
        self.ranks = [
            Command(*words, env=env | {"RANK": str(k), "LOCAL_RANK": str(k)}, **how)
            for k in range(processes)
        ]

    @property
    def returncode(self):
        "0 where all have ended well, otherwise the first other one; None while all work or have ended well so far."
        codes = [rank.returncode for rank in self.ranks]
        bad = [code for code in codes if code]
        return bad[0] if bad else None if None in codes else 0

    def poll(self):
        return self.returncode

    def communicate(self, timeout=None):
        "What all have printed, one after the other, and their errors."
        said = [rank.communicate(timeout) for rank in self.ranks]
        return tuple("".join(parts) for parts in zip(*said))

    def kill(self):
        for rank in self.ranks:
            rank.kill()
