"""Scripts in processes of their own that need not import torch, as that takes ten seconds: forks of one that has."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["train_text_to_image", "train_text_to_image_lora_sdxl", "train_text_to_image_lora_prior"]
    + ["train_text_to_image_lora_decoder", "datasets", "torch.utils.tensorboard"]
)
GRACE = 30  # seconds for the other processes, when one has failed


class Forked:
    """One process that runs a script, given as its command line, or several that meet at a port of this machine, as
    `accelerate launch` would start them. It has what subprocess.Popen has."""

    def __init__(self, words, folder, processes=1, port=None):
        with tempfile.NamedTemporaryFile("w", delete=False) as said:
            self.stdout = open(said.name)  # noqa: SIM115
        self.processes, self.ending = [], None
        for rank in range(processes):
            environment = dict(os.environ)
            if processes > 1:
                meeting = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                meeting |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment |= {name: str(value) for name, value in meeting.items()}
            self.processes.append(SERVER.Process(target=_run, args=(words, environment, str(folder), said.name)))
            self.processes[-1].start()
        self.pid = self.processes[0].pid

    @property
    def returncode(self):
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self):
        if self.ending is None and any(process.exitcode for process in self.processes):  # as a launcher does
            self.ending = time.monotonic()
            self.send_signal(signal.SIGTERM)
        if self.ending is not None and time.monotonic() - self.ending > GRACE:
            self.kill()
        return self.returncode

    def wait(self, timeout=None):
        until = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a forked script", timeout)
            time.sleep(0.01)
        with suppress(FileNotFoundError):  # what it said can still be read
            os.unlink(self.stdout.name)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return self.stdout.read(), None

    def send_signal(self, number):
        for process in self.processes:
            if process.exitcode is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.join()


def _run(words, environment, folder, output):
    """The child: the script as a program."""
    for standard in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), standard)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv, sys.orig_argv = words, [sys.executable, *words]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(words[0], run_name="__main__")
