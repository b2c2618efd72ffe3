"""One correction of MNIST's labels after a short warm-up: the table of docs/correction.md.

    python bench/correction_mnist.py DIR > bench/results/correction-mnist.jsonl

DIR holds MNIST's idx files. Trains two epochs on the noisy labels, then compares
``correct_labels`` at its defaults with the best plain vote of 20 to 500 neighbours, k chosen by the
true labels. One JSON object a line; about half a minute each on two cores.
"""

import json
import sys

import torch

from als_ext import TrainConfig, Trainer, correct_labels
from als_ext.data import apply_noise, load_dataset
from als_ext.metrics import label_metrics
from als_ext.models import build_model
from als_ext.ops import knn, knn_vote, sample_loss

NOISES = ("none", "symmetric:0.05", "symmetric:0.2", "symmetric:0.5", "symmetric:0.8", "pair:0.45")
NEIGHBOURS = (20, 50, 100, 200, 500)


def measure(given, new, truth):
    good = given == truth
    figures = label_metrics(given, new, truth)
    return {
        "label_accuracy_after": figures["label_accuracy_after"],
        "relabel_precision": figures["relabel_precision"],
        "relabel_recall": figures["relabel_recall"],
        "good_labels_changed": float((new != given)[good].float().mean()),
    }


def main(folder):
    data = load_dataset("mnist", folder, download=False)
    x, truth = (data.x_train - 0.1307) / 0.3081, data.y_train
    for noise in NOISES:
        given = apply_noise(truth, noise, 10, seed=0, dataset="mnist").labels
        torch.manual_seed(0)
        model = build_model("cnn", x.shape[1:], 10)
        config = TrainConfig(method="erm", epochs=2, lr_schedule="constant", device="cpu")
        trainer = Trainer(model, config, num_classes=10, progress=False)
        trainer.fit(x, given)
        embeddings = trainer.embeddings()
        with torch.no_grad():
            loss = torch.cat(
                [
                    sample_loss(model.head(e), y)
                    for e, y in zip(embeddings.split(10_000), given.split(10_000), strict=True)
                ]
            )
        result = correct_labels(embeddings, given, loss, num_classes=10)
        near = knn(embeddings, embeddings, max(NEIGHBOURS), metric="cosine", exclude_self=True)
        votes = {k: knn_vote(near[0][:, :k], near[1][:, :k], given, 10)[0] for k in NEIGHBOURS}
        best = max(votes, key=lambda k: int((votes[k] == truth).sum()))
        row = {
            "noise": noise,
            "label_accuracy_before": float((given == truth).double().mean()),
            "survival": result.survival,
            "plain_vote": {"k": best, **measure(given, votes[best], truth)},
            "correct_labels": measure(given, result.new_label, truth),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
