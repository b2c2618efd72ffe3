"""The Hugging Face Trainer does what a plain loop does, corrects labels and resumes."""

import copy

import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("transformers", reason="needs the extra als_ext[transformers]")
pytest.importorskip("accelerate", reason="needs the extra als_ext[transformers]")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import als_ext
from als_ext.integrations.also import BatchALSO
from als_ext.integrations.transformers import (
    AlsoTrainer,
    CorrectionCallback,
    IndexedItems,
    mean_of_tokens,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES, LENGTH, PART = 3, 10, 20


def problem(n=300, wrong=0.3, seed=0):
    """Items whose tokens come mostly from the part of the vocabulary of their class."""
    g = torch.Generator().manual_seed(seed)
    true = torch.arange(n) % CLASSES
    own = torch.rand(n, LENGTH, generator=g) < 0.7
    part = torch.where(own, true[:, None], torch.randint(CLASSES, (n, LENGTH), generator=g))
    tokens = part * PART + torch.randint(PART, (n, LENGTH), generator=g)
    given = true.clone()
    flip = torch.rand(n, generator=g) < wrong
    given[flip] = (true[flip] + torch.randint(1, CLASSES, (n,), generator=g)[flip]) % CLASSES
    items = [
        {"input_ids": t, "attention_mask": torch.ones(LENGTH).long(), "label": int(label)}
        for t, label in zip(tokens, given, strict=True)
    ]
    return items, true


def bert(dropout=0.0):
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=CLASSES * PART,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=CLASSES,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def arguments(folder, **settings):
    base = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 30,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**base, **settings})


def trainer(folder, train_set, *, model=None, collator=None, callbacks=(), also=None, **settings):
    return AlsoTrainer(
        model or bert(),
        arguments(folder, **settings),
        train_dataset=train_set,
        data_collator=collator or default_data_collator,
        callbacks=list(callbacks),
        also=also,
    )


class Batches:
    """A collator that keeps a copy of what it made."""

    def __init__(self):
        self.seen = []

    def __call__(self, items):
        batch = default_data_collator(items)
        self.seen.append(copy.deepcopy(batch))
        return batch


def plain_loop(batches, n, accumulate=1, **settings):
    net = bert()
    net.train()
    optimizer = als_ext.ALSO(net.parameters(), n=n, lr=3e-3, weight_decay=0.0, **settings)
    for start in range(0, len(batches), accumulate):
        group = batches[start : start + accumulate]
        inputs = {k: torch.cat([batch[k] for batch in group]) for k in group[0]}
        index, labels = inputs.pop("index"), inputs.pop("labels")
        loss, losses = als_ext.ops.weighted_loss(
            net(**inputs).logits, labels, optimizer.loss_weight(index)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
    optimizer.eval()
    return net, optimizer


def test_same_weights_as_the_plain_loop(tmp_path):
    items, _ = problem()
    collator = Batches()
    also = {"pi_lr": 0.1, "direction": "min"}
    run = trainer(tmp_path, IndexedItems(items), collator=collator, also=also)
    run.train()
    seen = torch.cat([batch["index"] for batch in collator.seen]).view(2, -1)
    assert torch.equal(seen.sort().values, torch.arange(300).expand(2, -1))
    assert not torch.equal(seen[0], seen[1])
    net, optimizer = plain_loop(collator.seen, 300, **also)
    assert torch.equal(run.also.weights.log_pi(), optimizer.weights.log_pi())
    for a, b in zip(run.model.parameters(), net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_gradient_accumulation_is_the_large_batch(tmp_path):
    items, _ = problem()
    collator = Batches()
    run = trainer(
        tmp_path,
        IndexedItems(items),
        collator=collator,
        also={"pi_lr": 0.1},
        gradient_accumulation_steps=5,
    )
    run.train()
    net, optimizer = plain_loop(collator.seen, 300, accumulate=5, pi_lr=0.1)
    torch.testing.assert_close(run.also.weights.log_pi(), optimizer.weights.log_pi())
    for a, b in zip(run.model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_arguments_reach_the_optimizer(tmp_path):
    items, _ = problem(60)
    run = trainer(tmp_path, IndexedItems(items), weight_decay=0.01, adam_beta2=0.9)
    optimizer = run.create_optimizer()
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.01, 0.0}
    assert optimizer.defaults["betas"] == (0.9, 0.9)
    assert optimizer.defaults["decoupled_weight_decay"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(run.model.parameters())
    )


def test_wrong_labels_become_right(tmp_path):
    items, true = problem(600)
    train_set = IndexedItems(items)
    correction = CorrectionCallback(train_set, CLASSES, warmup=3, period=2)
    run = trainer(tmp_path, train_set, callbacks=[correction], num_train_epochs=8)
    before = (train_set.labels == true).float().mean()
    run.train()
    assert before < 0.75
    assert (train_set.labels == true).float().mean() > 0.92
    assert torch.equal(train_set.labels, correction.corrector.labels)
    assert correction.corrector.history.epoch.min() == 3
    assert correction.corrector.history.epoch.max() < 8  # not after the last
    assert train_set[5]["labels"] == int(train_set.labels[5])


def test_corrections_leave_the_generators_and_the_mode(tmp_path):
    items, _ = problem(60)
    train_set = IndexedItems(items)
    correction = CorrectionCallback(train_set, CLASSES, warmup=1, period=1)
    run = trainer(tmp_path, train_set, callbacks=[correction], num_train_epochs=1)
    loader = run.get_train_dataloader()
    state = torch.get_rng_state()
    run.state.epoch, run.state.num_train_epochs = 1.0, 2
    run.model.train()
    correction.on_epoch_end(
        run.args, run.state, run.control, run.model, run.create_optimizer(), loader
    )
    assert torch.equal(state, torch.get_rng_state())
    assert run.model.training
    assert "steps=1" in repr(correction.corrector)


class StopAfter(TrainerCallback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_epoch_end(self, args, state, control, **_):
        if round(state.epoch) == self.epochs:
            control.should_training_stop = True


@pytest.mark.parametrize("saves", [{"save_strategy": "epoch"}, {"save_strategy": "steps"}])
def test_resume_is_the_unbroken_run(tmp_path, saves):
    saves = {**saves, "save_steps": 5}  # in the middle of an epoch

    def run(folder, *callbacks, resume=None):
        items, _ = problem(600)
        train_set = IndexedItems(items)
        correction = CorrectionCallback(train_set, CLASSES, warmup=2, period=1)
        it = trainer(
            folder,
            train_set,
            model=bert(dropout=0.1),
            callbacks=[correction, *callbacks],
            num_train_epochs=5,
            per_device_train_batch_size=75,
            lr_scheduler_type="linear",
            also={"pi_lr": 0.05},
            **saves,
        )
        it.train(resume_from_checkpoint=resume)
        return it, train_set, correction

    whole, labels, _ = run(tmp_path / "whole")
    run(tmp_path / "parts", StopAfter(3))
    again, relabelled, correction = run(tmp_path / "parts", resume=True)
    assert again.state.global_step == whole.state.global_step == 40
    assert torch.equal(relabelled.labels, labels.labels)
    assert (relabelled.labels != correction.corrector.original).any()
    assert correction.corrector.history.epoch.min() == 2
    assert torch.equal(again.also.weights.log_pi(), whole.also.weights.log_pi())
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_checkpoints_hold_theta(tmp_path):
    items, _ = problem(60)
    run = trainer(
        tmp_path, IndexedItems(items), save_strategy="steps", save_steps=3, num_train_epochs=2
    )
    run.train()
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    state = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    base = [entry["base"] for entry in state["state"].values()]
    groups = [p for group in state["param_groups"] for p in group["params"]]
    named = dict(saved.named_parameters())
    decaying = set(run.get_decay_parameter_names(saved))
    ordered = [p for n, p in named.items() if n in decaying]
    ordered += [p for n, p in named.items() if n not in decaying]
    assert len(base) == len(groups) == len(ordered)
    for theta, parameter in zip(base, ordered, strict=True):
        assert torch.equal(theta, parameter)
    for parameter in run.model.parameters():  # and the model that training leaves
        assert torch.equal(parameter, run.also.state[parameter]["base"])


def test_evaluation_is_unweighted_and_needs_no_index(tmp_path):
    items, _ = problem(60)
    run = trainer(tmp_path, IndexedItems(items), also={"pi_lr": 1.0})
    run.train()
    indexed = run.evaluate(run.train_dataset)["eval_loss"]
    plain = run.evaluate([{**item, "labels": item["label"]} for item in items])["eval_loss"]
    run.model.eval()
    with torch.no_grad():
        batch = default_data_collator(items)
        expected = float(run.model(**batch).loss)
    assert indexed == pytest.approx(expected, rel=1e-4)
    assert plain == pytest.approx(expected, rel=1e-4)


def test_embeddings_leave_padding_out():
    net = bert().eval()
    ids = torch.randint(CLASSES * PART, (2, 6))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    with torch.no_grad():
        out = mean_of_tokens(net, {"input_ids": ids, "attention_mask": mask})
        short = mean_of_tokens(net, {"input_ids": ids[:1, :3]})
    torch.testing.assert_close(out[:1], short)
    assert out.shape == (2, 16)


def test_items_of_many_kinds():
    items, _ = problem(6)

    class Torch(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, at):
            if at >= 6:
                raise IndexError
            return items[at]

    for source in (items, Torch()):
        data = IndexedItems(source)
        assert data.labels.tolist() == [item["label"] for item in items]
        assert {"input_ids", "attention_mask", "labels", "index"} == set(data[-1])
        assert data[-1]["index"] == 5
    assert "label" in items[0]  # the source stays as it was
    data.set_labels(torch.tensor([2]), torch.tensor([4]))
    assert data[4]["labels"] == 2
    with pytest.raises(IndexError, match="at most 5"):
        data[6]
    with pytest.raises(ValueError, match="label: expected an entry 'y' in item 0"):
        IndexedItems(items, label="y")
    with pytest.raises(TypeError, match="labels: expected integer class labels, got <U3"):
        IndexedItems([{"label": "cat"}])
    with pytest.raises(ValueError, match="expected 6 labels, got 5"):
        IndexedItems(items, labels=torch.zeros(5).long())


def test_items_of_datasets():
    datasets = pytest.importorskip("datasets", reason="needs the extra als_ext[datasets]")
    source = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3], [4]], "y": [1, 0, 2]})
    data = IndexedItems(source.select([2, 0]), label="y")
    assert data.labels.tolist() == [2, 1]
    assert data[0] == {"input_ids": [4], "labels": 2, "index": 0}
    with pytest.raises(ValueError, match=r"label: expected one of the columns .* got 'label'"):
        IndexedItems(source)


def test_errors_name_what_is_missing(tmp_path):
    items, _ = problem(60)
    train_set = IndexedItems(items)
    with pytest.raises(ValueError, match=r"args\.remove_unused_columns: expected False"):
        trainer(tmp_path, train_set, remove_unused_columns=True)
    with pytest.raises(TypeError, match="train_dataset: expected IndexedItems"):
        trainer(tmp_path, items)

    def drops(name):
        def collate(batch):
            made = default_data_collator(batch)
            del made[name]
            return made

        return collate

    for name in ("index", "labels"):
        with pytest.raises(ValueError, match=f"inputs: expected an entry '{name}'"):
            trainer(tmp_path, train_set, collator=drops(name)).train()
    other = CorrectionCallback(IndexedItems(items), CLASSES)
    with pytest.raises(ValueError, match="expected the Trainer's own train_dataset"):
        trainer(tmp_path, train_set, callbacks=[other]).train()
    with pytest.raises(TypeError, match="dataset: expected an IndexedDataset"):
        CorrectionCallback(items)
    with pytest.raises(ValueError, match="warmup"):
        CorrectionCallback(train_set, warmup=0)
    net = bert()
    wrong = BatchALSO(net.parameters(), n=61)
    run = AlsoTrainer(net, arguments(tmp_path), train_dataset=train_set, optimizers=(wrong, None))
    with pytest.raises(ValueError, match=r"optimizers: expected n = 60, .* got 61"):
        run.train()
    with pytest.raises(ValueError, match=r"embed: expected a function .* got none"):
        mean_of_tokens(lambda input_ids, output_hidden_states: None, {"input_ids": 0})


def test_resume_needs_the_corrector(tmp_path):
    items, _ = problem(60)
    train_set = IndexedItems(items)
    trainer(tmp_path, train_set, save_strategy="epoch").train()
    correction = CorrectionCallback(train_set, CLASSES)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected als_ext\.pt"):
        trainer(tmp_path, train_set, callbacks=[correction]).train(resume_from_checkpoint=True)
