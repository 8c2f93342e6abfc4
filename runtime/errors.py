"""The exceptions that the runtime raises; every message is one line and ends in what to do.

MigicianError
├── ModelFileError     a checkpoint or .mig file is missing, damaged or holds numbers that are not finite
├── ImageError         a picture cannot be read or used
├── ContextFullError   prompt and answer do not fit the model's context
├── OutOfMemory        the system, or the device, has no memory left for it
├── UnsupportedError   the file or the request is sound, but outside what this runtime serves
└── Cancelled          the work was stopped by the caller
"""

__all__ = [
    "Cancelled",
    "ContextFullError",
    "ImageError",
    "MigicianError",
    "ModelFileError",
    "OutOfMemory",
    "UnsupportedError",
]


class MigicianError(Exception):
    """Base of every error that the runtime raises on purpose."""


class ModelFileError(MigicianError):
    """A checkpoint or .mig file is missing, damaged, or holds numbers that are not finite."""


class ImageError(MigicianError):
    """A picture cannot be read or used."""


class ContextFullError(MigicianError):
    """Prompt and answer do not fit the model's context."""


class OutOfMemory(MigicianError):
    """The system, or the device, has no memory left for the work."""


class UnsupportedError(MigicianError):
    """The file or the request is sound, but outside what this runtime serves."""


class Cancelled(MigicianError):
    """The work was stopped by the caller."""
