"""torch.export and ONNX of a rewired model in eval mode: a graph of the recurrence alone, with its output."""

import io

import onnxruntime
import pytest
import torch
from torch.export import Dim, export

import revwire
from tests.helpers.couplings import RULES, Trunk, rewired
from tests.helpers.nets import NETS, assert_same, loss, pair

each_net = pytest.mark.parametrize("name", NETS)
# what a second run would take: random states, copies of buffers, dropped tensors; and types, which are no computation
LEFTOVERS = ("clone", "detach", "rng", "promote_types", "empty", "copy_")


def operations(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("grad", [True, False])
@each_net
def test_the_exported_graph_gives_the_recurrence_by_hand(name, grad):
    reference, model, x = pair(name, dropout=0.2, train=False)
    with torch.set_grad_enabled(grad):
        program = export(model, (x,))
        wanted = export(reference, (x,))
    other = 2 * x + 1
    assert_same([reference(other)], [program.module()(other)])
    # the reference's own code may copy too
    spare = [op for op in operations(program) if any(word in op for word in LEFTOVERS)]
    assert spare == [op for op in operations(wanted) if any(word in op for word in LEFTOVERS)]
    assert {n for n, _ in model.named_parameters()} == set(program.graph_signature.parameters)


@pytest.mark.parametrize("name", ["loop", "vit", "convnext"])
def test_a_batch_of_any_size(name):
    reference, model, x = pair(name, train=False)
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
    for other in (x.repeat(3, *[1] * (x.ndim - 1)), x[:2]):
        assert_same([reference(other)], [program.module()(other)])


def test_a_saved_program_is_loaded_and_holds_nothing_but_torch_s_operations():
    reference, model, x = pair("vit", train=False)
    program, file = export(model, (x,)), io.BytesIO()
    assert all(op.startswith("aten.") or "getitem" in op for op in operations(program))
    torch.export.save(program, file)
    file.seek(0)
    assert_same([reference(x)], [torch.export.load(file).module()(x)])


def test_the_exported_graph_decomposed_is_trainable_too():
    """Training a graph is not memory-free: it is plain autograd through the recurrence."""
    reference, model, x = pair("loop")
    program = export(model, (x,)).run_decompositions()
    found = program.module()
    for m in (reference, found):
        loss(m(x)).backward()
    by_name = dict(found.named_parameters())
    for name, parameter in reference.net.named_parameters():
        assert_same([parameter.grad], [by_name[name].grad])


@pytest.mark.parametrize("name", RULES)
def test_every_coupling(name):
    x = torch.randn(4, 8)
    model = rewired(name, Trunk(4), x).eval()
    assert_same([model(x)], [export(model, (x,)).module()(x)])


@pytest.mark.parametrize(
    "dials", [{"chunks": 2}, {"transitions": "checkpoint"}, {"anchor": "*"}, {"keep": 2}]
)
def test_dials(dials):
    reference, _, x = pair("vit", train=False)
    model = revwire.rewire(NETS["vit"].build(), x, **dials).eval()
    assert_same([reference(x)], [export(model, (x,)).module()(x)])


def test_fixed_point_streams():
    """On a grid that is given; one that follows what enters has to see numbers."""
    torch.manual_seed(0)
    net, x = Trunk(4), torch.randn(4, 8)
    model = revwire.rewire(net, x, exact=16).eval()
    assert torch.equal(model(x), export(model, (x,)).module()(x))
    assert not torch.equal(model(x), revwire.rewire(revwire.unwire(model), x)(x))


def test_the_model_is_as_before():
    _, model, x = pair("vit", train=False)
    wanted = model(x)
    export(model, (x,))
    out = model(x)
    assert torch.equal(out, wanted)
    loss(out).backward()
    assert all(p.grad is not None for p in model.parameters())


# torch's own: the exporter calls what it deprecates
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["loop", "vit", "convnext"])
def test_onnx(name, tmp_path):
    reference, model, x = pair(name, dropout=0.2, train=False)
    reference, model, x = reference.float(), model.float(), x.float()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (named,) = session.get_inputs()
    other = 2 * x + 1
    (found,) = session.run(None, {named.name: other.numpy()})
    assert_same([reference(other).detach()], [torch.from_numpy(found)], 1e-5)
