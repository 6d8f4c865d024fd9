"""One exception family: every error that a person can cause is an `AltGradError`.

Each message gives the value, the limit and the remedy. The subclasses also derive from the built-in exception that a
caller would expect, so `except ValueError` keeps working. Errors of the operating system stay `OSError`s in Python;
`os_error_text` is what the command line says of them.
"""

import errno


class AltGradError(Exception):
    """Base of every error that AltGrad raises for bad input."""


class FormatError(AltGradError, ValueError):
    """A number format is unknown, malformed, or does not fit its carrier."""


class ScaleError(AltGradError, ValueError):
    """A scale is not positive, not finite, or does not broadcast to its tensor."""


class DtypeError(AltGradError, TypeError):
    """A tensor's dtype is unsupported, or too narrow for the format put on it."""


class CodeError(AltGradError, ValueError):
    """A value has no code in the format, or a code is out of range."""


class RandomKeyError(AltGradError, ValueError):
    """Stochastic rounding was asked for without a usable (seed, stream) key."""


class BlockError(AltGradError, ValueError):
    """A block size, axis or tile does not fit the tensor's shape."""


class OptionError(AltGradError, ValueError):
    """An option has a value outside its list (rounding, overflow, kernel, ...)."""


class KernelError(AltGradError, RuntimeError):
    """The kernel asked for cannot run here (device, missing package)."""


class RecipeError(AltGradError, ValueError):
    """A recipe contradicts itself or matches no layer."""


class ConfigError(AltGradError, ValueError):
    """A configuration key or value is wrong."""


class DataError(AltGradError, ValueError):
    """A data source is missing, empty, too short, or has the wrong vocabulary."""


class CheckpointError(AltGradError, ValueError):
    """A checkpoint is damaged, incomplete, or belongs to another run."""


class ReportError(AltGradError, ValueError):
    """Runs cannot be read, or cannot be compared with one another."""


class RunBusyError(AltGradError, RuntimeError):
    """Another process is working in the run folder."""


class SweepError(AltGradError, ValueError):
    """A sweep cannot be planned or started as asked."""


class DistributedError(AltGradError, RuntimeError):
    """A run on several processes was asked for something it cannot do."""


class UnderflowWarning(UserWarning):
    """More than half of a tensor underflows where no scale was given."""


_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of the quota, or choose another disk",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another disk",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder, or move the file",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder, or move the file",
    errno.EISDIR: "a folder stands where a file is needed; choose another name",
    errno.ENAMETOOLONG: "choose a shorter name or folder",
    errno.ENOENT: "correct the path",
    errno.EMFILE: "close files, or raise the limit of open ones (ulimit -n)",
}


def os_error_text(error: OSError) -> str:
    """What the operating system refused, of which file, and what helps: one sentence."""
    files = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return (f"{files}: " if files else "") + said + (f"; {remedy}" if remedy else "")
