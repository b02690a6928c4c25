"""Memory of a process, as its tests in processes of their own measure it."""

from pathlib import Path

STATUS = Path("/proc/self/status")


def field_mib(name):
    """What the kernel tells of this process, such as VmRSS, in MiB."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) // 1024


def peak_mib():
    """Most memory that this process has held. getrusage would tell that of the process it was started by, if larger."""
    return field_mib("VmHWM")


def forget_peak():
    """From now on the peak is what is held from now on."""
    Path("/proc/self/clear_refs").write_text("5")
