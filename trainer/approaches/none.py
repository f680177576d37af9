"""No teacher: the separator alone, which the other approaches are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flsep.trainer.approaches.interface import Approach
from flsep.trainer.config import ApproachConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NoTeacherConfig(ApproachConfig):
    """No teacher."""

    name: Literal["none"] = field(default="none", init=False)


class NoTeacher(Approach):
    """Neither a condition nor a regularizer."""

    Config = NoTeacherConfig

    def describe(self) -> str:
        """Name the approach."""
        return "none: the separator alone"
