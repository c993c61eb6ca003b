"""Scale-invariant groups are proven on numbers, and what is not invariant is neither claimed nor proven."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from study.errors import ModelError
from study.training.invariance import InvarianceReport, check_scale_invariance
from study.training.models import build_model
from study.trial import ModelSpec
from tests.libraries import library
from tests.training import families as f

IMAGES = (torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


def shaken(model: nn.Module) -> nn.Module:
    """The model with gains and shifts that are no longer ones and zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def built(**fields: object) -> nn.Module:
    return shaken(build_model(ModelSpec.model_validate(fields), (1, 8, 8), 10))


def kinds(report: InvarianceReport) -> dict[str, int]:
    found = [group.kind for group in report.groups]
    return {kind: found.count(kind) for kind in ("weight", "gain and shift", "stream")}


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "rms", "weight"])
@pytest.mark.parametrize("fields", [{"blocks": [1, 1], "width": 4}, {"name": "mlp", "width": 8, "dropout": 0.2}], ids=["resnet", "mlp"])
def test_every_group_that_is_claimed_is_proven(fields: dict[str, object], norm: str) -> None:
    report = check_scale_invariance(built(**fields, norm=norm), IMAGES)
    assert report.groups and report.proven
    if norm != "group":  # two values of a group may be so close that even an eps of 1e-12 is seen
        assert all(group.moved <= 1e-10 and group.moved_at_ten is None for group in report.groups)


def test_inner_gains_are_invariant_with_their_shifts_and_the_stem_with_every_last_of_its_stage() -> None:
    report = check_scale_invariance(built(blocks=[2, 2], width=4), IMAGES)
    assert report.proven and kinds(report) == {"weight": 10, "gain and shift": 4, "stream": 1}
    pairs = [group.parameters for group in report.groups if group.kind == "gain and shift"]
    assert pairs == [(f"layer{stage}.{block}.norm1.weight", f"layer{stage}.{block}.norm1.bias") for stage in (1, 2) for block in (0, 1)]
    (stream,) = (group.parameters for group in report.groups if group.kind == "stream")
    norms = ("stem.norm", "layer1.0.norm2", "layer1.1.norm2")
    assert stream == tuple(f"{norm}.{own}" for norm in norms for own in ("weight", "bias"))


def test_a_stem_before_a_projection_block_is_invariant_by_itself() -> None:
    report = check_scale_invariance(built(blocks=[2, 2], width=4, block="bottleneck"), IMAGES)
    assert report.proven
    assert ("stem.norm.weight", "stem.norm.bias") in [group.parameters for group in report.groups]


def test_everything_that_writes_the_stream_of_a_pre_norm_transformer_is_jointly_invariant() -> None:
    report = check_scale_invariance(built(name="transformer", order="pre", depth=2, dropout=0.1), IMAGES)
    (stream,) = report.groups
    assert report.proven and stream.kind == "stream"
    assert {"patches.weight", "positions", "blocks.1.attention.out.bias", "blocks.1.mlp.linear2.weight"} <= set(stream.parameters)
    assert not {"head.weight", "final_norm.weight", "blocks.0.mlp.linear1.weight"} & set(stream.parameters)


def test_a_language_model_that_normalizes_in_float32_is_proven_in_float64() -> None:
    transformers = library("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, num_hidden_layers=2
    )
    report = check_scale_invariance(shaken(transformers.LlamaForCausalLM(config)), (torch.arange(10).reshape(2, 5),))
    (stream,) = report.groups
    assert report.proven and stream.moved < 1e-8
    assert stream.parameters[0] == "model.embed_tokens.weight" and len(stream.parameters) == 5


def test_the_gates_of_squeeze_and_excitation_break_the_stream_of_a_stage() -> None:
    gated = check_scale_invariance(
        shaken(f.resnet(lambda i, w, s: nn.Sequential(f.basic(i, w, s), f.Gate(w)), (1, 1), (4, 6))), (torch.randn(4, 3, 16, 16),)
    )
    plain = check_scale_invariance(shaken(f.resnet(f.basic, (1, 1), (4, 6))), (torch.randn(4, 3, 16, 16),))
    assert gated.proven and plain.proven
    assert (kinds(gated)["stream"], kinds(plain)["stream"]) == (0, 1)


class FixedEps(nn.Module):
    """A norm whose eps nobody can set."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.gain, self.head = nn.Linear(6, 6, bias=False), nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.rms_norm(self.inside(x), (6,), self.gain, 1e-5))


def test_where_an_eps_cannot_be_set_the_move_falls_with_the_scale() -> None:
    report = check_scale_invariance(FixedEps(), (torch.randn(4, 6),))
    (group,) = report.groups
    assert group.parameters == ("inside.weight",) and group.proven
    assert group.moved > 1e-10 and group.moved_at_ten is not None and 50 * group.moved_at_ten <= group.moved


class Frozen(nn.BatchNorm1d):
    """A BatchNorm that keeps its statistics while training: it does not normalize."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


def test_a_claim_that_numbers_refute_is_reported_as_not_proven() -> None:
    report = check_scale_invariance(nn.Sequential(nn.Linear(6, 6), Frozen(6), nn.Linear(6, 2)), (torch.randn(4, 6),))
    (group,) = report.groups
    assert not group.proven and not report.proven and group.moved > 0.1


def test_the_model_is_left_as_it_is() -> None:
    model = built(blocks=[1, 1], width=4, dropout=0.2).eval()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    check_scale_invariance(model, IMAGES)
    assert torch.equal(torch.rand(2), expected) and not model.training
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in model.state_dict().items())


def test_an_example_that_cannot_be_trained_on_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"in train mode: ValueError: Expected more than 1 value.*batch of several"):
        check_scale_invariance(built(name="mlp", norm="batch"), (IMAGES[0][:1],))
