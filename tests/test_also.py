import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from als_ext import ALSO

pytestmark = pytest.mark.usefixtures("one_thread")

N, CLASSES, BATCH = 60, 3, 16


def data(device, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, generator=g).to(device, dtype)
    return x, torch.randint(0, CLASSES, (N,), generator=g).to(device)


def network(device, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return layers.to(device, dtype)


def batches(count, seed=2):
    """Index batches that hold some samples twice."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        index = torch.randint(0, N, (BATCH,), generator=g)
        index[0] = index[1]
        yield index


def forward(model, optimizer, x, y, index):
    losses = F.cross_entropy(model(x[index]).float(), y[index], reduction="none")
    return (optimizer.loss_weight(index) * losses).sum(), losses


def train(model, optimizer, indices, dtype=torch.float32, after=lambda: None):
    device = next(model.parameters()).device
    x, y = data(device, dtype)
    for index in indices:
        index = index.to(device)
        loss, losses = forward(model, optimizer, x, y, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
        after()


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def everything(model, optimizer):
    state = [t for p in model.parameters() for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in [*model.parameters(), *state, optimizer.weights.pi()]]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


class Transcription:
    """method: theta and pi step in float64, every step written out. Nothing of als_ext in it."""

    def __init__(self, model, x, y, prior, settings):
        self.model = copy.deepcopy(model).double()
        self.x, self.y, self.s = x.double(), y, settings
        self.theta = parameters(self.model)
        self.m = [torch.zeros_like(p) for p in self.theta]
        self.v = [torch.zeros_like(p) for p in self.theta]
        self.t = 0
        prior = torch.ones(N, device=x.device) if prior is None else prior
        self.log_prior = prior.double().log() - prior.double().sum().log()
        self.log_pi = self.log_prior.clone()
        self.previous = None

    def adam(self, points, gradient, lr, betas):
        self.t += 1
        moved = []
        for i, (p, g) in enumerate(zip(points, gradient, strict=True)):
            self.m[i] = betas[0] * self.m[i] + (1 - betas[0]) * g
            self.v[i] = betas[1] * self.v[i] + (1 - betas[1]) * g**2
            m_hat = self.m[i] / (1 - betas[0] ** self.t)
            v_hat = self.v[i] / (1 - betas[1] ** self.t)
            shrink = self.s["weight_decay"] if self.s.get("decoupled_weight_decay") else 0.0
            moved.append(p - lr * shrink * p - lr * m_hat / (v_hat.sqrt() + 1e-8))
        return moved

    def pi_step(self, index, losses):
        g = [0.0] * N
        for i, loss in zip(index.tolist(), losses.tolist(), strict=True):
            g[i] += loss
        g = self.log_pi.new_tensor(g)
        sign = 1 if self.s.get("direction", "max") == "max" else -1
        pull = self.s["pi_decay"] * self.s["pi_lr"]
        logits = self.log_pi + pull * self.log_prior + sign * self.s["pi_lr"] * g
        logits = logits / (1 + pull) / self.s.get("temperature", 1.0)
        return logits - torch.logsumexp(logits, dim=0)

    def iteration(self, index, lr, betas=(0.9, 0.999)):
        theta_half, log_pi_half = self.theta, self.log_pi
        if self.s["mode"] == "optimistic" and self.previous is not None:
            gradient, old_index, old_losses, old_lr, old_betas = self.previous
            scaled = [self.s["alpha"] * g for g in gradient]
            theta_half = self.adam(self.theta, scaled, old_lr, old_betas)
            log_pi_half = self.pi_step(old_index, old_losses)
        for p, value in zip(self.model.parameters(), theta_half, strict=True):
            p.data.copy_(value)
        losses = F.cross_entropy(self.model(self.x[index]), self.y[index], reduction="none")
        scale = N / BATCH
        loss = (scale * log_pi_half[index].exp() * losses).sum()
        gradient = torch.autograd.grad(loss, list(self.model.parameters()))
        if not self.s.get("decoupled_weight_decay"):
            decay = self.s["weight_decay"]
            gradient = [g + decay * p for g, p in zip(gradient, theta_half, strict=True)]
        self.theta = self.adam(self.theta, gradient, lr, betas)
        self.log_pi = self.pi_step(index, losses.detach())
        self.previous = (gradient, index, losses.detach(), lr, betas)
        return theta_half


SETTINGS = {
    "optimistic": {"mode": "optimistic", "alpha": 1.0},
    "optimistic, min, alpha 0.5": {"mode": "optimistic", "alpha": 0.5, "direction": "min"},
    "optimistic, T 1.02, prior": {"mode": "optimistic", "alpha": 1.0, "temperature": 1.02},
    "optimistic, decoupled": {"mode": "optimistic", "alpha": 1, "decoupled_weight_decay": True},
    "descent-ascent": {"mode": "descent-ascent"},
    "descent-ascent, min": {"mode": "descent-ascent", "direction": "min"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_follows_the_transcription_of_the_method_for_200_steps(name, dtype, device):
    settings = {"weight_decay": 1e-2, "pi_lr": 0.05, "pi_decay": 0.1, **SETTINGS[name]}
    prior = torch.linspace(1, 3, N, device=device) if "prior" in name else None
    x, y = data(device)
    model = network(device)
    oracle = Transcription(model, x, y, prior, settings)
    model = model.to(dtype)
    optimizer = ALSO(model.parameters(), N, lr=2e-3, prior=prior, **settings)
    x = x.to(dtype)
    for index in batches(200):
        index = index.to(device)
        half = oracle.iteration(index, 2e-3)
        for got, want in zip(model.parameters(), half, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        losses = F.cross_entropy(model(x[index]), y[index], reduction="none")
        loss = (optimizer.loss_weight(index) * losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(index=index, losses=losses)
    optimizer.eval()
    for got, want in zip(model.parameters(), oracle.theta, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        optimizer.weights.pi().double(), oracle.log_pi.exp(), rtol=1e-5, atol=0
    )
    assert oracle.log_pi.max() - oracle.log_pi.min() > 0.2  # the weights did move


@pytest.mark.parametrize("mode", ["optimistic", "descent-ascent"])
def test_schedulers_change_lr_and_betas_of_every_group(mode, device):
    """The half step that is fused with iteration t uses t's lr and betas."""
    settings = {"mode": mode, "alpha": 1.0, "weight_decay": 0.0, "pi_lr": 0.05, "pi_decay": 0.1}
    x, y = data(device)
    model = network(device, torch.float64)
    oracle = Transcription(model, x, y, None, settings)
    optimizer = ALSO(model.parameters(), N, lr=1e-3, **settings)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=40)
    seen = []
    for index in batches(40):
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"]))
        half = oracle.iteration(index.to(device), *seen[-1])
        for got, want in zip(model.parameters(), half, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        train(model, optimizer, [index], torch.float64)
        if len(seen) < 40:
            schedule.step()
    assert max(lr for lr, _ in seen) > 5 * min(lr for lr, _ in seen)
    assert len({betas[0] for _, betas in seen}) > 10


def test_groups_have_their_own_lr(device):
    model, slow = network(device), network(device)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    optimizer = ALSO(groups, N, lr=1e-2, weight_decay=0.0)
    train(model, optimizer, batches(5))
    optimizer.eval()
    assert not torch.equal(model[0].weight, slow[0].weight)
    assert torch.equal(model[2].weight, slow[2].weight)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.train()
    train(model, optimizer, batches(1))
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 0.0]


def test_an_added_group_starts_without_history(device):
    model = network(device)
    optimizer = ALSO(model[0].parameters(), N)
    train(model, optimizer, batches(3))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-2})
    train(model, optimizer, batches(2))
    steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert steps == [10, 10, 4, 4]
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)


def test_a_parameter_without_gradient_is_skipped_with_its_own_count(device):
    model = network(device)
    optimizer = ALSO(model.parameters(), N)
    train(model, optimizer, batches(1))
    model[0].requires_grad_(False)
    before = parameters(model[0])
    train(model, optimizer, batches(2))
    assert_same(parameters(model[0]), before)
    steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert steps == [2, 2, 6, 6]


def test_tiny_pi_lr_in_descent_ascent_is_torch_adam(device):
    model, twin = network(device, torch.float64), network(device, torch.float64)
    settings = {"lr": 1e-2, "weight_decay": 1e-2, "amsgrad": True}
    optimizer = ALSO(model.parameters(), N, mode="descent-ascent", pi_lr=1e-12, **settings)
    adam = torch.optim.Adam(twin.parameters(), **settings)
    x, y = data(device, torch.float64)
    for index in batches(50):
        train(model, optimizer, [index], torch.float64)
        index = index.to(device)
        adam.zero_grad()
        F.cross_entropy(twin(x[index]), y[index]).backward()
        adam.step()
    for got, want in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_loss_scale(device):
    index = torch.tensor([3, 3, 5, 7], device=device)
    model = network(device)
    default = ALSO(model.parameters(), N).loss_weight(index)
    torch.testing.assert_close(default, torch.full((4,), 0.25, device=device))
    given = ALSO(model.parameters(), N, loss_scale=6.0).loss_weight(index)
    torch.testing.assert_close(given, torch.full((4,), 6.0 / N, device=device))
    assert not given.requires_grad


def test_groups_of_samples_share_a_weight(device):
    """n may count groups: the index holds group numbers, equal ones add up."""
    model = network(device)
    optimizer = ALSO(model.parameters(), 4, pi_lr=0.1)
    x, y = data(device)
    for index in batches(30):
        index = index.to(device)
        group = index % 4
        losses = F.cross_entropy(model(x[index]), y[index], reduction="none") * (group == 2)
        optimizer.zero_grad()
        (optimizer.loss_weight(group) * losses).sum().backward()
        optimizer.step(index=group, losses=losses)
    assert optimizer.weights.top(1).item() == 2


@pytest.mark.parametrize("mode", ["optimistic", "descent-ascent"])
def test_closure_equals_three_lines(mode, device):
    model, twin = network(device), network(device)
    three_lines = ALSO(model.parameters(), N, mode=mode)
    optimizer = ALSO(twin.parameters(), N, mode=mode)
    train(model, three_lines, batches(10))
    x, y = data(device)
    for index in batches(10):
        index = index.to(device)

        def closure(index=index):
            optimizer.zero_grad()
            loss, losses = forward(twin, optimizer, x, y, index)
            loss.backward()
            return loss, losses

        returned = optimizer.step(closure, index=index)
    assert returned.shape == ()
    assert_same(everything(twin, optimizer), everything(model, three_lines))


def test_eval_and_train_swap_the_points(device):
    model = network(device)
    optimizer = ALSO(model.parameters(), N, lr=1e-2)
    optimizer.eval()  # before the first step there is nothing to swap
    optimizer.train()
    train(model, optimizer, batches(3))
    half = parameters(model)
    bases = [optimizer.state[p]["base"].clone() for p in model.parameters()]
    for _ in range(2):
        for _ in range(2):  # idempotent
            optimizer.eval()
        assert_same(parameters(model), bases)
        for _ in range(2):
            optimizer.train()
        assert_same(parameters(model), half)
    assert not torch.equal(half[0], bases[0])
    assert "half" not in optimizer.state[model[0].weight]


def test_step_in_eval_state_raises_and_moves_nothing(device):
    model = network(device)
    optimizer = ALSO(model.parameters(), N)
    train(model, optimizer, batches(2))
    optimizer.eval()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\)"):
        train(model, optimizer, batches(1))
    assert_same(everything(model, optimizer), before)


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loaded_in", ["fresh", "train", "eval"])
@pytest.mark.parametrize("saved_in", ["train", "eval"])
@pytest.mark.parametrize("mode", ["optimistic", "descent-ascent"])
def test_a_checkpoint_continues_to_the_bit(mode, saved_in, loaded_in, dtype, device):
    settings = {"mode": mode, "amsgrad": True, "pi_lr": 0.05, "lr": 1e-2}
    model = network(device, dtype)
    optimizer = ALSO(model.parameters(), N, **settings)
    train(model, optimizer, batches(4), dtype)
    getattr(optimizer, saved_in)()
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.train()
    train(model, optimizer, batches(4, seed=3), dtype)

    other = network(device, dtype, seed=9)
    resumed = ALSO(other.parameters(), N, **{**settings, "lr": 1.0})
    if loaded_in != "fresh":
        train(other, resumed, batches(2), dtype)
        getattr(resumed, loaded_in)()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.training == (saved_in == "train")
    assert resumed.state[other[0].weight]["exp_avg"].dtype == torch.float32
    resumed.train()
    train(other, resumed, batches(4, seed=3), dtype)
    assert_same(everything(other, resumed), everything(model, optimizer))


def test_loading_copies(device):
    model = network(device)
    optimizer = ALSO(model.parameters(), N)
    train(model, optimizer, batches(2))
    twin = network(device)
    other = ALSO(twin.parameters(), N)
    other.load_state_dict(optimizer.state_dict())
    before = everything(model, optimizer)
    train(twin, other, batches(2))
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("state", ["train", "eval"])
def test_a_copy_goes_on_alone_and_alike(way, state, device):
    model = network(device)
    optimizer = ALSO(model.parameters(), N, loss_scale=3.0)
    train(model, optimizer, batches(3))
    getattr(optimizer, state)()
    pair = (model, optimizer)
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    before = everything(model, optimizer)
    other.train()
    train(twin, other, batches(3))
    assert_same(everything(model, optimizer), before)
    optimizer.train()
    train(model, optimizer, batches(3))
    assert_same(everything(twin, other), everything(model, optimizer))


def changed(state_dict, key, value):
    state_dict = copy.deepcopy(state_dict)
    if key == "shape":
        state_dict["state"][0]["exp_avg"] = value
    elif key == "drop":
        del state_dict[value]
    else:
        state_dict["also"][key] = value
    return state_dict


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("shape", torch.zeros(2, 2), r"expected exp_avg of shape \[8, 6\] for parameter 0"),
        ("mode", "descent-ascent", "expected mode 'optimistic', got 'descent-ascent'"),
        ("drop", "also", "missing: also"),
        ("drop", "state", "missing: state"),
    ],
)
def test_bad_input_state_dict_changes_nothing(key, value, message):
    model = network("cpu")
    optimizer = ALSO(model.parameters(), N)
    train(model, optimizer, batches(2))
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(changed(optimizer.state_dict(), key, value))
    assert_same(everything(model, optimizer), before)


def test_bad_input_state_dict_of_another_n_or_grouping():
    model = network("cpu")
    optimizer = ALSO(model.parameters(), N)
    train(model, optimizer, batches(2))
    before = everything(model, optimizer)
    other = ALSO(network("cpu").parameters(), N + 1, lr=5.0)
    with pytest.raises(ValueError, match=f"{N}.*{N + 1}"):
        optimizer.load_state_dict(other.state_dict())
    groups = [{"params": layer.parameters()} for layer in (model[0], model[2])]
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(ALSO(groups, N).state_dict())
    assert_same(everything(model, optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reduced_precision_parameters_keep_their_exact_point(dtype, device):
    """A thousand steps far below the parameter's resolution must add up in the base."""
    weight = nn.Parameter(torch.full((4,), 1.0, device=device, dtype=dtype))
    optimizer = ALSO([weight], 2, lr=1e-5, weight_decay=0.0)
    index = torch.tensor([0, 1], device=device)
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step(index=index, losses=torch.ones(2, device=device))
    state = optimizer.state[weight]
    assert {state[k].dtype for k in ("base", "exp_avg", "exp_avg_sq")} == {torch.float32}
    want = torch.full((4,), 0.99, device=device)
    torch.testing.assert_close(state["base"], want, atol=5e-5, rtol=0)
    optimizer.eval()
    assert torch.equal(weight, state["base"].to(dtype))


def test_channels_last_and_strided_parameters(device):
    """Any order of memory, gaps included, gives the values of row-major parameters."""
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(4, 3, 3, 3, generator=g).to(device) for _ in range(3)]
    wide = torch.empty(4, 3, 3, 6, device=device)
    channels_last = {"memory_format": torch.channels_last}
    plain = [nn.Parameter(v.clone()) for v in values]
    other = [
        nn.Parameter(values[0].contiguous(**channels_last)),
        nn.Parameter(wide[..., ::2].copy_(values[1])),  # gaps between its elements
        nn.Parameter(values[2].clone()),  # its gradient comes in another order
    ]
    optimizers = [ALSO(params, 2, lr=1e-2) for params in (plain, other)]
    index = torch.tensor([0, 1], device=device)
    for _ in range(6):
        grads = [torch.randn(4, 3, 3, 3, generator=g).to(device) for _ in range(3)]
        for p, grad in zip(plain, grads, strict=True):
            p.grad = grad
        other[0].grad = grads[0].contiguous(**channels_last)
        other[1].grad = grads[1].clone()
        other[2].grad = grads[2].contiguous(**channels_last)
        for optimizer in optimizers:
            optimizer.step(index=index, losses=torch.ones(2, device=device))
    for optimizer in optimizers:
        optimizer.eval()
    for got, want in zip(other, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert other[0].is_contiguous(**channels_last)
    assert other[1].stride() == wide[..., ::2].stride()


def scaled_step(scaler, model, optimizer, x, y, index, spoil=False):
    loss, losses = forward(model, optimizer, x, y, index)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if spoil:
        model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer, index=index, losses=losses)
    scaler.update()


def test_grad_scaler_steps_like_none_and_skips_like_nothing(device):
    x, y = data(device)
    model, plain = network(device), network(device)
    optimizer, reference = ALSO(model.parameters(), N), ALSO(plain.parameters(), N)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=2)
    for step, index in enumerate(batches(6)):
        index = index.to(device)
        before = everything(model, optimizer)
        scaled_step(scaler, model, optimizer, x, y, index, spoil=step == 3)
        if step == 3:
            assert_same(everything(model, optimizer), before)
        else:
            train(plain, reference, [index])
            assert_same(everything(model, optimizer), everything(plain, reference))
    assert scaler.get_scale() != 256.0
    assert not hasattr(optimizer, "found_inf")


def test_grad_scaler_after_unscale_and_clipping(device):
    x, y = data(device)
    model = network(device)
    optimizer = ALSO(model.parameters(), N)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    index = next(batches(1)).to(device)
    loss, losses = forward(model, optimizer, x, y, index)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    clipped = model[0].weight.grad.clone()
    scaler.step(optimizer, index=index, losses=losses)
    decay = 1e-3 * network(device)[0].weight
    want = (1 - 0.9**2) * (clipped + decay)  # two advances with the unscaled, clipped gradient
    torch.testing.assert_close(optimizer.state[model[0].weight]["exp_avg"], want)


def test_step_hooks_see_the_arguments(device):
    model = network(device)
    optimizer = ALSO(model.parameters(), N)
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(sorted(kwargs)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    train(model, optimizer, batches(1))
    assert calls == [["index", "losses"], "after"]


def test_lr_tensor_equals_number(device):
    model, twin = network(device), network(device)
    number = ALSO(model.parameters(), N, lr=0.25)
    tensor = ALSO(twin.parameters(), N, lr=torch.tensor(0.25))
    train(model, number, batches(3))
    train(twin, tensor, batches(3))
    assert_same(parameters(twin), parameters(model))


def test_compiled_training_step(device):
    model, twin = network(device), network(device)
    optimizer, other = ALSO(model.parameters(), N), ALSO(twin.parameters(), N)
    x, y = data(device)

    @torch.compile(backend="aot_eager")
    def step(index):
        loss, losses = forward(twin, other, x, y, index)
        other.zero_grad()
        loss.backward()
        other.step(index=index, losses=losses)

    for index in batches(4):
        step(index.to(device))
        train(model, optimizer, [index])
    for got, want in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert other.state[twin[0].weight]["step"].item() == 8


@pytest.mark.cuda
def test_a_step_never_waits_for_the_device():
    device = torch.device("cuda")
    model = network(device)
    optimizer = ALSO(model.parameters(), N)
    x, y = data(device)
    indices = [index.to(device) for index in batches(3)]
    for index in indices:
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, losses = forward(model, optimizer, x, y, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(index=index, losses=losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: expected >= 1, got 0"),
        ({"lr": -1.0}, ValueError, "lr: expected a finite number"),
        ({"lr": torch.ones(2)}, ValueError, "lr: expected a number or a"),
        ({"lr": "1e-3"}, TypeError, "lr: expected a number, got str"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: expected two numbers in \[0, 1\)"),
        ({"betas": 0.9}, ValueError, r"betas: expected two numbers in \[0, 1\)"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a finite number"),
        ({"pi_lr": -1.0}, ValueError, "pi_lr: expected a finite number"),
        ({"pi_decay": -1.0}, ValueError, "pi_decay: expected a finite number"),
        ({"pi_lr": "1"}, TypeError, "pi_lr: expected a number, got str"),
        ({"alpha": -1.0}, ValueError, "alpha: expected a finite number"),
        ({"mode": "extragradient"}, ValueError, "mode: expected one of 'optimistic'"),
        ({"direction": "up"}, ValueError, "direction: expected one of"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale: expected a finite number"),
        ({"prior": torch.ones(N + 1)}, ValueError, r"prior: expected shape \[60\]"),
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": [nn.Parameter(torch.ones(2) + 0j)]}, TypeError, "got complex64"),
    ],
)
def test_bad_input_arguments(change, error, message):
    arguments = {"params": [nn.Parameter(torch.ones(2))], "n": N}
    with pytest.raises(error, match=message):
        ALSO(**{**arguments, **change})


def test_bad_input_group_is_not_kept():
    optimizer = ALSO([nn.Parameter(torch.ones(2))], N)
    with pytest.raises(ValueError, match="betas"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "betas": (2, 2)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, r"index is missing(.|\n)*loss\.backward\(\)\n.*step\(index=index"),
        ({"index": torch.tensor([0, 1])}, TypeError, "losses is missing"),
        ({"losses": torch.ones(2)}, TypeError, "index is missing"),
        ({"index": torch.tensor([0, N]), "losses": torch.ones(2)}, ValueError, "index: expected"),
        ({"index": torch.tensor([0, 1]), "losses": torch.ones(3)}, ValueError, "expected shape"),
        ({"closure": lambda: None, "index": torch.tensor([0])}, TypeError, "closure: expected"),
        (
            {"closure": lambda: None, "losses": torch.ones(1)},
            TypeError,
            "losses: expected None with a closure",
        ),
    ],
)
def test_bad_input_step_moves_nothing(arguments, error, message):
    model = network("cpu")
    optimizer = ALSO(model.parameters(), N)
    train(model, optimizer, batches(2))
    before = everything(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(**arguments)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize("kind", ["sparse", "dtype"])
def test_bad_input_gradient_moves_nothing(kind):
    table = nn.Embedding(5, 2, sparse=True)
    other = nn.Parameter(torch.ones(2))
    optimizer = ALSO([other, table.weight], 2)
    other.grad = torch.ones(2)
    if kind == "sparse":
        table(torch.tensor([1, 2])).sum().backward()
    else:
        table.weight.grad_dtype = None
        table.weight.grad = torch.ones(5, 2, dtype=torch.float64)
    expected = {"sparse": (ValueError, "dense gradients"), "dtype": (TypeError, "of their dtype")}
    error, message = expected[kind]
    with pytest.raises(error, match=message):
        optimizer.step(index=torch.tensor([0, 1]), losses=torch.tensor([1.0, 9.0]))
    assert torch.equal(other, torch.ones(2))
    assert torch.equal(optimizer.weights.pi(), torch.full_like(optimizer.weights.pi(), 0.5))
