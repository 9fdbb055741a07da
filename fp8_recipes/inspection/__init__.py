"""``fp8-recipes inspect RUN [RUN ...]``: what a run left behind, as figures and one page.

Reads the JSON lines of `fp8_recipes.metrics`, of Megatron runs (--fp8-log) and of the demo; needs matplotlib and no GPU.
"""

from .page import inspect
from .read import InspectError, RunLog, read_run

__all__ = ["InspectError", "RunLog", "inspect", "read_run"]
