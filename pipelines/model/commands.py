"""Commands that use a registered model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add embed and export."""
    embed = commands.add_parser("embed", help="embed images with a registered teacher")
    embed.add_argument("images", help="file, folder, glob pattern, Parquet file or s3:// prefix")
    _add_model_flags(embed)
    embed.add_argument(
        "-o", "--output", type=Path, default=Path("embeddings.parquet"), help="file to write"
    )
    embed.add_argument("--batch-size", type=int, default=64, help="images per forward pass")
    embed.add_argument("--trust-code", action="store_true", help="run a foreign model's code")
    embed.set_defaults(command=_embed)
    export = commands.add_parser("export", help="write a registered teacher for another program")
    _add_model_flags(export)
    export.add_argument(
        "--format", required=True, choices=("timm", "huggingface"), help="program that loads it"
    )
    export.add_argument("-o", "--output", type=Path, required=True, help="directory to write")
    export.set_defaults(command=_export)


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="such as models:/NAME@champion")
    parser.add_argument("--tracking-uri", default="", help="default: MLFLOW_TRACKING_URI")


def _embed(args: argparse.Namespace) -> int:
    from pipelines.model.embed import embed_images

    count, skipped = embed_images(
        args.images,
        model_uri=args.model,
        output=args.output,
        tracking_uri=args.tracking_uri,
        batch_size=args.batch_size,
        trusts_code=args.trust_code,
    )
    note = f"; {skipped} unreadable files have no embedding" if skipped else ""
    sys.stdout.write(f"wrote {count} rows to {args.output}{note}\n")
    return 1 if skipped == count else 0


def _export(args: argparse.Namespace) -> int:
    from pipelines.model.export import export_teacher

    checked = export_teacher(
        args.model, target=args.format, directory=args.output, tracking_uri=args.tracking_uri
    )
    sys.stdout.write(f"wrote {args.output}; {checked}\n")
    return 0
