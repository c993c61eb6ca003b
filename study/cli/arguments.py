"""What several commands take: each argument with its help."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

SpecFile: TypeAlias = Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML or JSON file.", show_default=False)]
Name: TypeAlias = Annotated[str, typer.Argument(metavar="NAME", help="A study in the home.", show_default=False)]
Best: TypeAlias = Annotated[
    str, typer.Argument(metavar="NAME", help="A study in the home, a best.yaml, or the id of an MLflow run.", show_default=False)
]
Sets: TypeAlias = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Replace a field or a section of the spec; the value is YAML. Repeatable.")
]
Home: TypeAlias = Annotated[Path | None, typer.Option("--home", metavar="DIR", help="Folder of all studies. Default: $STUDY_HOME, else ./studies.")]
TrackingUri: TypeAlias = Annotated[
    str | None, typer.Option("--tracking-uri", metavar="URI", help="MLflow store. Default: $MLFLOW_TRACKING_URI, else SQLite in the home.")
]
Address: TypeAlias = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="Dashboard of the Ray cluster to which it was submitted, as http://head:8265.")
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
