"""Curves of a run in `curves.json`, which a later report can draw as a reference."""

import json
import math
from pathlib import Path
from typing import Any

NORMALIZED = [f"{loss}{name}_normalized" for loss in ("", "ibot/") for name in ("loss", "teacher_entropy")]
Curves = dict[str, tuple[list[float], list[float]]]  # steps and values


def read_curves(file: Path) -> dict[str, Any]:
    """Read `steps` of the run, and the histories of CollapseMonitorCallback (`looks`) and KNNProbeCallback (`probes`).

    Raises:
        ValueError: The file is not the curves.json of a ReportCallback.
    """
    try:
        curves: dict[str, Any] = json.loads(file.read_text())
        rescale_curves(curves, curves["steps"])
    except Exception as error:  # anything may be in the file
        raise ValueError(
            f"reference={str(file)!r} is not the curves.json of a ReportCallback ({type(error).__name__}: {error})"
        ) from error
    return curves


def rescale_curves(reference: dict[str, Any], steps: float) -> Curves:
    """Rescale the reference's curves to a run of `steps` optimizer steps; a run without end leaves them unscaled."""
    is_finite = math.isfinite(steps) and math.isfinite(reference["steps"])
    scale = steps / reference["steps"] if is_finite else 1.0
    measurements, probes = reference["looks"], reference["probes"]
    curves = {}
    for name, rows in (*((name, measurements) for name in NORMALIZED), ("top1", probes)):
        points = [(row["step"] * scale, row.get(name)) for row in rows]
        known = [(step, value) for step, value in points if value is not None]
        if known:
            curves[name] = [step for step, _ in known], [value for _, value in known]
    return curves
