"""What can go wrong and what to do about it: the library's typed errors. (Week 6, lesson 1.)"""

from __future__ import annotations


class CourseError(Exception):
    """Base of every error the library raises on purpose; its message says what to do next."""


class ProfileError(CourseError, ValueError):
    """A profile, lesson, task or setting that the course does not have."""


class DataError(CourseError, ValueError):
    """A data file or folder that cannot be used as it is."""


class HubError(CourseError, OSError):
    """The Hugging Face Hub could not be reached, or does not have or give what was asked for."""


class ModelError(CourseError, ValueError):
    """A checkpoint that this lesson cannot use."""


class DiskFullError(CourseError, OSError):
    """No room on the disk; whatever was half-written has been removed."""


class OutOfMemoryError(CourseError, RuntimeError):
    """The accelerator's memory did not suffice."""


class TrainingError(CourseError, RuntimeError):
    """Training ran but taught nothing: no weight changed, or the loss is not a number."""
