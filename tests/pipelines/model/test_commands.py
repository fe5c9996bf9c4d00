from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.__main__ import command_parser


def test_embed_and_export_name_their_model_and_output() -> None:
    parse = command_parser().parse_args
    embed = parse(["embed", "pile", "--model", "models:/m@champion"])
    assert (embed.images, embed.output, embed.batch_size) == (
        "pile",
        Path("embeddings.parquet"),
        64,
    )
    flags = ["--model", "m", "--format", "timm", "-o", "out"]
    assert parse(["export", *flags]).output == Path("out")
    with pytest.raises(SystemExit):
        parse(["export", *flags[:4]])
