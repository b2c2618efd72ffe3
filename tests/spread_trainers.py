"""Trainers of others in one process, or in several when torchrun starts this file.

    python -m torch.distributed.run --nproc-per-node 2 spread_trainers.py TRAINER FOLDER

TRAINER is a function of this module.
"""

import logging
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from blobs import CLASSES, FEATURES, blobs
from torch.utils.data import DataLoader, DistributedSampler

from als_ext.data import IndexedDataset
from als_ext.models import MLP

JOINT, EPOCHS, STOP = 60, 6, 3


def processes():
    return int(os.environ.get("WORLD_SIZE", "1"))


def state_of(parameters, weights, labels, corrector):
    return {
        "parameters": [p.detach().clone() for p in parameters],
        "log_pi": weights.log_pi(),
        "labels": labels.clone(),
        "history": {k: v.clone() for k, v in corrector.state_dict()["history"].items()},
    }


def lightning(folder, epochs=EPOCHS, resume=None, shared=True, accumulate=1):
    from lightning.pytorch import LightningModule, Trainer

    from als_ext.integrations.lightning import AlsoMixin, BatchALSO, CorrectionCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = processes()

    class Net(AlsoMixin, LightningModule):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.net = MLP((FEATURES,), CLASSES, hidden=(32, 16))

        def embed(self, x):
            return self.net.embed(x)

        def training_step(self, batch, batch_idx):
            x, label, index = batch
            return self.weighted_loss(self.net(x), label, index)[0]

        def configure_optimizers(self):
            joint = {"group": dist.group.WORLD, "batch_size": JOINT // size} if shared else {}
            return BatchALSO(self.parameters(), n=n, pi_lr=0.1, lr=3e-3, weight_decay=0.0, **joint)

    n = 310  # the last joint batch is not full; two processes have 155 each
    x, given, _ = blobs(n)
    train_set = IndexedDataset(x, given)
    correction = CorrectionCallback(train_set, CLASSES, warmup=2, period=2)
    several = {"strategy": "ddp", "devices": size} if size > 1 else {"devices": 1}
    # Lightning puts in a DistributedSampler of this seed by itself where there are several.
    order = {"shuffle": True} if size > 1 else {"sampler": DistributedSampler(train_set, 1, 0)}
    net = Net()
    fit = Trainer(
        max_epochs=epochs, callbacks=[correction], accelerator="cpu", logger=False,
        accumulate_grad_batches=accumulate, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **several,
    )  # fmt: skip
    batch = JOINT // size // accumulate
    fit.fit(net, DataLoader(train_set, batch, **order), ckpt_path=resume, weights_only=True)
    if epochs == STOP:
        fit.save_checkpoint(folder / "stopped.ckpt")  # written by the first process
    weights = net.optimizers(use_pl_optimizer=False).weights
    return state_of(net.parameters(), weights, train_set.labels, correction.corrector)


def hugging_face(folder, epochs=EPOCHS, resume=None, shared=True, accumulate=1):
    import test_integrations_transformers as hf

    items, _ = hf.problem(300)  # five joint batches: accelerate would pad others
    train_set = hf.IndexedItems(items)
    correction = hf.CorrectionCallback(train_set, hf.CLASSES, warmup=2, period=2)
    size = processes()
    also = {"pi_lr": 0.1} if shared else {"pi_lr": 0.1, "group": None, "batch_size": None}
    # float64: gradients that are zero but for rounding, as of the keys' bias, make no steps then.
    train = hf.trainer(
        folder / "hf", train_set, callbacks=[correction], also=also,
        model=hf.bert().double(), num_train_epochs=epochs,
        per_device_train_batch_size=JOINT // size // accumulate, save_total_limit=1,
        gradient_accumulation_steps=accumulate,
        save_strategy="epoch" if epochs == STOP else "no",
    )  # fmt: skip
    train.train(resume_from_checkpoint=resume)
    return state_of(train.model.parameters(), train.also.weights, train_set.labels,
                    correction.corrector)  # fmt: skip


def checkpoint(folder):
    """The one that a run left which stopped early."""
    (found,) = [*folder.glob("stopped.ckpt"), *folder.glob("hf/checkpoint-*")]
    return str(found)


def message(function, *arguments, **settings):
    try:
        function(*arguments, **settings)
    except ValueError as error:
        return str(error)
    return "no error"


def main(name, folder):
    """All of it in one start, which takes longer than the trainings."""
    train = globals()[name]
    own = folder / "own"
    train(own, epochs=STOP)
    dist.barrier()
    found = {
        "refused": message(train, folder, shared=False),
        "whole": train(folder),
        "accumulated": train(folder, accumulate=2),
        "resumed": train(folder, resume=checkpoint(folder)),
        "resumed by those who saved": train(own, resume=checkpoint(own)),
    }
    torch.save(found, folder / f"found{dist.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
    dist.destroy_process_group()
