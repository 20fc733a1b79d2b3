"""The paper's way from nothing to a table: stages of commands, cached by their inputs."""

from resnet_backbone.cli.reproduction.plan import Plan, PlanError, read_plan
from resnet_backbone.cli.reproduction.runner import Runner
from resnet_backbone.cli.reproduction.steps import STAGES, Step, build_steps

__all__ = ["STAGES", "Plan", "PlanError", "Runner", "Step", "build_steps", "read_plan"]
