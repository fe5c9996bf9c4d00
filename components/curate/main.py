"""Turns source images into a curated data set."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as parquet

from components.curate.config import CurateSettings, CurateStage
from components.curate.embedder import check_gpus
from components.curate.job import SCANS, Role
from components.curate.scanning import scan_here, scan_on_ranks
from components.curate.shards import write_shards
from components.curate.stored_images import StoredImages
from components.ranks.launcher import add_launcher_flag, check_launch
from components.runtime.manifests import AuditReport, DatasetManifest, digest_of, digest_of_file
from components.runtime.stage import Stage, StageContext, run_stage, stage_parser
from components.runtime.storage import delete, delete_remote, exists, is_remote, join_uri
from dinov2_core.curation.auditing import audit
from dinov2_core.curation.curate import Curation, curate
from dinov2_core.curation.manifest import count_reasons, write_table
from dinov2_core.curation.synthetic_defects import add_defects
from dinov2_core.data.shards import INDEX_NAME
from dinov2_core.errors import InputError
from k8s.launchers import Processes, TrainJobLaunch, read_launch

WITH_DEFECTS = "source_images"
"""Folder of the images that synthetic defects are added to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; its flags are those of the component."""
    parser = stage_parser("Curate images.")
    add_launcher_flag(parser)
    return run_stage("curate", args=parser.parse_args(argv), prepare=_stage)


def _stage(args: argparse.Namespace) -> Stage[DatasetManifest]:
    config = CurateStage.model_validate_json(args.config)
    settings, defects = config.settings, config.images.synthetic_defects
    launch = read_launch(args.launcher)
    _check_launch(launch, settings=settings)
    source = StoredImages([config.images.uri])
    if not len(source):
        raise InputError(
            f"images.uri {config.images.uri} holds no file; name a folder, a glob pattern, a "
            f"Parquet file or a prefix that holds images"
        )
    evaluation = StoredImages(config.evaluation_images)
    seeds = StoredImages([settings.seed_retrieval.uri]) if settings.seed_retrieval else None
    sets: dict[Role, StoredImages] = {"source": source, "evaluation": evaluation}
    sets |= {"seeds": seeds} if seeds is not None else {}
    threads = settings.num_threads
    weights = settings.embedding.weights_file
    return Stage(
        manifest_type=DatasetManifest,
        settings=config,
        identity={
            "settings": settings.model_dump(
                mode="json",
                exclude={
                    "seed_retrieval": {"uri"},
                    "embedding": {"weights", "path"},
                    "num_threads": True,
                    "embedding_topology": True,
                },
            ),
            "embedder": digest_of_file(Path(weights)) if weights else None,
            "synthetic_defects": defects.model_dump(mode="json") if defects else None,
            "source": source.digest(num_threads=threads),
            "evaluation": evaluation.digest(num_threads=threads),
            "seeds": seeds.digest(num_threads=threads) if seeds else None,
        },
        parents=(),
        work=lambda stage: _curate(config, sets, stage=stage, launch=launch),
        is_intact=lambda manifest, _: exists(join_uri(manifest.shards_uri, INDEX_NAME)),
        scratch=(WITH_DEFECTS,),
    )


def _check_launch(launch: Processes | TrainJobLaunch, *, settings: CurateSettings) -> None:
    """Check that the ranks can be started.

    Raises:
        SettingsError: Too many nodes for the launcher, or too many ranks for the GPUs of each.
    """
    topology = settings.embedding_topology
    if topology is None:
        return
    check_launch(launch, topology=topology, name="curate.embedding_topology")
    if isinstance(launch, Processes):
        check_gpus(settings.embedding, num_processes=topology.processes_per_node)


def _curate(
    config: CurateStage,
    sets: dict[Role, StoredImages],
    *,
    stage: StageContext,
    launch: Processes | TrainJobLaunch,
) -> DatasetManifest:
    directory, settings = stage.directory, config.settings
    ground_truth = directory / "ground_truth.parquet"
    if config.images.synthetic_defects is not None:
        sets = sets | {"source": _with_defects(config, sets, stage=stage, path=ground_truth)}
    if settings.embeds_on_ranks(on_cluster=not isinstance(launch, Processes)):
        scans = scan_on_ranks(sets, settings=settings, stage=stage, launch=launch)
    else:
        scans = scan_here(sets, settings=settings, report=stage.report)
    seed_retrieval = settings.seed_retrieval
    curation = curate(
        scans["source"],
        evaluation=scans["evaluation"],
        seeds=scans.get("seeds"),
        verification=settings.verification,
        seed_neighbours=seed_retrieval.num_neighbours if seed_retrieval else 1,
        progress=stage.report,
    )
    shards = directory / "shards"
    table = write_shards(
        sets["source"],
        curation.manifest,
        shards,
        size_bytes=settings.shard_size_bytes,
        progress=stage.report,
    )
    manifest = _manifest(config, replace(curation, manifest=table), shards, stage=stage)
    if config.images.synthetic_defects is not None:
        found = audit(table, parquet.read_table(ground_truth))
        manifest = manifest.model_copy(update={"audit": AuditReport(**asdict(found))})
    stage.run.log_dataset(
        name="curated", uri=manifest.uri, digest=manifest.sha256, context="pretraining"
    )
    delete(stage.uri(directory / SCANS))
    if is_remote(manifest.uri):
        delete_remote(stage.uri(directory / WITH_DEFECTS))
    return manifest


def _manifest(
    config: CurateStage, curation: Curation, shards: Path, *, stage: StageContext
) -> DatasetManifest:
    """Write the tables and describe all that was written."""
    num_images, reasons = curation.manifest.num_rows, count_reasons(curation.manifest)
    num_kept = num_images - sum(reasons.values())
    if not num_kept:
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise InputError(
            f"none of the {num_images} files of images.uri {config.images.uri} can be used: "
            f"{counts}; name a folder with whole images, or lower curate.min_side_pixels "
            f"({config.settings.min_side_pixels})"
        )
    table = stage.directory / "images.parquet"
    write_table(curation.manifest, table)
    write_table(curation.edges, stage.directory / "edges.parquet")
    files = sorted(shards.glob("*.tar"))
    return DatasetManifest(
        uri=stage.uri(stage.directory),
        sha256=digest_of([digest_of_file(table), *(digest_of_file(file) for file in files)]),
        config_sha256=stage.config_sha256,
        mlflow_run_id=stage.run.run_id,
        num_images=num_images,
        num_kept=num_kept,
        reasons=reasons,
        table_uri=stage.uri(table),
        shards_uri=stage.uri(shards),
        num_shards=len(files),
        size_bytes=sum(file.stat().st_size for file in files),
    )


def _with_defects(
    config: CurateStage, sets: dict[Role, StoredImages], *, stage: StageContext, path: Path
) -> StoredImages:
    """Images and synthetic defects in a folder; the ground truth, written last, lies beside it.

    A finished one stays as it is: ranks of an earlier attempt may be reading it.
    """
    folder, defects = stage.directory / WITH_DEFECTS, config.images.synthetic_defects
    assert defects is not None, config.images
    if not (path.exists() and folder.is_dir()):
        stage.report("adding synthetic defects", 0, len(sets["source"]))
        shutil.rmtree(folder, ignore_errors=True)
        add_defects(
            sets["source"],
            sets["evaluation"],
            defects=defects,
            directory=folder,
            ground_truth_path=path,
        )
    return StoredImages([str(folder)])
