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


def start(code: str, folder: str = os.devnull, **environment: str) -> BaseProcess:
    """Begins to run code; what it prints goes to the files out and err of ``folder``."""
    process = _SERVER.Process(target=_run, args=(code, folder, os.environ | environment))
    process.start()
    return process


def run(code: str, timeout: float = 120.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code with some more environment variables, and gives what `subprocess.run` would of a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(code, folder, **environment)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(code, process.exitcode, out, err)


def _run(code: str, folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()  # the server may have started under a test that changed some
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        path = folder if folder == os.devnull else f"{folder}/{name}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    import torch

    torch.set_num_threads(1)
    exec(code, {"__name__": "__main__"})
