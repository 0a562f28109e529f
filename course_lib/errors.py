"""What can go wrong and what to do about it: the library's typed errors. (Week 6, lesson 1.)"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


class ChatError(CourseError, ValueError):
    """A conversation or a chat template that cannot be rendered as it is, or does not fit the model."""


class PictureError(CourseError, ValueError):
    """A picture that cannot be opened, fetched or used as it is."""


class DiskFullError(CourseError, OSError):
    """No room on the disk; whatever was half-written has been removed."""


class OutOfMemoryError(CourseError, RuntimeError):
    """The accelerator's memory did not suffice."""


class TrainingError(CourseError, RuntimeError):
    """Training ran but taught nothing: no weight changed, or the loss is not a number."""


@contextmanager
def explain_errors(what: str = "this step", *, hub: bool = False) -> Iterator[None]:
    """Turn errors of the Hub, the disk and the accelerator into the library's own, with the remedy. (Week 6, lesson 1.)

    ``what`` names the step or the thing in the message. With ``hub``, other operating-system errors are taken for a
    model or data set that cannot be found or fetched.
    """
    try:
        yield
    except CourseError:
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        if (
            getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or "No space left" in text
            or "os error 28" in text
            or ("unexpected pos" in text and "inline_container" in text)  # torch.save on a full disk
        ):
            raise _disk_full(what) from error
        if isinstance(error, RuntimeError) and "out of memory" in text:
            raise OutOfMemoryError(
                f"the accelerator ran out of memory in {what}. Restart the kernel to free what earlier runs hold; then make "
                "the plan with a smaller batch_size or max_length, or choose a smaller MODEL"
            ) from error
        if hub and isinstance(error, OSError):
            raise HubError(
                f"could not load {what}: {text.splitlines()[0][:200]} Check the spelling and the connection and run the cell "
                "again (finished downloads are kept), or set PROFILE = 'tiny', which needs no network"
            ) from error
        raise


def _disk_full(what: str) -> DiskFullError:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return DiskFullError(
        errno.ENOSPC,
        f"the disk is full while writing {what} ({free:.1f} GB free here). What was saved before is whole, and nothing half-written "
        "is kept. Delete old folders under runs/ or ~/.cache/huggingface, or point COURSE_RUNS to another disk, and run the cell again",
    )
