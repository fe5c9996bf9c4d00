"""Turns a pile of images into a curated data set."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

import pyarrow as pa
import pyarrow.parquet as parquet

from components.curate.config import (
    CurateSettings,
    CurateStage,
    EmbeddingDecides,
    Planted,
    RegistrationDecides,
)
from components.curate.embedder import check_gpus
from components.curate.job import LOOKS, Role
from components.curate.pile import StoredImages
from components.curate.seeing import seen_by_ranks, seen_here
from components.ranks.launcher import add_launcher_flag, check_launch
from components.runtime.manifests import AuditReport, DatasetManifest, digest_of, digest_of_file
from components.runtime.stage import Stage, StageContext, run_stage, stage_parser
from components.runtime.storage import delete, delete_remote, exists, is_remote, join_uri
from dinov2_core.curation.auditing import audit
from dinov2_core.curation.curate import (
    Curation,
    CurationSettings,
    EmbeddingOnly,
    Registration,
    curate,
)
from dinov2_core.curation.manifest import write_table
from dinov2_core.curation.planting import PlantCounts, plant_defects
from dinov2_core.curation.sources import ImageFiles
from dinov2_core.data.shards import INDEX_NAME, ShardWriter
from k8s.launchers import ClusterLaunch, Processes, read_launch

TINY_SHARE = 5
"""Of the planted corrupt files, every fifth is a 1 x 1 image."""
PILE = "pile"
"""Folder of the pile that defects are planted into."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; its flags are those of the component."""
    parser = stage_parser("Curate a pile of images.")
    add_launcher_flag(parser)
    return run_stage("curate", args=parser.parse_args(argv), prepare=_stage)


def _stage(args: argparse.Namespace) -> Stage[DatasetManifest]:
    config = CurateStage.model_validate_json(args.config)
    settings, planted = config.settings, config.images.planted
    launch = read_launch(args.launcher)
    _check_launch(launch, settings=settings)
    pile = StoredImages([config.images.uri])
    if not len(pile):
        raise ValueError(
            f"images.uri {config.images.uri} holds no file; name a folder, a glob pattern, a "
            f"Parquet file or a prefix that holds images"
        )
    evaluation = StoredImages(config.evaluation_images)
    seeds = StoredImages([settings.seed_retrieval.uri]) if settings.seed_retrieval else None
    sets: dict[Role, StoredImages] = {"pile": pile, "evaluation": evaluation}
    sets |= {"seeds": seeds} if seeds is not None else {}
    threads = settings.num_threads
    weights = settings.embedding.weights_file

    def work(place: StageContext) -> DatasetManifest:
        return _curate(config, sets, place=place, launch=launch)

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
            "planted": planted.model_dump(mode="json") if planted else None,
            "pile": pile.digest(num_threads=threads),
            "evaluation": evaluation.digest(num_threads=threads),
            "seeds": seeds.digest(num_threads=threads) if seeds else None,
        },
        parents=(),
        work=work,
        metrics=_numbers,
        is_intact=lambda manifest, _: exists(join_uri(manifest.shards_uri, INDEX_NAME)),
        scratch=(PILE,),
    )


def _check_launch(launch: Processes | ClusterLaunch, *, settings: CurateSettings) -> None:
    """Refuse ranks that cannot be started here.

    Raises:
        ValueError: Too many nodes for the launcher, or too many ranks for the GPUs of each.
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
    place: StageContext,
    launch: Processes | ClusterLaunch,
) -> DatasetManifest:
    directory, settings = place.directory, config.settings
    truth = directory / "truth.parquet"
    planted = config.images.planted
    if planted is not None:
        sets = sets | {"pile": _planted_pile(planted, sets, place=place, truth=truth)}
    if settings.embeds_on_ranks(on_cluster=not isinstance(launch, Processes)):
        seen = seen_by_ranks(sets, settings=settings, place=place, launch=launch)
    else:
        seen = seen_here(sets, settings=settings, report=place.report)
    pile = sets["pile"]
    curation = curate(
        seen["pile"],
        evaluation=seen["evaluation"],
        seeds=seen.get("seeds"),
        settings=_core_settings(settings),
        progress=place.report,
    )
    reasons = {count.reason: count.num_images for count in curation.counts if count.reason}
    num_kept = len(pile) - sum(reasons.values())
    if not num_kept:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        raise ValueError(
            f"none of the {len(pile)} files of images.uri {config.images.uri} can be used: {told}; "
            f"name a pile with sound images, or lower curate.min_side_pixels "
            f"({settings.min_side_pixels})"
        )
    table = directory / "images.parquet"
    write_table(curation.manifest, table)
    write_table(curation.edges, directory / "edges.parquet")
    shards = directory / "shards"
    _write_shards(pile, curation, shards, size_bytes=settings.shard_size_bytes, place=place)
    files = sorted(shards.glob("*.tar"))
    manifest = DatasetManifest(
        uri=place.uri(directory),
        sha256=digest_of([digest_of_file(table), *(digest_of_file(file) for file in files)]),
        config_sha256=place.config_sha256,
        mlflow_run_id=place.run.run_id,
        num_images=len(pile),
        num_kept=num_kept,
        reasons=reasons,
        table_uri=place.uri(table),
        shards_uri=place.uri(shards),
        num_shards=len(files),
        size_bytes=sum(file.stat().st_size for file in files),
        audit=_audited(curation.manifest, truth) if planted is not None else None,
    )
    place.run.log_dataset(
        name="curated", uri=manifest.uri, digest=manifest.sha256, context="pretraining"
    )
    delete(place.uri(directory / LOOKS))
    if is_remote(manifest.uri):
        delete_remote(place.uri(directory / PILE))
    return manifest


def _planted_pile(
    planted: Planted, sets: dict[Role, StoredImages], *, place: StageContext, truth: Path
) -> StoredImages:
    """The clean pile and the defects in a folder; the truth, written last, lies beside it.

    A finished one stays as it is: ranks of an earlier attempt may be reading it.
    """
    folder = place.directory / PILE
    if truth.exists() and folder.is_dir():
        return StoredImages([str(folder)])
    place.report("planting defects", 0, len(sets["pile"]))
    shutil.rmtree(folder, ignore_errors=True)
    tiny = planted.corrupt // TINY_SHARE
    plant_defects(
        sets["pile"],
        sets["evaluation"],
        counts=PlantCounts(
            exact=planted.exact_copies,
            near=planted.near_copies,
            leaks=planted.leaks,
            corrupt=planted.corrupt - tiny,
            tiny=tiny,
        ),
        directory=folder,
        truth_path=truth,
        seed=planted.seed,
    )
    return StoredImages([str(folder)])


def _core_settings(settings: CurateSettings) -> CurationSettings:
    decides = settings.verification
    verification: EmbeddingOnly | Registration
    match decides:
        case EmbeddingDecides():
            verification = EmbeddingOnly(
                near_threshold=decides.near_threshold,
                leak_threshold=decides.leak_threshold,
                num_neighbours=decides.num_neighbours,
            )
        case RegistrationDecides():
            verification = Registration(
                candidate_threshold=decides.candidate_threshold,
                near_threshold=decides.near_threshold,
                leak_threshold=decides.leak_threshold,
                num_proposals=decides.num_proposals,
            )
        case _:
            assert_never(decides)
    seeds = settings.seed_retrieval
    return CurationSettings(
        verification=verification,
        seed_neighbours=seeds.num_neighbours if seeds else 1,
    )


def _write_shards(
    pile: ImageFiles, curation: Curation, shards: Path, *, size_bytes: int, place: StageContext
) -> None:
    """Copy the kept images into shards, in the order of the table."""
    shutil.rmtree(shards, ignore_errors=True)
    numbers = {pile.name(number): number for number in range(len(pile))}
    kept = curation.manifest.filter(curation.manifest["kept"])
    columns = (kept[name].to_pylist() for name in ("uri", "format", "width", "height"))
    with ShardWriter(shards, target_size_bytes=size_bytes) as writer:
        for done, (uri, image_format, width, height) in enumerate(zip(*columns, strict=True)):
            content = pile.read(numbers[uri])
            writer.add(content, extension=image_format, width=width, height=height)
            place.report("writing shards", done + 1, len(kept))


def _audited(table: pa.Table, truth: Path) -> AuditReport:
    found = audit(table, parquet.read_table(truth))
    broken = found.corrupt.planted + found.tiny.planted
    return AuditReport(
        exact_recall=found.exact.share,
        near_recall=found.near.share,
        leak_recall=found.leaks.share,
        corrupt_recall=(found.corrupt.found + found.tiny.found) / broken if broken else 1.0,
        distinct_lost=found.lost_share,
    )


def _numbers(manifest: DatasetManifest) -> dict[str, float]:
    numbers = {"num_images": float(manifest.num_images), "num_kept": float(manifest.num_kept)}
    numbers |= {f"set_aside/{reason}": float(n) for reason, n in manifest.reasons.items()}
    if manifest.audit is not None:
        numbers |= {f"audit/{name}": share for name, share in manifest.audit.model_dump().items()}
    return numbers
