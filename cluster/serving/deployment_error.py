"""Why an application did not come up. Does not import Ray."""

from __future__ import annotations


class DeploymentFailedError(RuntimeError):
    """The application did not come up; the message says why, at the length of a traceback if need be."""

    @property
    def reason(self) -> str:
        """The message's last line, where a traceback names the error."""
        lines = [line.strip() for line in str(self).splitlines() if line.strip()]
        return lines[-1] if lines else "the application did not come up"


class RayLostError(RuntimeError):
    """Ray has ended before the server, and would take long to say so: leave it alone, and end the process."""
