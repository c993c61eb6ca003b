"""Starter: a commented spec for the user's case, to be edited.

Start(model, data, rule, scientific, ...) ─spec_text─> YAML that is checked ─write_spec─> a new file
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from study.document import parse_value, to_yaml
from study.errors import HomeError, Problem, SpecError
from study.fields import field_type
from study.spec import StudySpec, check
from study.trial import IMPORT

TRIALS_PER_ARM = 12
"""Trials of each arm: enough that the best of them is not a lucky start, few enough for a first look."""

GAMMA = {
    "mlp": ["none", "inner", "final", "all"],
    "resnet": ["none", "last", "inner+last", "all"],
    "transformer": ["none", "stem", "stream", "all"],
}
"""Policies of places where each model has gains; of the user's own one these are not known."""

RANGES = {
    "sgd": ((1e-2, 1.0), (1e-5, 1e-2)),
    "adam": ((1e-4, 1e-1), (1e-6, 1e-2)),
    "adamw": ((1e-4, 1e-1), (1e-3, 1.0)),
    "lion": ((1e-5, 1e-2), (1e-2, 10.0)),
    "muon": ((1e-3, 1e-1), (1e-3, 1.0)),
}
"""Where learning rate and decay of each rule are first looked for: its usual values, and a decade around them."""

_COMPARED = "  # Compared: each combination of values is an arm, with equally many trials and a sampler of its own.\n"

_MODELS = {
    "mlp": "{name: mlp, norm: batch, width: 64, depth: 2}",
    "resnet": "{name: resnet, norm: batch, width: 16, blocks: [2, 2]}",
    "transformer": "{name: transformer, norm: layer, width: 64, depth: 2}",
}


@dataclass(frozen=True, slots=True)
class Start:
    """What a first spec is written from."""

    name: str
    question: str
    model: str = "resnet"
    data: str = "digits"
    rule: str = "sgd"
    scientific: tuple[str, ...] = ("optimizer.gamma",)
    """Paths of the axes that are compared, each with its values where they are not the usual ones: `optimizer.gamma=[none, last]`."""


def spec_text(start: Start) -> str:
    """The spec as commented YAML.

    Raises:
        SpecError: if the values of an axis are not known, or the result is no valid spec, with every problem.
    """
    arms = _arms(start)
    number = 1
    for values in arms.values():
        number *= max(1, len(values))
    ranges = dict(zip(("optimizer.lr", "optimizer.weight_decay"), RANGES.get(start.rule, RANGES["sgd"]), strict=True))
    tuned = "".join(
        f"  {path}: {{low: {_number(low)}, high: {_number(high)}, log: true}}\n" for path, (low, high) in ranges.items() if path not in arms
    )
    compared = "".join(f"  {path}: {{choices: {_inline(values)}, role: scientific}}\n" for path, values in arms.items())
    text = f"""\
# A study of your own. Edit it, then:
#   study validate FILE    every mistake at once
#   study plan FILE        trials, steps, and what decay does to each parameter
#   study run FILE         Ctrl-C stops it cleanly, the same command goes on
# Every field with its meaning: study schema
version: 1
{_line("name", start.name)}
{_line("question", start.question)}

# One complete trial; `space` varies some of its fields.
trial:
{_data(start.data)}
{_model(start.model)}
  # rule: sgd, adam, adamw, lion or muon. gamma: which norm gains decay touches.
  optimizer: {{rule: {_inline(start.rule)}, gamma: none, shift: exempt}}
  schedule: {{epochs: 20, warmup: 0.05, shape: cosine}}
  trace: {{every: 20}}    # optimizer steps between samples of effective learning rates

space:
  # Tuned within each arm. Widen an axis at whose end the best lies; the report says so.
{tuned}{_COMPARED if arms else ""}{compared}
# Trials in all arms together: {TRIALS_PER_ARM} each.
search: {{sampler: tpe, trials: {TRIALS_PER_ARM * number}, seed: 0}}
objective: {{metric: val/error, direction: minimize}}
# Most trials are stopped early; grace is the number of epochs that each one gets.
stopping: {{scheduler: asha, grace: 5, reduction: 3}}
# When the search has ended, the best of each arm are trained again with fresh seeds: these decide, not the values they were chosen by.
replicate: {{top: 2, seeds: 5}}
# The whole study ends after this time; running trials end cleanly.
budget: {{wall: 4h}}
"""
    checked(text)
    return text


def checked(text: str) -> StudySpec:
    """The spec that a text describes."""
    return check(parse_value(text))


def write_spec(text: str, path: Path) -> None:
    """Writes a new file.

    Raises:
        HomeError: if there is one of this name, or it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise HomeError("there is a file of this name, and it is left as it is", where=str(path), remedy="name another, or remove it first") from None
    except OSError as error:
        raise HomeError(f"cannot be written ({error.strerror})", where=str(path), remedy="name a file in a folder that you may write to") from None


def _data(name: str) -> str:
    if name.startswith(IMPORT):
        return (
            "  # Your function: returns training images and labels, then validation images and labels. `args` are its keyword arguments.\n"
            f"  data: {{name: {_inline(name)}, args: {{}}, batch_size: 64}}"
        )
    if name == "npz":
        return "  # A file with arrays `images` and `labels`.\n  data: {name: npz, path: data.npz, batch_size: 64, validation: 0.2}"
    return f"  # validation: the share of images that the search is scored on.\n  data: {{name: {_inline(name)}, batch_size: 64, validation: 0.2}}"


def _model(name: str) -> str:
    if name.startswith(IMPORT):
        return f"  # Your function: returns a torch.nn.Module. `args` are its keyword arguments.\n  model: {{name: {_inline(name)}, args: {{}}}}"
    return f"  model: {_MODELS.get(name, f'{{name: {_inline(name)}}}')}"


def _arms(start: Start) -> dict[str, list[Any]]:
    """Path to the values that are compared.

    Raises:
        SpecError: with every axis whose values are neither given nor known.
    """
    found: dict[str, list[Any]] = {}
    problems = []
    for given in start.scientific:
        path, equals, text = given.partition("=")
        try:
            values = parse_value(text) if equals else _usual(path, start.model)
        except ValueError as error:
            values = f"{text}: {error}"
        if not isinstance(values, list) or not values:
            remedy = f"give them: --scientific '{path}=[VALUE, VALUE]'"
            problems.append(Problem("scientific", f"the values to compare are not known (got {given!r})", "--scientific", remedy))
            continue
        found[path] = values
    if problems:
        raise SpecError(problems)
    return found


def _usual(path: str, model: str) -> list[Any] | None:
    """The values of a field that takes a few words or a boolean, and policies that a model has gains for; None of any other field."""
    if path == "optimizer.gamma":
        return GAMMA.get(model, ["none", "all"])
    annotation = field_type(path)
    if annotation is bool:
        return [False, True]
    words = [word for word in get_args(annotation) if isinstance(word, str)]
    return words if words and len(words) == len(get_args(annotation)) else None


def _line(key: str, value: str) -> str:
    return to_yaml({key: value}).rstrip("\n")


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    return to_yaml({"value": value}).removeprefix("value:").strip()


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")
