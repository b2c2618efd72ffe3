"""Options that ``run`` and ``compare`` share, under one name and with one meaning."""

from pathlib import Path
from typing import Annotated

import typer

from als_ext.models import MODELS

DataDir = Annotated[
    Path | None, typer.Option(help="Folder of the idx files of mnist and fashion-mnist.")
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="Names (als-ext info lists them): repeat it or give a comma list.",
        show_default="erm,als-lc",
    ),
]
Setting = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE of the methods that have it, as in q=0.7. Repeat it."),
]
CleanPerClass = Annotated[
    int | None,
    typer.Option(
        help="Samples of each class whose true label a method may know, if it needs some.",
        show_default="0",
    ),
]
Model = Annotated[str | None, typer.Option(help=", ".join(MODELS) + ".", show_default="auto")]
Embedding = Annotated[
    str | None,
    typer.Option(help="Layer that gives the embedding.", show_default="the model's own"),
]
Epochs = Annotated[int | None, typer.Option(show_default="by size of the data")]
BatchSize = Annotated[int | None, typer.Option(show_default="by size of the data")]
LearningRate = Annotated[float | None, typer.Option(show_default="by size of the data")]
Warmup = Annotated[
    int | None, typer.Option(help="Epochs before the first correction.", show_default="by size")
]
Period = Annotated[
    int | None, typer.Option(help="Epochs between corrections.", show_default="by size")
]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda[:N].", show_default="auto")]
AmpMode = Annotated[str | None, typer.Option(help="off, bf16 or f16.", show_default="off")]
Augment = Annotated[
    str | None,
    typer.Option(
        help="Random views of images: auto, shift, affine or none.",
        show_default="shift for als-lc on images",
    ),
]
CheckpointSeconds = Annotated[
    float, typer.Option(help="Seconds between checkpoints inside an epoch.")
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads.", show_default="1 for the mlp, else torch's")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, only.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
