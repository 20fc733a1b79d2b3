"""The paper's way from nothing to a table: stages of commands, cached by their inputs."""

from .plan import Plan, PlanError, read_plan
from .runner import Runner
from .steps import STAGES, Step, build_steps

__all__ = ["STAGES", "Plan", "PlanError", "Runner", "Step", "build_steps", "read_plan"]
