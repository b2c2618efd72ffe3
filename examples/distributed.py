"""ALSO and correct_labels on several processes, on digits with 40 % wrong labels.

torchrun --nproc-per-node 2 examples/distributed.py [CHECKPOINT]

Start it again after a failure, with any number of processes: it goes on from the checkpoint.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import als_ext
from als_ext.checkpoint import load_checkpoint, save_checkpoint
from als_ext.data import apply_noise, load_dataset

EPOCHS, CORRECT_AT, BATCH = 8, (3, 6), 32  # BATCH: of all processes together

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=2))
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
torch.manual_seed(0)
torch.set_num_threads(1)
data = load_dataset("digits")
given = apply_noise(data.y_train, "symmetric:0.4", num_classes=10, seed=0).labels
x, given = data.x_train.flatten(1).to(device), given.to(device)

body = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 128))
model = torch.nn.Sequential(body, torch.nn.ReLU(), torch.nn.Linear(128, 10)).to(device)
spread = DistributedDataParallel(model)
optimizer = als_ext.ALSO(
    model.parameters(), len(x), weight_decay=0.0, group=dist.group.WORLD, batch_size=BATCH
)
labels, first = given.clone(), 0

checkpoint = Path(sys.argv[1] if len(sys.argv) > 1 else "distributed.pt")
if checkpoint.exists():
    state = load_checkpoint(checkpoint)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    labels, first = state["labels"].to(device), state["epoch"]

for epoch in range(first, EPOCHS):
    if epoch in CORRECT_AT:
        own = torch.arange(len(x)).tensor_split(size)[rank].to(device)  # each its own rows
        optimizer.eval()
        with torch.no_grad():
            result = als_ext.correct_labels(
                body(x[own]), given[own], num_classes=10, group=dist.group.WORLD
            )
        optimizer.train()
        changed = own[result.new_label != labels[own]]
        optimizer.weights.reset_(changed)  # of all processes
        labels = als_ext.distributed.all_rows(result.new_label)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).to(device)
    for joint in order.split(BATCH):
        index = joint.tensor_split(size)[rank]
        loss, losses = als_ext.ops.weighted_loss(
            spread(x[index]), labels[index], optimizer.loss_weight(index)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
    if rank == 0:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint, {**state, "labels": labels, "epoch": epoch + 1})
        print(f"epoch {epoch + 1} of {EPOCHS}, {size} processes", flush=True)

optimizer.eval()
with torch.no_grad():
    right = model(data.x_test.flatten(1).to(device)).argmax(1).cpu() == data.y_test
good = (labels.cpu() == data.y_train).double().mean()
if rank == 0:
    print(f"test accuracy {right.double().mean():.3f}, good labels: 0.6 -> {good:.3f}")
assert right.double().mean() > 0.9
assert good > 0.9
del spread, optimizer  # they hold the group
dist.destroy_process_group()
