"""One table in three forms: JSON with everything, CSV with plain numbers, Markdown for people."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any

from flowcache.bench.figures import Row
from flowcache.runtime.metrics import METRICS
from flowcache.runtime.text_files import escaped, table_row

Shape = Mapping[str, type | tuple[type, ...]]
"""Key -> what its value must be."""

SCHEMA_VERSION = 2
MISSING = "-"


@dataclass(frozen=True)
class Column:
    """One figure of every row."""

    key: str
    head: str
    spec: str
    """How Python's `format` writes it."""
    scale: float = 1.0
    """What the number is multiplied by before it is written."""
    is_published: bool = False
    """Whether the paper has it, too: then a column with its figures follows."""
    is_time: bool = False
    """Whether it differs from run to run."""


COLUMNS = (
    Column("pflops", "PFLOPs", ".4g", is_published=True),
    Column("speedup", "speed-up", ".2f", is_published=True, is_time=True),
    Column("latency_seconds", "latency s", ".2f", is_published=True, is_time=True),
    Column("vbench", "VBench", ".2f", is_published=True),
    Column("lpips", "LPIPS", ".4f", is_published=True),
    Column("ssim", "SSIM", ".4f", is_published=True),
    Column("psnr", "PSNR dB", ".2f", is_published=True),
    Column("reused_share", "reused %", ".1f", scale=100),
    Column("dit_seconds", "DiT s", ".2f", is_time=True),
    Column("dit_speedup", "DiT speed-up", ".2f", is_time=True),
    Column("vae_seconds", "VAE s", ".2f", is_time=True),
    Column("text_seconds", "text s", ".2f", is_time=True),
    Column("compression_seconds", "compression s", ".3f", is_time=True),
    Column("first_frames_seconds", "first chunk s", ".2f", is_time=True),
    Column("kv_cache_bytes", "KV cache MB", ".4g", scale=1e-6),
    Column("peak_memory_bytes", "peak GB", ".2f", scale=1e-9),
)
PARTS = {
    "paper": "Rows of the paper",
    "ingredient": "One ingredient after the other",
    "baseline": "Baselines beside them",
}
NOTES = (
    "published: figures of the paper, of another model, size and machine than ours wherever the "
    "protocol differs from",
    "PFLOPs: counted by closed forms while the run decides; the published count takes "
    "SkyReels-V2's full attention as if it were causal",
    "latency: texts, denoising, decoding and writing of one video with loaded models; times are "
    "medians over videos; speed-up: the reference's latency by the row's",
    "LPIPS, SSIM, PSNR: of the mp4 files against the reference's, mean over videos",
    "KV cache: what is reserved for all layers and branches; peak: tensors on the GPU, the "
    "text encoder included where it stays there (without offload), which one run frees after the "
    "prompt; empty on a CPU",
    "VBench: mean over dimensions as scripts/vbench/evaluate.sh wrote it, empty without that",
)

_NUMBER = (int, float, NoneType)
_REPORT: Shape = {
    **dict.fromkeys(("title", "published_setting", "protocol_sha256"), str),
    **dict.fromkeys(("lpips_sha256", "environment", "receipts"), dict),
    **dict.fromkeys(("rows", "metrics", "notes"), list),
    "model": (str, NoneType),
    "num_prompts": (int, NoneType),
}
_ROW: Shape = {
    **dict.fromkeys(("method", "folder", "part"), str),
    **dict.fromkeys(("figures", "half_widths", "published"), dict),
    "num_videos": int,
}


def gaps(report: Mapping[str, Any]) -> list[str]:
    """Name what is missing in the JSON of a table, or is of the wrong type, a line each."""
    found = _gaps(report, _REPORT, place="")
    if found:
        return found
    found = _gaps(report["environment"], {"commit": (str, NoneType)}, place="environment.")
    found += [f"metrics holds {item!r}" for item in report["metrics"] if item not in METRICS]
    found += [f"notes holds {item!r}" for item in report["notes"] if not isinstance(item, str)]
    for label, receipt in report["receipts"].items():
        if not isinstance(receipt, dict):
            found.append(f"receipts.{label} is {receipt!r}")
    for index, row in enumerate(report["rows"]):
        found += _row_gaps(row, place=f"rows.{index}.")
    return found


def _row_gaps(row: Any, *, place: str) -> list[str]:
    if not isinstance(row, dict):
        return [f"{place.rstrip('.')} is {row!r}"]
    found = _gaps(row, _ROW, place=place)
    if found:
        return found
    shown = {column.key: _NUMBER for column in COLUMNS}
    published = {column.key: _NUMBER for column in COLUMNS if column.is_published}
    found += _gaps(row["figures"], shown, place=f"{place}figures.")
    found += _gaps(row["published"], published, place=f"{place}published.")
    widths = dict.fromkeys(row["half_widths"], _NUMBER)
    return found + _gaps(row["half_widths"], widths, place=f"{place}half_widths.")


def _gaps(values: Mapping[str, Any], shape: Shape, *, place: str) -> list[str]:
    found = [f"{place}{key} is missing" for key in shape if key not in values]
    return found + [
        f"{place}{key} is {values[key]!r}"
        for key, kind in shape.items()
        if key in values and not isinstance(values[key], kind)
    ]


def plain_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain values for JSON."""
    return [
        {
            "method": row.method.name,
            "folder": row.method.folder,
            "part": row.method.part,
            "num_videos": row.num_videos,
            "figures": {column.key: row.figures.get(column.key) for column in COLUMNS},
            "half_widths": row.half_widths,
            "published": asdict(row.method.published),
        }
        for row in rows
    ]


def without_times(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of JSON without what differs from run to run."""
    times = {column.key for column in COLUMNS if column.is_time}
    return [
        {**row, "figures": {k: v for k, v in row["figures"].items() if k not in times}}
        for row in rows
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line per row of JSON, numbers in full."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    published = [column.key for column in COLUMNS if column.is_published]
    metrics = sorted({metric for row in rows for metric in row["half_widths"]})
    writer.writerow(
        [
            *("method", "part", "num_videos"),
            *(column.key for column in COLUMNS),
            *(f"{metric}_half_width" for metric in metrics),
            *(f"published_{key}" for key in published),
        ]
    )
    for row in rows:
        values = [
            *(row["figures"][column.key] for column in COLUMNS),
            *(row["half_widths"].get(metric) for metric in metrics),
            *(row["published"][key] for key in published),
        ]
        cells = ["" if value is None else value for value in values]
        writer.writerow([row["method"], row["part"], row["num_videos"], *cells])
    return stream.getvalue()


def markdown(report: Mapping[str, Any]) -> str:
    """Return the table of a JSON report as Markdown, and what people should know beside it."""
    heads = ["method"]
    for column in COLUMNS:
        heads += [column.head, "published"] if column.is_published else [column.head]
    lines = [f"# {escaped(report['title'])}", "", table_row(heads)]
    lines.append(table_row(["---"] + ["---:"] * (len(heads) - 1)))
    for part, title in PARTS.items():
        own = [row for row in report["rows"] if row["part"] == part]
        if own:
            lines.append(table_row([f"*{title}*", *[""] * (len(heads) - 1)]))
            lines += [table_row(_cells(row)) for row in own]
    lines.append("")
    notes = [f"{NOTES[0]} {report['published_setting']}", *NOTES[1:], *report["notes"]]
    lines += [f"- {escaped(note)}" for note in notes]
    lines.append(
        f"- protocol {report['protocol_sha256']}, commit {report['environment']['commit']}"
    )
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = [escaped(row["method"])]
    for column in COLUMNS:
        cells.append(_shown(row["figures"][column.key], column))
        if column.is_published:
            value = row["published"][column.key]
            cells.append(MISSING if value is None else f"{value:g}")
    return cells


def _shown(value: float | None, column: Column) -> str:
    return MISSING if value is None else format(value * column.scale, column.spec)
