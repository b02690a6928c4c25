"""What `verify` measures of the inverse: how far the chains' inputs drift in floats, and that exact ones do not."""

import pytest
import torch

import revwire
from revwire.measure.drift import drifts
from revwire.rewrite.wired import plan_of
from revwire.run.options import Options
from tests.helpers.couplings import WIDTH, Trunk, noise, rewired


def test_drift_tells_float_from_exact():
    x = noise()
    model = rewired("bdia", Trunk(12, dropout=0.0), x)
    (drift,) = drifts(model, Options(revwire.BDIA()), plan_of(model), (x,), {}).chains
    assert drift.steps == 12
    assert drift.exact == 0
    assert 1e-7 < drift.float32 < 1e-2
    assert drift.bfloat16 > 0
    (drift,) = drifts(model, Options(revwire.Dr2Net(1, 0.3)), plan_of(model), (x,), {}).chains
    assert drift.exact is None


@pytest.mark.parametrize("coupling", ["re2tal", "bdia", "momentum", "dr2net(alpha=0.875,beta=0.125)"])
def test_verify_holds_exact_chains_to_the_bit(coupling):
    report = revwire.verify(Trunk(8), torch.randn(4, 32, WIDTH), coupling=coupling, exact=True)
    assert report.ok, report
    bounds = {check.name: check.bound for check in report.checks}
    assert bounds["gradients, train, float32"] == bounds["chain inputs, exact"] == 0
    assert report.to_dict()["drift"][0]["exact"] == 0


def test_verify_does_not_pass_float_streams_that_lose_the_gradient():
    report = revwire.verify(Trunk(24), torch.randn(4, 32, WIDTH), coupling="bdia")
    failed = [check.name for check in report.checks if not check.ok]
    assert failed == ["gradients, train, float32"]
    assert report.drift.chains[0].float32 > 1e-2
    assert revwire.verify(Trunk(12), torch.randn(4, 32, WIDTH), coupling="bdia").ok
