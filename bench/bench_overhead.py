"""What a public function adds to the dispatcher's call of its operators, on tiny inputs.

The calls that the public function makes are recorded once, with their arguments, and replayed
bare: both do the same computing. The difference is Python: checks, conversions, autograd's set-up.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from als_ext import SampleWeights
from als_ext.ops import knn, knn_vote, sample_loss, weighted_loss
from bench.race import Lineup, Race

REPEAT = 200
BARE = "bare dispatcher"


class Recorder(TorchDispatchMode):
    """Notes the calls of als_ext's operators that go by."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "als_ext":
            self.calls.append((function, args, kwargs))
        return function(*args, **kwargs)


def repeated(call, count):
    def loop():
        for _ in range(count):
            call()

    return loop


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result or [])


def setup(public, peer, quick, device):
    call, usual = public(), peer()
    with Recorder() as recorder:
        result = flat(call())

    def replay():
        last = None
        for function, args, kwargs in recorder.calls:
            last = function(*args, **kwargs)
        return last

    def error():
        if not result:  # in place
            return 0.0
        again = flat(replay())[: len(result)]
        return float(sum((a != b).sum().item() for a, b in zip(result, again, strict=True)))

    count = 2 if quick else REPEAT
    lineup = Lineup("results that differ from those of the bare calls", 0.0)
    lineup.ours(repeated(call, count), error, repeat=count)
    lineup.peer("torch", repeated(usual, count), repeat=count)
    lineup.ceiling(BARE, repeated(replay, count), repeat=count)
    lineup.at_most = {"overhead_us": 10.0}
    lineup.derive = lambda medians: {"overhead_us": 1e6 * (medians["ours"] - medians[BARE])}
    return lineup


def tiny():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=g)
    return logits, torch.tensor([0, 1, 2, 0]), torch.rand(4, generator=g)


def public_sample_loss():
    logits, target, _ = tiny()
    return partial(sample_loss, logits, target)


def public_weighted_loss():
    return partial(weighted_loss, *tiny())


def torch_loss():
    logits, target, _ = tiny()
    return partial(F.cross_entropy, logits, target, reduction="none")


def torch_weighted():
    logits, target, weight = tiny()
    return lambda: (weight * F.cross_entropy(logits, target, reduction="none")).sum()


def public_knn():
    return partial(knn, torch.eye(4), torch.eye(4), 2)


def torch_knn():
    x = torch.eye(4)
    return lambda: torch.cdist(x, x).topk(2, largest=False)


def public_vote():
    distance, index = knn(torch.eye(4), torch.eye(4), 2)
    return partial(knn_vote, distance, index, torch.tensor([0, 1, 1, 0]), 2)


def torch_vote():
    index, label = torch.tensor([[0, 1]] * 4), torch.tensor([0, 1, 1, 0])
    return lambda: torch.nn.functional.one_hot(label[index], 2).sum(dim=1).max(dim=1)


def public_update():
    weights = SampleWeights(8)
    return partial(weights.update_, torch.tensor([0, 1, 2, 0]), torch.rand(4))


def torch_update():
    pi, index, loss = torch.full((8,), 0.125), torch.tensor([0, 1, 2, 0]), torch.rand(4)
    return lambda: pi.log().index_add(0, index, loss, alpha=1e-3).softmax(0)


def public_read():
    return partial(SampleWeights(8).half_weight, torch.tensor([0, 1, 2, 0]))


def torch_read():
    pi, index = torch.full((8,), 0.125), torch.tensor([0, 1, 2, 0])
    return lambda: pi[index] * 8


PAIRS = {
    "sample_loss": (public_sample_loss, torch_loss),
    "weighted_loss": (public_weighted_loss, torch_weighted),
    "knn": (public_knn, torch_knn),
    "knn_vote": (public_vote, torch_vote),
    "SampleWeights.update_": (public_update, torch_update),
    "SampleWeights.half_weight": (public_read, torch_read),
}


def races(quick):
    for name, (public, peer) in PAIRS.items():
        yield Race("overhead", name, partial(setup, public, peer, quick), True)
