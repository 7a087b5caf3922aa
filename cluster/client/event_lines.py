"""Faults, recoveries and rebalances as lines that people can read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any


def event_line(event: dict[str, Any]) -> str:
    """Return one line: when (UTC), gang, kind of event, how long it took, what happened and what it cost."""
    when = datetime.fromtimestamp(event["time_s"], UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    duration = f"{event['duration_s']:.2f} s"
    parts = [f"{when}  {event['gang']}  {event['kind']:<9}  {event['what']:<16}  {duration:>8}  {event['message']}"]
    if event["expert_bytes_loaded"]:
        parts.append(f"{event['expert_bytes_loaded'] / 1e6:.1f} MB of experts loaded")
    if event["num_requests_replayed"]:
        parts.append(f"{event['num_requests_replayed']} requests replayed")
    return "; ".join(parts)
