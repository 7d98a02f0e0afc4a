"""Lightning callbacks: the training rules of DINO, and callbacks that monitor a run."""

from dino_head.callbacks.collapse_monitor import CollapseMonitorCallback
from dino_head.callbacks.freeze_last_layer import FreezeLastLayerCallback
from dino_head.callbacks.knn_probe import KNNProbeCallback
from dino_head.callbacks.report import ReportCallback
from dino_head.callbacks.schedule import ScheduleCallback
from dino_head.callbacks.teacher_update import TeacherUpdateCallback

__all__ = [
    "CollapseMonitorCallback",
    "FreezeLastLayerCallback",
    "KNNProbeCallback",
    "ReportCallback",
    "ScheduleCallback",
    "TeacherUpdateCallback",
]
