"""When to be sparse: phases counted in applied optimizer steps."""

from semisparse.schedule.phases import Phase
from semisparse.schedule.sparse_schedule import SparseSchedule

__all__ = ["Phase", "SparseSchedule"]
