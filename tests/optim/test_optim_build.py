"""The whole optimizer on a real small V4: phases, state by name, and bitwise resume."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from model.transformer import DeepSeekV4
from optim.adamw import AdamW
from optim.build import build_optimizer
from optim.config import MatmulDtype, OptimConfig, OptimizerName, StateDtype
from optim.groups import Owner
from optim.muon import Muon, MuonEntry
from optim.owned import OwnedParameter
from tests.helpers import small_config

LR = 3e-3


def make(optim=None, trainable=None, **changes):
    """Real parameters with seeded values, and their optimizer."""
    torch.manual_seed(5)
    model = small_config(**changes)
    parameters = dict(DeepSeekV4(model).named_parameters())
    for p in parameters.values():
        torch.nn.init.normal_(p, std=0.1)
    counts = {"o_groups": model.o_groups}
    return parameters, build_optimizer(
        parameters.items(), optim or OptimConfig(), trainable, counts
    )


def run(parameters, optimizer, steps):
    """Steps whose gradients depend on the weights and on the number of the step."""
    for number in steps:
        generator = torch.Generator().manual_seed(number)
        for p in parameters.values():
            p.grad = p.detach() * 0.1 + torch.randn(p.shape, generator=generator)
        optimizer.step(LR / (1 + number))
        optimizer.zero_grad()


def snapshot(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.core
@pytest.mark.parametrize("dtype", [MatmulDtype.fp32, MatmulDtype.bf16])
@pytest.mark.parametrize("state_dtype", [StateDtype.fp32, StateDtype.bf16])
@pytest.mark.parametrize("name", list(OptimizerName))
def test_resume_is_bitwise(name, state_dtype, dtype, tmp_path):
    optim = OptimConfig(name=name, state_dtype=state_dtype)
    optim.muon.dtype = dtype
    parameters, optimizer = make(optim)
    run(parameters, optimizer, range(3))
    torch.save((snapshot(parameters), optimizer.state_dict()), tmp_path / "state.pt")
    run(parameters, optimizer, range(3, 6))

    resumed, other = make(optim)
    weights, state = torch.load(tmp_path / "state.pt")
    for key, p in resumed.items():
        p.data.copy_(weights[key])
    other.load_state_dict(state)
    run(resumed, other, range(3, 6))
    for key, p in parameters.items():
        assert torch.equal(p, resumed[key]), key
    for key, tensors in optimizer.state_dict().items():
        for kind, tensor in tensors.items():
            assert torch.equal(tensor, other.state_dict()[key][kind]), (key, kind)


def test_state_is_complete_before_the_first_step_and_keyed_by_name():
    parameters, optimizer = make()
    state = optimizer.state_dict()
    assert list(state) == list(parameters)
    for record in optimizer.table:
        kinds = {Owner.muon: {"momentum"}, Owner.adamw: {"exp_avg", "exp_avg_sq", "step"}}
        assert set(state[record.name]) == kinds[record.owner]
    before = {name: {k: tuple(t.shape) for k, t in s.items()} for name, s in state.items()}
    run(parameters, optimizer, range(1))
    after = optimizer.state_dict()
    assert before == {n: {k: tuple(t.shape) for k, t in s.items()} for n, s in after.items()}


@pytest.mark.core
def test_each_parameter_is_moved_by_the_algorithm_that_owns_it():
    parameters, optimizer = make()
    before = snapshot(parameters)
    grads = {name: torch.randn_like(p) for name, p in parameters.items()}
    for name, p in parameters.items():
        p.grad = grads[name].clone()
    optimizer.step(LR)
    assert optimizer.moved == {r.name: r.owner.value for r in optimizer.table}
    config = OptimConfig()
    for record in optimizer.table:
        alone = torch.nn.Parameter(before[record.name].clone())
        alone.grad = grads[record.name]
        if record.owner is Owner.muon:
            entry = MuonEntry("x", alone, record.weight_decay, num_matrices=record.num_matrices)
            Muon([entry], config.muon, torch.float32).step(LR, ["x"])
        else:
            entry = OwnedParameter("x", alone, record.weight_decay)
            AdamW([entry], config.adamw, torch.float32).step(LR, ["x"])
        # bf16 Newton-Schulz may round by batch: 2 % of an update of about lr.
        assert (alone - parameters[record.name]).abs().max() < 0.05 * LR, record.name


@pytest.mark.core
def test_frozen_parameters_and_their_state_do_not_move_at_all():
    def indexer(name):
        return ".indexer." in name

    parameters, optimizer = make(trainable=indexer)
    before, state = snapshot(parameters), copy.deepcopy(optimizer.state_dict())
    run(parameters, optimizer, range(2))
    assert set(optimizer.moved) == {n for n in parameters if indexer(n)}
    assert list(optimizer.trainable_parameters()) == [n for n in parameters if indexer(n)]
    assert len(optimizer.moved) > 0
    for name, p in parameters.items():
        assert torch.equal(p, before[name]) != indexer(name), name
        same = all(torch.equal(t, state[name][k]) for k, t in optimizer.state_dict()[name].items())
        assert same != indexer(name), name
    optimizer.set_trainable(None)  # the next phase
    run(parameters, optimizer, range(2, 3))
    assert set(optimizer.moved) == set(parameters)
    assert not any(torch.equal(p, before[n]) for n, p in parameters.items())


def test_trained_parameter_that_cannot_have_a_gradient_is_an_error():
    parameters, optimizer = make()
    parameters["head.weight"].requires_grad_(False)
    before = snapshot(parameters)
    with pytest.raises(ValueError, match=r"head\.weight .* requires_grad=False"):
        run(parameters, optimizer, range(1))
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())


def test_zero_grad_drops_frozen_gradients_too():
    parameters, optimizer = make(trainable=lambda name: name == "head.weight")
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters.values())


def test_state_of_another_model_or_optimizer_is_refused_and_nothing_is_loaded():
    parameters, optimizer = make()
    run(parameters, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    _, deeper = make(n_shared_experts=0)
    with pytest.raises(ValueError, match=r"parameters differ.*shared_experts"):
        optimizer.load_state_dict(deeper.state_dict())
    _, wider = make(vocab_size=192)
    with pytest.raises(ValueError, match=r"embed\.weight.exp_avg .*\(192, 32\).*\(128, 32\)"):
        optimizer.load_state_dict(wider.state_dict())
    _, adamw = make(OptimConfig(name=OptimizerName.adamw))
    with pytest.raises(ValueError, match=r"state of .* differ: only saved \['exp_avg'"):
        optimizer.load_state_dict(adamw.state_dict())
    for name, tensors in optimizer.state_dict().items():
        assert all(torch.equal(t, before[name][k]) for k, t in tensors.items())


def test_meta_parameters_give_the_table_without_memory():
    with torch.device("meta"):
        parameters = dict(DeepSeekV4(small_config()).named_parameters())
    optimizer = build_optimizer(parameters.items(), OptimConfig(), None, {"o_groups": 2})
    assert [r.name for r in optimizer.table] == list(parameters)
    assert optimizer.state_dict()["head.weight"]["exp_avg"].device.type == "meta"


def test_bad_config_is_refused():
    with pytest.raises(ValueError, match=r"optim\.lr=0"):
        make(OptimConfig(lr=0.0))


@pytest.fixture
def mesh():
    dist.init_process_group("fake", rank=0, world_size=2)  # no communication is needed here
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["embed.weight", "norm.weight"])
def test_adamw_moves_the_local_shard_and_keeps_state_sharded(name, mesh):
    whole, grad = torch.randn(10, 3), torch.randn(10, 3)
    plain = torch.nn.Parameter(whole.clone())
    sharded = torch.nn.Parameter(DTensor.from_local(whole[:5].clone(), mesh, [Shard(0)]))
    plain.grad, sharded.grad = grad, DTensor.from_local(grad[:5], mesh, [Shard(0)])
    states = []
    for parameter in (plain, sharded):
        optimizer = build_optimizer([(name, parameter)], OptimConfig())
        optimizer.step(LR)
        states.append(optimizer.state_dict()[name]["exp_avg_sq"])
    assert (states[1].shape, states[1].placements) == ((10, 3), (Shard(0),))
    # Vector tails round otherwise than full vectors.
    torch.testing.assert_close(sharded.to_local(), plain[:5], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states[1].to_local(), states[0][:5], rtol=1e-6, atol=1e-7)


def test_muon_refuses_a_shard(mesh):
    matrix = torch.nn.Parameter(DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wkv\.weight is sharded"):
        build_optimizer([("layers.0.attn.wkv.weight", matrix)], OptimConfig())
