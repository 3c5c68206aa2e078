"""Python in another process that has torch already, which takes seconds, and neither timm, huggingface_hub nor gzoo.

Imports nothing of these itself, as the other process imports this module.
"""

import multiprocessing
import os
import subprocess
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "torchvision"])  # timm imports both


def command(*arguments: str) -> str:
    """Code that runs gzoo with these arguments, as from the command line."""
    return f"import sys; from gzoo.cli import main; sys.exit(main({[*arguments]}))"


def start(code: str, out: str = os.devnull, err: str = os.devnull, **environment: str) -> BaseProcess:
    """Begins to run code; what it prints goes to the files ``out`` and ``err``."""
    process = _SERVER.Process(target=_run, args=(code, out, err, os.environ | environment))
    process.start()
    return process


def run(code: str, timeout: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code with some more environment variables, and gives what `subprocess.run` would of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(code, str(out), str(err), **environment)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(code, process.exitcode, out.read_text(), err.read_text())


def _run(code: str, out: str, err: str, environment: dict[str, str]) -> None:
    os.environ.clear()  # the server may have started under a test that changed some
    os.environ.update(environment)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    import torch

    torch.set_num_threads(1)
    exec(code, {"__name__": "__main__"})
