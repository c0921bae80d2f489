"""A user's machine before the hub: runs command lines, each in a fork of a process that has imported what they need.

`python hub_user.py` reads one JSON list from each line of its input: the words of a command, `-c` and code or a script
and its flags; changes to the environment; the file that takes what is printed. It answers with the exit code.
"""

import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

import datasets.load  # noqa: F401

sys.path[:0] = [str(Path(__file__).parent.parent)]
import train_text_to_image_lora  # noqa: E402, F401


def run(words, changes, printed):
    """Run a command in this process and end it."""
    output = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ.update(changes)
    code = 0
    try:
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__", "words": words[2:]})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if os.environ.get("IMPATIENT"):  # the client waits up to half a minute between its attempts
        from huggingface_hub.utils import _http

        from training_utils.data.streaming import remote

        remote.RETRY_SECONDS = (0, 0)
        _http.time = type("", (), {**vars(time), "sleep": lambda seconds: None})
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if not child:
            run(*command)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
