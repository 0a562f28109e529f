"""Open a picture from anywhere as RGB of 8 bits; say what was lost on the way, refuse what cannot be used."""

from __future__ import annotations

import difflib
import io
import os
import queue
import re
import socket
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from pathlib import Path
from typing import BinaryIO

from course_lib.errors import PictureError

TIMEOUT_S = 15.0
MAX_BYTES = 50_000_000
MAX_RATIO = 200  # CLIP's processor makes the shorter side 336 pixels: at 2048 x 1 that costs gigabytes
NO_PICTURES = {  # beginnings of what is often taken for a picture
    rb"<html|<!doctype html": "a web page (HTML): copy the address of the picture in it, not that of the page",
    rb"<svg": "a drawing of lines (SVG): export it as PNG",
    rb"^%pdf": "a PDF: export its page as PNG",
    rb"^(%!ps|\xc5\xd0\xd3\xc6)": "PostScript: export it as PNG",
    rb"^....ftyp(hei|hev|mif|msf|avi)": "HEIC or AVIF, which PIL does not read here: export it as JPEG",
    rb"^....ftyp": "a film: save one frame of it as PNG",
    rb"^version https://git-lfs": "a pointer of Git LFS: fetch the file it stands for with git lfs pull",
    rb"^(\x89png|\xff\xd8|gif8|riff|bm)": "the beginning of a picture only, or broken: fetch or export it again",
}


def load_picture(source, *, longest: int = 2048):
    """Return a new PIL image, RGB of 8 bits, of a file, an http(s) address, bytes or a PIL image. (Week 6, lesson 3.)

    It stands upright as EXIF says, lies on white, and has at most ``longest`` pixels a side. One UserWarning says what
    was lost: frames, bits, print colours, transparency, pixels. Raises PictureError for what cannot be opened, fetched
    or decoded, has more pixels than PIL's limit against bombs, or sides below 2 pixels or in a ratio above 200 to 1.
    """
    from PIL import Image

    name, given = _find(source)
    lost: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of metadata that is not used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = _decode(given, name, longest, lost)
        except (PictureError, MemoryError):
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            told = f"{name} is too large to decode safely: {error} Make it smaller in a picture program first"
            raise PictureError(told) from error
        except Exception as error:  # PIL's decoders raise nearly anything
            told = f"{name} cannot be decoded ({error}); it may be half a download: fetch or export it again"
            raise PictureError(told) from error
    if lost:
        warnings.warn(f"{name}: {'; '.join(lost)}", stacklevel=2)
    return picture


def _find(source) -> tuple[str, object]:
    """Return a source's name for messages and its bytes, open to be read, or the PIL image that it is."""
    from PIL import Image

    if isinstance(source, Image.Image):
        return "the picture", source
    if isinstance(source, bytes):
        return "the picture", io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        told = "a picture is a path, an http(s) address, bytes or a PIL image"
        raise PictureError(f"{told}; this is {type(source).__name__} (of an array, make one with PIL.Image.fromarray)")
    if isinstance(source, str) and re.match(r"\s*(\w[\w+.-]+://|data:)", source):
        return source.strip()[:100], io.BytesIO(_fetch(source.strip()))
    return Path(source).name, _open_file(Path(source).expanduser())


def _open_file(path: Path) -> BinaryIO:
    try:
        if path.is_file():
            return path.open("rb")
        beside = {each.name.lower(): each.name for each in path.parent.iterdir()}
        found = path.exists()
    except FileNotFoundError:
        raise PictureError(f"no file {path}, and no folder {path.parent} either; check the spelling") from None
    except (OSError, ValueError) as error:
        raise PictureError(f"{str(path)[:100]} cannot be read: {getattr(error, 'strerror', error)}") from error
    if found:
        raise PictureError(f"{path} is no file but a folder; name one picture in it")
    near = " or ".join(beside[name] for name in difflib.get_close_matches(path.name.lower(), beside))
    raise PictureError(f"no file {path}; {f'did you mean {near}?' if near else 'check the spelling and the folder'}")


def _fetch(url: str) -> bytes:
    """Return what an address gives, in TIMEOUT_S in all; the thread is for what has no timeout, such as finding a host."""
    if not url.lower().startswith(("http://", "https://")):
        raise PictureError(f"{url[:100]} is no http(s) address; of a file on this machine give the path alone")
    answer: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: answer.put(_read_url(url)), daemon=True).start()
    try:
        found = answer.get(timeout=TIMEOUT_S)
    except queue.Empty:
        found = TimeoutError()
    if isinstance(found, bytes):
        return found
    remedy = "if a browser shows it, save it from there and give the file's path"
    raise PictureError(f"{url[:200]} cannot be fetched: {_why(found)}; {remedy}") from found


def _read_url(url: str) -> bytes | Exception:
    end = time.monotonic() + TIMEOUT_S
    try:
        address = urllib.parse.quote(url, safe=string.punctuation)  # as pasted, with spaces and accents
        request = urllib.request.Request(address, headers={"User-Agent": "finetuning-workbook"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            parts = bytearray()
            while part := answer.read1(1 << 16):
                parts += part
                if len(parts) > MAX_BYTES:
                    raise ValueError(f"it has more than {MAX_BYTES / 1e6:g} MB")
                if time.monotonic() > end:
                    raise TimeoutError
            return bytes(parts)
    except Exception as error:
        return error


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", error)
    told = {
        TimeoutError: f"no whole answer within {TIMEOUT_S:g} seconds",
        socket.gaierror: "no such host was found, or there is no connection",
        ConnectionRefusedError: "the host refuses the connection",
    }
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} ({reason})"
    return next((text for kind, text in told.items() if isinstance(reason, kind)), f"{reason or type(error).__name__}")


def _decode(given, name: str, longest: int, lost: list[str]):
    from PIL import Image, UnidentifiedImageError

    if isinstance(given, Image.Image):
        return _rgb(given.copy(), name, longest, lost)
    Image.init()
    kinds = [kind for kind in Image.ID if kind != "EPS"]  # for which PIL would run Ghostscript
    with given:
        try:
            with Image.open(given, formats=kinds) as image:
                return _rgb(image, name, longest, lost)
        except UnidentifiedImageError:
            given.seek(0)
            head = given.read(1024).lower()
    looks = next((what for begin, what in NO_PICTURES.items() if re.search(begin, head, re.DOTALL)), "")
    looks = looks or (
        "no picture that PIL knows: export it as PNG or JPEG" if head else "empty: copy or fetch it again"
    )
    raise PictureError(f"{name} is {looks}")


def _rgb(image, name: str, longest: int, lost: list[str]):
    """Return a picture upright, in RGB of 8 bits and not too large; add to ``lost`` what that cost."""
    from PIL import Image, ImageOps

    side, shorter = max(image.size), min(image.size)
    if shorter < 2 or side > MAX_RATIO * shorter:
        told = f"{name} is {image.width:,} x {image.height:,} pixels, and models need sides of 2 pixels or more"
        raise PictureError(f"{told}, one at most {MAX_RATIO} times the other; cut a part out of it")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a telephone's photograph with a small copy of itself
        lost.append(f"only the first of its {frames} frames or pages is taken")
    if image.mode in ("RGB", "RGBA") and ";16" in str(getattr(image, "tile", "")):
        lost.append("16 bits a colour are cut to 8")
    image.draft(None, tuple(-(-2 * length * longest // side) for length in image.size))  # a JPEG in a fraction
    image = ImageOps.exif_transpose(image)
    image = _eight_bits(image, lost) if image.mode[0] in "IF" else image
    image = _on_white(image, lost) if image.has_transparency_data else image
    image = _from_print(image, lost) if image.mode == "CMYK" else image.convert("RGB")
    if side > longest:
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        lost.append(f"scaled down from {side:,} to {longest:,} pixels on its longer side")
    return image


def _eight_bits(image, lost: list[str]):
    """Return grey of 16 or 32 bits as 8, by its range; PIL's own conversion makes all above 255 white."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    low, high = least, most = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535 and (high > 255 or image.mode != "I"):
        low, high = 0.0, 65535.0  # PGM, and PNG in older PIL, have their 16 bits in mode I
    lost.append(f"its greys, {least:g} to {most:g}, are scaled to 8 bits, {low:g} to black and {high:g} to white")
    return Image.fromarray(np.rint((values - low) * (255 / ((high - low) or 1))).astype(np.uint8))


def _on_white(image, lost: list[str]):
    from PIL import Image

    image = image.convert("RGBA")
    if image.getextrema()[3][0] < 255:
        lost.append("its transparent parts are laid on white")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _from_print(image, lost: list[str]):
    """Return CMYK as RGB, by the profile in it where there is a good one."""
    from PIL import ImageCms

    lost.append("its print colours (CMYK) are turned into RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (KeyError, ImportError, OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return image.convert("RGB")
