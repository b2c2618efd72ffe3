"""Gloo processes for tests: started once, then given functions to run, with a hard time limit."""

import io
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT_S = 120  # for a machine that is busy with other work; a job takes a second


def _pack(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpack(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def _work(rank, size, store, jobs, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=LIMIT_S),
    )  # fmt: skip
    groups = {size: dist.group.WORLD}
    for fewer in range(1, size):
        groups[fewer] = dist.new_group(list(range(fewer)))
    while (job := jobs.get()) is not None:
        function, members, arguments = _unpack(job)
        answer = None
        if rank < members:
            try:
                answer = ("ok", function(groups[members], *arguments))
            except Exception as error:
                answer = ("error", type(error).__name__, str(error), traceback.format_exc())
        results.put((rank, _pack(answer)))
    results.close()
    results.join_thread()
    os._exit(0)  # a group that a test has broken does not shut down


class Workers:
    """``size`` processes; a job runs on the first ``members`` of them, as a group of their own."""

    def __init__(self, size, folder):
        context = mp.get_context("spawn")
        self.results = context.Queue()
        self.jobs = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(
                target=_work, args=(rank, size, folder / "store", jobs, self.results), daemon=True
            )
            for rank, jobs in enumerate(self.jobs)
        ]
        for process in self.processes:
            process.start()
        self.broken = False

    def answers(self, members, function, *arguments):
        """What each process answers: ("ok", value) or ("error", type, text, traceback)."""
        assert not self.broken, "a job before this one did not end"
        for jobs in self.jobs:
            jobs.put(_pack((function, members, arguments)))
        found = {}
        try:
            for _ in self.processes:
                rank, answer = self.results.get(timeout=LIMIT_S)
                found[rank] = _unpack(answer)
        except Empty:
            self.broken = True
            for process in self.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__}: only {sorted(found)} answered") from None
        return [found[rank] for rank in range(members)]

    def run(self, members, function, *arguments):
        """The values of all processes; an error of one is an error here."""
        answers = self.answers(members, function, *arguments)
        for answer in answers:
            assert answer[0] == "ok", answer[-1]
        return [answer[1] for answer in answers]

    def stop(self):
        for jobs in self.jobs:
            jobs.cancel_join_thread()
            jobs.put(None)
        for process in self.processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()


def torchrun(script, *arguments, options=(), **environment):
    """Two processes of a script in tests/, started as a user would; what they wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, *options, str(Path(__file__).parent / script), *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def shards(values, rows):
    """A tensor cut into parts of these many rows."""
    return list(values.split(list(rows)))
