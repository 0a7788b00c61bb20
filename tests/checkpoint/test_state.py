"""What was packed comes back bit for bit, training goes on as if never stopped, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptrain.checkpoint.state import pack_model, pack_optimizer, unpack_model, unpack_optimizer
from dptrain.checkpoint.store import load_newest, save_checkpoint
from dptrain.errors import CheckpointError, MismatchError

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.97), foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "adam maximize": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False, maximize=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
}


class Model(nn.Module):
    """Tied weights, buffers, a frozen and an unused parameter, and a convolution in channels-last order."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.BatchNorm1d(8)
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(8, 8).requires_grad_(requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.norm(self.frozen(self.embed(tokens)))
        return self.head(hidden).logsumexp(-1).sum() + self.conv(hidden.reshape(-1, 2, 2, 2)).square().sum()


def build(kind, *, seed):
    torch.manual_seed(seed)
    model = Model()
    split = [p for p in model.parameters() if p.ndim != 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": split[0]}, {"params": split[1], "weight_decay": 0.0}]
    return model, OPTIMIZERS[kind](groups)


def train(model, optimizer, *, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randint(11, (6,), generator=generator)).backward()
        optimizer.step()


def names_of(model):
    return {parameter: name for name, parameter in model.named_parameters()}


def save(folder, model, optimizer):
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    groups = {"model": pack_model(model), "optimizer": tensors}
    return save_checkpoint(folder, step=5, tensors=groups, state={"optimizer": state})


def restore(folder, model, optimizer):
    found = load_newest(folder)
    unpack_model(model, found.tensors("model"))
    unpack_optimizer(
        optimizer, names=names_of(model), tensors=found.tensors("optimizer"), state=found.state["optimizer"]
    )


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape, found[key].device) == (tensor.dtype, tensor.shape, tensor.device)
        assert found[key].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_five_steps_and_five_after_a_restart_equal_ten(tmp_path, kind):
    """Through real files and into a model built from another seed, training goes on bit-identically."""
    model, optimizer = build(kind, seed=0)
    train(model, optimizer, steps=range(5))
    save(tmp_path, model, optimizer)
    train(model, optimizer, steps=range(5, 10))

    again, its_optimizer = build(kind, seed=1)
    restore(tmp_path, again, its_optimizer)
    train(again, its_optimizer, steps=range(5, 10))

    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))
    tensors, state = pack_optimizer(its_optimizer, names=names_of(again))
    expected_tensors, expected_state = pack_optimizer(optimizer, names=names_of(model))
    assert_same_bits(tensors, expected_tensors)
    assert state == expected_state


def test_the_same_test_without_restoring_the_optimizer_fails():
    """The proof above has teeth: a fresh optimizer after five steps ends elsewhere."""
    model, optimizer = build("adamw", seed=0)
    train(model, optimizer, steps=range(5))
    again, its_optimizer = build("adamw", seed=1)
    unpack_model(again, pack_model(model))
    train(model, optimizer, steps=range(5, 10))
    train(again, its_optimizer, steps=range(5, 10))
    assert not again.embed.weight.equal(model.embed.weight)


def test_state_is_keyed_by_the_names_of_parameters():
    """A tensor's key says what it is; unused and frozen parameters have none; a fused counter is float32."""
    model, optimizer = build("adamw fused", seed=0)
    train(model, optimizer, steps=range(2))
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    assert tensors["step/embed.weight"].equal(torch.tensor(2.0))
    assert {key.split("/")[0] for key in tensors} == {"step", "exp_avg", "exp_avg_sq"}
    assert not any("unused" in key or "frozen" in key for key in tensors)
    assert state["class"] == "AdamW"
    assert state["groups"][0]["options"]["betas"] == (0.9, 0.999)


def test_restored_state_has_dtype_and_strides_of_the_live_one(tmp_path):
    """Moments are laid out like their parameter and keep their own dtype; betas are a tuple again."""
    model, optimizer = build("adamw", seed=0)
    train(model, optimizer, steps=range(2))
    weight = model.conv.weight
    optimizer.state[weight]["exp_avg"] = optimizer.state[weight]["exp_avg"].double()
    save(tmp_path, model, optimizer)
    again, its_optimizer = build("adamw", seed=1)
    restore(tmp_path, again, its_optimizer)
    restored = its_optimizer.state[again.conv.weight]
    assert restored["exp_avg"].dtype == torch.float64
    assert restored["exp_avg"].stride() == again.conv.weight.stride() == weight.stride()
    assert not restored["exp_avg"].is_contiguous()
    assert its_optimizer.param_groups[0]["betas"] == (0.8, 0.97)
    assert type(its_optimizer.param_groups[0]["betas"]) is tuple


@pytest.mark.parametrize("capturable", [False, True])
def test_the_step_counter_stays_on_the_host_unless_the_kernel_increments_it(capturable):
    """Moments go where their parameter is; the counter does so only for fused and capturable steps."""
    model, optimizer = build("adamw", seed=0)
    train(model, optimizer, steps=range(1))
    for group in optimizer.param_groups:
        group["capturable"] = capturable
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    elsewhere = Model().to("meta")
    elsewhere.head.weight = elsewhere.embed.weight  # moving to the meta device unties them
    split = [p for p in elsewhere.parameters() if p.ndim != 1], [p for p in elsewhere.parameters() if p.ndim == 1]
    its_optimizer = torch.optim.AdamW([{"params": split[0]}, {"params": split[1]}])
    unpack_optimizer(its_optimizer, names=names_of(elsewhere), tensors=tensors, state=state)
    restored = its_optimizer.state[elsewhere.embed.weight]
    assert restored["exp_avg"].device.type == "meta"
    assert restored["step"].device.type == ("meta" if capturable else "cpu")


def test_options_come_from_the_checkpoint_and_unknown_ones_stay():
    """The learning rate is restored; what a newer torch added keeps its default."""
    model, optimizer = build("sgd", seed=0)
    optimizer.param_groups[0]["lr"] = 0.125
    del optimizer.param_groups[0]["maximize"]
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    again, its_optimizer = build("sgd", seed=0)
    unpack_optimizer(its_optimizer, names=names_of(again), tensors=tensors, state=state)
    assert its_optimizer.param_groups[0]["lr"] == 0.125
    assert its_optimizer.param_groups[0]["maximize"] is False


def test_a_tensor_learning_rate_is_restored_in_place():
    """A compiled step that holds the tensor sees the restored value."""
    model, optimizer = build("adamw tensor lr", seed=0)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    again, its_optimizer = build("adamw tensor lr", seed=0)
    held = its_optimizer.param_groups[0]["lr"]
    unpack_optimizer(its_optimizer, names=names_of(again), tensors=tensors, state=state)
    assert its_optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.5


@pytest.mark.parametrize("kind", ["adamw", "sgd momentum"])
def test_an_optimizer_without_state_round_trips_and_clears(kind):
    """Before the first step there is nothing to save, and loading that forgets what there was."""
    model, optimizer = build(kind, seed=0)
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    assert tensors == {}
    train(model, optimizer, steps=range(1))
    unpack_optimizer(optimizer, names=names_of(model), tensors=tensors, state=state)
    assert not optimizer.state


def unlike_group(model):
    return torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=1e-2)


def unlike_order(model):
    split = [p for p in model.parameters() if p.ndim != 1], [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW([{"params": split[0][::-1]}, {"params": split[1]}], lr=1e-2)


def unlike_set(model):
    first, *others = model.parameters()
    return torch.optim.AdamW([{"params": others}, {"params": [first]}], lr=1e-2)


@pytest.mark.parametrize(
    ("change", "make", "sentence"),
    [
        (None, lambda model: torch.optim.SGD(model.parameters()), "it is SGD here and AdamW in the checkpoint"),
        (None, unlike_group, "it has 8 groups here and 2 in the checkpoint"),
        (None, unlike_order, "group 0 holds 3 parameters here and 3 in the checkpoint, or holds them in another order"),
        (None, unlike_set, "group 1 holds 1 parameters here and 5"),
        ("unused", None, "'unused' is float32[4] here and float32[3] in the checkpoint"),
        ("double", None, "'unused' is float64[3] here and float32[3] in the checkpoint"),
        ("rename", None, "'renamed' is not in the checkpoint; 'unused' is only in the checkpoint"),
    ],
)
def test_an_optimizer_that_differs_is_refused_with_the_differences(change, make, sentence):
    """Class, groups, order, names, shapes and dtypes are compared, and the live optimizer stays as it was."""
    model, optimizer = build("adamw", seed=0)
    train(model, optimizer, steps=range(1))
    tensors, state = pack_optimizer(optimizer, names=names_of(model))

    again, _ = build("adamw", seed=1)
    if change == "unused":
        again.unused = nn.Parameter(torch.zeros(4))
    elif change == "double":
        again.unused = nn.Parameter(torch.zeros(3).double())
    names = names_of(again)
    if change == "rename":
        names[again.unused] = "renamed"
    split = [p for p in again.parameters() if p.ndim != 1], [p for p in again.parameters() if p.ndim == 1]
    other = make(again) if make else torch.optim.AdamW([{"params": split[0]}, {"params": split[1]}], lr=0.25)
    before = [{key: value for key, value in group.items() if key != "params"} for group in other.param_groups]
    with pytest.raises(CheckpointError) as caught:
        unpack_optimizer(other, names=names, tensors=tensors, state=state)
    assert sentence in str(caught.value)
    assert not other.state
    assert before == [{key: value for key, value in group.items() if key != "params"} for group in other.param_groups]


def test_tensors_of_another_checkpoint_are_refused():
    """JSON and tensors that do not belong together are noticed, in both directions."""
    model, optimizer = build("adamw", seed=0)
    train(model, optimizer, steps=range(1))
    tensors, state = pack_optimizer(optimizer, names=names_of(model))
    tensors["other/unused"] = tensors.pop("step/conv.bias")
    with pytest.raises(
        CheckpointError, match=r"'step/conv\.bias' is announced and not there; tensor 'other/unused' is there"
    ):
        unpack_optimizer(optimizer, names=names_of(model), tensors=tensors, state=state)
    for nonsense in (None, [], {}, {"class": "AdamW", "groups": 3, "parameters": {}}):
        with pytest.raises(CheckpointError, match="not the state of an optimizer"):
            unpack_optimizer(optimizer, names=names_of(model), tensors=tensors, state=nonsense)


def test_state_that_would_be_lost_is_refused():
    """A parameter without a name, and state that belongs to no parameter, are errors and not omissions."""
    model, optimizer = build("adamw", seed=0)
    with pytest.raises(CheckpointError, match=r"parameter 1 of group 0 of AdamW, of shape \(3, 2, 2, 2\), has no name"):
        pack_optimizer(optimizer, names={model.embed.weight: "embed.weight"})
    optimizer.state["global"] = {"count": 1}
    with pytest.raises(CheckpointError, match="keeps state for 1 keys"):
        pack_optimizer(optimizer, names=names_of(model))


def test_tied_weights_are_written_once_and_stay_tied():
    """One tensor under two names is one entry; after loading, the two names are still one tensor."""
    model, _ = build("sgd", seed=0)
    packed = pack_model(model)
    assert "embed.weight" in packed
    assert "head.weight" not in packed
    again, _ = build("sgd", seed=1)
    unpack_model(again, packed)
    assert again.head.weight is again.embed.weight
    assert_same_bits(dict(again.state_dict()), dict(model.state_dict()))


def test_a_tied_checkpoint_does_not_fit_an_untied_model():
    """Untying is a difference like any other, in both directions."""
    model, _ = build("sgd", seed=0)
    untied, _ = build("sgd", seed=0)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    with pytest.raises(CheckpointError, match=r"'head\.weight' is not in the checkpoint"):
        unpack_model(untied, pack_model(model))
    with pytest.raises(CheckpointError, match=r"'head\.weight' is only in the checkpoint"):
        unpack_model(model, pack_model(untied))


def test_views_of_one_memory_round_trip(tmp_path):
    """Slices, transposes and overlapping views of one storage each come back with their own bits."""

    def views(seed):
        flat = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        model = nn.Module()
        matrix = flat.view(3, 4)
        for name, view in {
            "all": flat,
            "head": flat[:5],
            "tail": flat[5:],
            "matrix": matrix,
            "turned": matrix.T,
        }.items():
            model.register_buffer(name, view)
        model.register_buffer("nothing", torch.empty(0))
        model.register_buffer("nothing_else", torch.empty(0))
        return model

    packed = pack_model(views(0))
    assert packed.keys() == views(0).state_dict().keys()
    path = save_checkpoint(tmp_path, step=1, tensors={"model": packed}, state={})
    again = views(1)
    unpack_model(again, load_newest(tmp_path).tensors("model"))
    assert path.exists()
    assert_same_bits(dict(again.state_dict()), dict(views(0).state_dict()))
    assert again.head.data_ptr() == again.all.data_ptr()


def test_a_model_that_differs_is_refused_with_every_difference():
    """Missing, extra, reshaped and retyped entries are all named at once, and the model stays as it was."""
    model, _ = build("sgd", seed=0)
    packed = pack_model(model)
    packed["extra"] = packed.pop("unused")
    packed["conv.bias"] = packed["conv.bias"].double()
    packed["norm.weight"] = packed["norm.weight"][:4]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        unpack_model(model, packed)
    assert str(caught.value) == (
        "the checkpoint does not fit this model: 'unused' is not in the checkpoint; 'extra' is only in the checkpoint; "
        "'norm.weight' is float32[8] here and float32[4] in the checkpoint; "
        "'conv.bias' is float32[3] here and float64[3] in the checkpoint. "
        "Build the model as it was when the checkpoint was written"
    )
    assert_same_bits(dict(model.state_dict()), before)


def test_a_long_list_of_differences_is_bounded():
    """A thousand differences are twenty, and a count of the others."""
    with pytest.raises(CheckpointError, match="; and 980 more") as caught:
        unpack_model(nn.Module(), {f"p{i}": torch.zeros(1) for i in range(1000)})
    assert str(caught.value).count("only in the checkpoint") == 20


def test_entries_that_are_no_plain_tensor_are_refused():
    """Extra state and sparse tensors are named instead of written wrongly."""

    class WithExtra(nn.Module):
        def get_extra_state(self):
            return {"count": 1}

    with pytest.raises(CheckpointError, match="'_extra_state' is a dict"):
        pack_model(WithExtra())
    sparse = nn.Module()
    sparse.register_buffer("mask", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match="'mask' is a Tensor, and a checkpoint holds dense"):
        pack_model(sparse)
