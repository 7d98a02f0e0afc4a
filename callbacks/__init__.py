"""DINO's training rules as Lightning callbacks."""

from dino_head.callbacks.freeze_last_layer import FreezeLastLayerCallback
from dino_head.callbacks.schedule import ScheduleCallback
from dino_head.callbacks.teacher_update import TeacherUpdateCallback

__all__ = ["FreezeLastLayerCallback", "ScheduleCallback", "TeacherUpdateCallback"]
