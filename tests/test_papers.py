"""The papers' studies are valid and long enough for what they claim, and the tables of docs/papers.md follow from the trials that are kept."""

import pytest

from docs.papers import KEPT, SPECS, STUDIES, columns_of, kept_table, pages
from study.claimspec import Spread
from study.results.claims import verify
from study.spec import StudySpec, load_spec

TAIL = 0.3
"""Final values are over the last 30% of samples."""

STEPS = {"digits": 44, "mnist5k": 125}
"""Steps in an epoch of 32 images, of 1,437 and 4,000."""

FULL = tuple(f"{name}_full" for name in STUDIES)


def spec(name: str) -> StudySpec:
    return load_spec(SPECS / f"{name}.yaml")


def test_every_spec_is_of_one_of_the_studies() -> None:
    assert {path.stem for path in SPECS.glob("*.yaml")} == {*STUDIES, *FULL}


@pytest.mark.parametrize("name", [*STUDIES, *FULL])
def test_a_study_tries_its_whole_grid(name: str) -> None:
    study, grid = spec(name), 1
    for axis in study.space.values():
        grid *= len(axis.choices or ())
    assert (study.search.sampler, study.search.trials, study.stopping.scheduler) == ("grid", grid, "none")


@pytest.mark.parametrize("name", [*STUDIES, *FULL])
def test_seeds_change_initial_weights_and_data_and_suffice_for_a_verdict(name: str) -> None:
    axis = spec(name).space["seed"]
    assert axis.also == ("data.seed",) and len(axis.choices or ()) >= 5


@pytest.mark.parametrize("name", STUDIES)
def test_the_full_study_claims_at_least_what_the_reduced_one_does(name: str) -> None:
    """The same statements of the same papers; about more blocks, where it has them."""
    reduced, full = ({(claim.id.split("-")[0], claim.source, str(claim.expect)) for claim in spec(each).claims} for each in (name, f"{name}_full"))
    assert reduced == full


@pytest.mark.parametrize("name", ["effective_lr", "rotational_equilibrium", "effective_lr_full", "rotational_equilibrium_full"])
@pytest.mark.parametrize("data", STEPS)
def test_trials_have_five_relaxation_times_before_their_last_samples(name: str, data: str) -> None:
    study = spec(name)
    for rule in study.space["optimizer.rule"].choices or () if "optimizer.rule" in study.space else ("sgd",):
        if rule == "adam":  # which has no equilibrium that theory knows of
            continue
        trial = study.trial_for(assignment(study, {"data.name": data, "optimizer.rule": rule}))
        rate = 2 * trial.optimizer.lr * trial.optimizer.weight_decay
        if rule == "sgd":
            rate /= 1 - trial.optimizer.momentum
        assert (trial.schedule.shape, trial.schedule.warmup, trial.data.label_noise) == ("constant", 0, 0.2)
        assert (1 - TAIL) * trial.schedule.epochs * STEPS[data] * rate >= 5


def assignment(study: StudySpec, chosen: dict[str, str]) -> dict[str, object]:
    """The first value of every axis that exists beside the chosen values."""
    found = {path: chosen[path] for path in study.space if path in chosen}
    for path, axis in study.space.items():
        if path not in found and all(found.get(parent) == value for parent, value in axis.when.items()):
            found[path] = (axis.choices or ())[0]
    return found


def test_the_iso_product_claim_compares_the_row_with_the_diagonal() -> None:
    study = spec("iso_product")
    products, rates = (study.space[f"optimizer.{name}"].choices or () for name in ("intrinsic_lr", "lr"))
    decays = [
        study.trial_for({"optimizer.intrinsic_lr": product, "optimizer.lr": rate}).optimizer.weight_decay
        for product, rate in zip(products, rates, strict=True)
    ]
    form = study.claims[0].form
    assert isinstance(form, Spread)
    assert decays == pytest.approx([form.against["optimizer.weight_decay"].equals] * 3, rel=1e-12)
    assert study.claims[0].where["optimizer.intrinsic_lr"].equals == products[1]


@pytest.mark.parametrize("name", STUDIES)
def test_kept_trials_hold_all_that_the_claims_speak_of(name: str) -> None:
    study, table = spec(name), kept_table(KEPT / f"{name}.csv")
    assert len(table) == study.search.trials and table["trial_id"].is_unique
    assert {column for claim in study.claims for column in columns_of(claim)} <= set(table.columns)


def test_the_tables_follow_from_the_trials_that_are_kept() -> None:
    for path, page in pages().items():
        assert page == path.read_text("utf-8"), "run `python docs/papers.py`"


def test_a_verdict_depends_on_the_trials() -> None:
    study, table = spec("gamma_guidelines"), kept_table(KEPT / "gamma_guidelines.csv")
    claim = next(claim for claim in study.claims if claim.id == "k-2-down-layer2-0-digits")
    column = "final/branch_ratio/layer2.0"
    alike = table.assign(**{column: table[column].where(table["optimizer.gamma"] != "down", 1.0)})
    assert [verify([claim], rows)[0].verdict for rows in (table, alike)] == ["confirmed", "refuted"]
