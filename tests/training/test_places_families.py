"""Places are right in the families of networks that people train, counted by hand, and whatever their parts are called."""

import copy
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from study.training.roles import Role, gain_places, parameter_roles
from tests.libraries import library
from tests.training import families as f

IMAGES = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)
TOKENS = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),)
RESNET50 = {"stem": 1, "inner": 32, "last": 16, "down": 4}
BOTTLENECKS = ((3, 4, 6, 3), (8, 10, 12, 14))


def parallel(shared: bool, branches_first: bool) -> nn.Module:
    return nn.Sequential(*(f.Parallel(8, shared, branches_first) for _ in range(3)), nn.LayerNorm(8), nn.Linear(8, 5))


def mlp() -> nn.Module:
    layers = [part for _ in range(3) for part in (nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8, 5))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[torch.Tensor, ...], dict[str, int]]] = {
    "resnet-18": (partial(f.resnet, f.basic, (2, 2, 2, 2), (4, 6, 8, 10)), IMAGES, {"stem": 1, "inner": 8, "last": 8, "down": 3}),
    "resnet-18, stochastic depth": (
        partial(f.resnet, f.basic, (2, 2, 2, 2), (4, 6, 8, 10), 0.5),
        IMAGES,
        {"stem": 1, "inner": 8, "last": 8, "down": 3},
    ),
    "resnet-50": (partial(f.resnet, f.bottleneck, *BOTTLENECKS), IMAGES, RESNET50),
    "resnext-50": (partial(f.resnet, partial(f.bottleneck, groups=4), *BOTTLENECKS), IMAGES, RESNET50),
    "se-resnet-50": (partial(f.resnet, partial(f.bottleneck, gate=True), *BOTTLENECKS), IMAGES, RESNET50),
    "pre-activation resnet": (f.preactivation_resnet, IMAGES, {"inner": 7, "stream": 1, "final": 1}),
    "densenet": (f.densenet, IMAGES, {"inner": 8, "final": 1}),
    "convnext-tiny": (f.convnext, (torch.randn(2, 3, 64, 64),), {"stem": 4, "inner": 18, "final": 1}),
    "mobilenet": (f.mobilenet, IMAGES, {"stem": 7, "inner": 2, "last": 1, "final": 1}),
    "darknet": (f.darknet, IMAGES, {"stem": 1, "inner": 2, "last": 2}),
    "vgg-bn": (f.vgg, IMAGES, {"inner": 3, "final": 1}),
    "mlp": (mlp, TOKENS, {"inner": 2, "final": 1}),
    "vit-12": (f.ViT, IMAGES, {"inner": 24, "final": 1}),
    "parallel branches": (partial(parallel, False, False), TOKENS, {"inner": 6, "final": 1}),
    "parallel branches, one norm": (partial(parallel, True, False), TOKENS, {"inner": 3, "final": 1}),
    "parallel branches, added first": (partial(parallel, False, True), TOKENS, {"inner": 6, "final": 1}),
    "parallel branches, added first, one norm": (partial(parallel, True, True), TOKENS, {"inner": 3, "final": 1}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reading", ["symbolic", "example"])
def test_every_norm_stands_where_the_drawing_of_its_family_says(case: str, reading: str) -> None:
    build, example, expected = CASES[case]
    assert Counter(gain_places(build(), example if reading == "example" else None).values()) == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reading", ["symbolic", "example"])
def test_renaming_every_part_to_nonsense_changes_nothing(case: str, reading: str) -> None:
    build, example, _ = CASES[case]
    given = example if reading == "example" else None
    model = build()
    before = [(role.role, role.place, role.scale_invariant) for role in parameter_roles(model, example=given)]
    nonsense = f.renamed(copy.deepcopy(model))
    roles = parameter_roles(nonsense, example=given)
    assert not {part for role in roles for part in role.name.split(".")} & {"norm1", "norm2", "branch", "shortcut", "body", "head", "strength"}
    assert Counter((role.role, role.place, role.scale_invariant) for role in roles) == Counter(before)


@pytest.mark.parametrize("case", CASES)
def test_both_readings_agree_on_every_parameter(case: str) -> None:
    build, example, _ = CASES[case]
    model = build()
    assert parameter_roles(model) == parameter_roles(model, example=example)


def test_the_shared_norm_at_the_start_of_a_pre_activation_block_resets_the_stream() -> None:
    places = gain_places(f.preactivation_resnet())
    assert places["3.norm1.weight"] == "stream" and places["5.weight"] == "final" and places["1.norm1.weight"] == "inner"


def test_layer_scale_is_a_scale_and_tokens_and_positions_are_embeddings() -> None:
    scales = [role.name for role in parameter_roles(f.convnext()) if role.role is Role.SCALE]
    assert len(scales) == 18 and all(name.endswith("strength") for name in scales)
    assert [role.name for role in parameter_roles(f.ViT(1)) if role.role is Role.EMBEDDING] == ["token", "positions"]


IDS = torch.arange(10).reshape(2, 5)
SMALL = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}


def bert() -> nn.Module:
    transformers = library("transformers")
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def gpt2() -> nn.Module:
    transformers = library("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_head=2, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    transformers = library("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_hidden_layers=32, num_key_value_heads=1))


def phi() -> nn.Module:
    transformers = library("transformers")
    return transformers.PhiModel(transformers.PhiConfig(**SMALL, num_hidden_layers=4))


LANGUAGE = {
    "BERT-base": (bert, {"stem": 1, "stream": 24}),
    "GPT-2 small": (gpt2, {"inner": 24, "final": 1}),
    "Llama-7B": (llama, {"inner": 64, "final": 1}),
    "Phi": (phi, {"inner": 4, "final": 1}),
}


@pytest.mark.parametrize("case", LANGUAGE)
def test_norms_of_language_models_of_transformers_stand_where_they_stand(case: str) -> None:
    build, expected = LANGUAGE[case]
    model = build()
    assert Counter(gain_places(model, (IDS,)).values()) == expected
    assert Counter(gain_places(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}).values()) == expected
    assert [role.name for role in parameter_roles(model, example=(IDS,))] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("case", LANGUAGE)
def test_language_models_may_be_called_nonsense(case: str) -> None:
    build, expected = LANGUAGE[case]
    assert Counter(gain_places(f.renamed(build()), (IDS,)).values()) == expected


def test_llama_has_gains_without_shifts_and_gpt2_ties_its_head_to_its_embedding() -> None:
    assert {role.role for role in parameter_roles(llama(), example=(IDS,))} == {Role.EMBEDDING, Role.WEIGHT, Role.GAIN}
    roles = {role.name: role.role for role in parameter_roles(gpt2(), example=(IDS,))}
    assert roles["transformer.wte.weight"] is Role.EMBEDDING and "lm_head.weight" not in roles
    assert roles["transformer.h.0.attn.c_attn.weight"] is Role.WEIGHT and roles["transformer.h.0.attn.c_attn.bias"] is Role.BIAS


def test_a_gain_that_enters_as_one_plus_itself_is_a_scale() -> None:
    transformers = library("transformers")
    gemma = transformers.GemmaModel(transformers.GemmaConfig(**SMALL, num_hidden_layers=1, num_key_value_heads=1, head_dim=4))
    roles = {role.name: role.role for role in parameter_roles(gemma, example=(IDS,))}
    assert roles["norm.weight"] is Role.SCALE and gain_places(gemma, (IDS,)) == {}


def test_a_norm_that_only_feeds_branches_of_another_tower_is_not_guessed() -> None:
    from study.errors import UnknownPlace

    transformers = library("transformers")
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    example = {"input_ids": IDS, "decoder_input_ids": IDS}
    with pytest.raises(UnknownPlace, match=r"1 gains are not known.*encoder\.final_layer_norm\.weight"):
        gain_places(transformers.T5Model(config), example)
    places = gain_places(transformers.T5Model(config), example, places={"encoder.final*": "final"})
    assert Counter(places.values()) == {"inner": 10, "final": 2}
