"""Memory of a process, as its tests in processes of their own measure it."""

from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_mib():
    """Most memory that this process has held. getrusage would tell that of the process it was started by, if larger."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) // 1024
