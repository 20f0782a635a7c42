"""The automation that sets runs to Crashed whose process died, as Prefect's server reads it."""

from collections.abc import Sequence
from typing import Any

_ENDS = ("Completed", "Failed", "Crashed", "Cancelled", "TimedOut")


def automation(flow_ids: Sequence[object], after_s: float) -> dict[str, Any]:
    """Crash a run of these flows after so many seconds without a heartbeat."""
    died = f"No heartbeat for {after_s:g} s"
    return {
        "name": "trace-opd: runs whose process died are Crashed",
        "description": f"{died}. Run the deployment again: it continues from the finished parts.",
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            # The first heartbeat of a run that is killed at its start never arrives.
            "after": ["prefect.flow-run.Running", "prefect.flow-run.heartbeat"],
            "expect": [f"prefect.flow-run.{event}" for event in ("heartbeat", *_ENDS)],
            "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
            "match_related": {
                "prefect.resource.role": ["flow"],
                "prefect.resource.id": [f"prefect.flow.{one}" for one in flow_ids],
            },
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": after_s,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "message": f"{died}: its process died. Run it again; it continues from the "
                "finished parts.",
            }
        ],
    }
