"""When to be sparse: phases counted in applied optimizer steps."""

from semisparse.schedule.guard_state import GuardReport
from semisparse.schedule.loss_guard import LossGuard
from semisparse.schedule.phases import Phase
from semisparse.schedule.sparse_schedule import SparseSchedule

__all__ = ["GuardReport", "LossGuard", "Phase", "SparseSchedule"]
