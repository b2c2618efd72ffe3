"""Hugging Face Trainer: sequences of tokens with 40 % wrong labels, a tiny BERT made on the spot.

The class of a sequence is the third of the vocabulary that most of its tokens come from.
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, set_seed

from als_ext.data import apply_noise
from als_ext.integrations.transformers import AlsoTrainer, CorrectionCallback, IndexedItems

torch.set_num_threads(1)  # steps this small only wait for a second thread
set_seed(0)
n, length, vocabulary, classes = 900, 12, 60, 3
true = torch.arange(n) % classes
part = torch.where(torch.rand(n, length) < 0.6, true[:, None], torch.randint(classes, (n, length)))
tokens = part * (vocabulary // classes) + torch.randint(vocabulary // classes, (n, length))
noisy = apply_noise(true, "symmetric:0.4", num_classes=classes, seed=0).labels


def items(labels, rows):
    return [
        {"input_ids": tokens[i], "attention_mask": torch.ones(length), "labels": labels[i]}
        for i in rows
    ]


train_set = IndexedItems(items(noisy, range(600)), label="labels")  # adds the entry "index"
test_set = items(true, range(600, n))
config = BertConfig(
    vocab_size=vocabulary,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    num_labels=classes,
)
correction = CorrectionCallback(train_set, classes, warmup=3, period=3)
with tempfile.TemporaryDirectory() as folder:
    trainer = AlsoTrainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            output_dir=folder,
            num_train_epochs=12,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            remove_unused_columns=False,  # keeps "index"
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=train_set,
        eval_dataset=test_set,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        callbacks=[correction],
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]

before = (correction.corrector.original == true[:600]).float().mean()
after = (train_set.labels == true[:600]).float().mean()
print(f"labels right: {before:.3f} -> {after:.3f}, test accuracy {accuracy:.3f}")
print("highest weights:", trainer.also.weights.top(5).tolist())
assert after > before + 0.2
