"""Pictures from files, addresses and memory: right colours, upright, nothing lost unsaid; and how they are drawn."""

import io
import struct
import threading
import time
import warnings
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps

from course_lib import pictures, plots
from course_lib.alttext import alt_text
from course_lib.errors import DataError, PictureError
from course_lib.pictures import load_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def quietly(source, **options) -> np.ndarray:
    """Return a picture's values, shape (height, width, 3); any notice is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = load_picture(source, **options)
    assert (type(picture), picture.mode) == (Image.Image, "RGB")
    return np.asarray(picture)


def noticed(source, **options) -> tuple[np.ndarray, str]:
    """Return a picture's values, and its one notice, which points to this file."""
    with pytest.warns(UserWarning) as told:
        picture = load_picture(source, **options)
    assert len(told) == 1 and told[0].filename == __file__
    assert picture.mode == "RGB"
    return np.asarray(picture), str(told[0].message)


def saved(picture, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], extra: bytes = b"") -> bytes:
    """Return a PNG made by hand; ``colour`` is 0 for grey, 2 for RGB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# --- colours


def test_a_picture_is_the_same_from_a_file_a_path_bytes_and_memory(tmp_path):
    (tmp_path / "noise.png").write_bytes(saved(NOISE, "PNG"))
    sources = [str(tmp_path / "noise.png"), tmp_path / "noise.png", saved(NOISE, "PNG"), Image.fromarray(NOISE)]
    assert all((quietly(source) == NOISE).all() for source in sources)


def test_a_picture_from_memory_stays_as_it_was():
    image = Image.open(io.BytesIO(saved(NOISE, "PNG")))
    load_picture(image).paste(RED, (0, 0, 60, 40))
    assert (np.asarray(image) == NOISE).all()  # its file is open still, and its pixels are its own
    image = Image.open(io.BytesIO(saved(NOISE, "JPEG")))
    assert noticed(image, longest=6)[0].shape == (4, 6, 3)
    assert image.size == (60, 40)


def test_what_pil_says_of_broken_metadata_is_no_notice():
    source = saved(NOISE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")  # five entries promised, none there
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(io.BytesIO(source)).getexif()
    assert quietly(source).shape == (40, 60, 3)


def test_16_bit_grey_is_scaled_by_its_range_and_not_clipped_to_white():
    # 65535 / 255 = 257: 128 of 65535 is nearer to 0 than to 1, 129 nearer to 1; PIL's own conversion gives 255 for all above 255.
    greys, worked = [0, 128, 129, 257, 25700, 32768, 65535], [0, 0, 1, 1, 100, 128, 255]
    by_hand = png(7, 2, 16, 0, [struct.pack(">7H", *greys)] * 2)
    kinds = [
        by_hand,
        saved(np.array([greys] * 2, np.uint16), "TIFF"),
        b"P5 7 2 65535\n" + struct.pack(">14H", *greys * 2),
    ]
    kinds += [Image.fromarray(np.array([greys] * 2, np.uint16)), Image.fromarray(np.array([greys] * 2, np.int32))]
    swapped = Image.frombytes("I;16B", (7, 2), struct.pack(">14H", *greys * 2))
    for source in [*kinds, swapped]:
        values, told = noticed(source)
        assert values[0].tolist() == values[1].tolist() == [[grey] * 3 for grey in worked]
        assert "its greys, 0 to 65535, are scaled to 8 bits" in told


def test_a_notice_says_that_16_bit_grey_uses_a_part_of_its_range_only():
    values, told = noticed(png(2, 2, 16, 0, [struct.pack(">2H", 0, 4095)] * 2))
    assert values[0].tolist() == [[0] * 3, [16] * 3]  # 4095 / 257 = 15.93
    assert "0 to 4095" in told and "65535 to white" in told


@pytest.mark.parametrize("values", [[-1.0, 0.0, 1.0], [-100000, 0, 100000], [0, 100, 200]])
def test_greys_without_a_range_of_their_own_are_stretched_from_least_to_most(values):
    kind = np.float32 if isinstance(values[0], float) else np.int32
    found, told = noticed(Image.fromarray(np.array([values] * 2, kind)))
    assert found[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]  # 127.5 to the even number
    assert f"{values[0]:g} to black" in told


def test_grey_that_is_nowhere_a_number_or_all_the_same_is_black():
    found, _ = noticed(Image.fromarray(np.array([[np.nan, np.inf, 0, 8]] * 2, np.float32)))
    assert found[0, :, 0].tolist() == [0, 0, 0, 255]
    assert not noticed(Image.fromarray(np.full((2, 2), 7, np.float32)))[0].any()


def test_16_bit_colours_are_as_pil_gives_them_with_a_notice():
    source = png(2, 2, 16, 2, [struct.pack(">6H", 65535, 25700, 0, 256, 32768, 511)] * 2)
    values, told = noticed(source)
    assert values[0].tolist() == [[255, 100, 0], [1, 128, 1]]  # the higher of the two bytes
    assert (values == np.asarray(Image.open(io.BytesIO(source)))).all()
    assert "16 bits a colour are cut to 8" in told


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])  # PIL writes CMYK JPEGs as Adobe does, inverted
def test_print_colours_become_rgb(kind):
    values, told = noticed(saved(Image.new("CMYK", (16, 16), (200, 30, 10, 5)), kind))
    # (255 - ink) * (255 - black) / 255: 55 * 250 / 255 = 53.9, 225 * .98 = 220.6, 245 * .98 = 240.2
    assert np.abs(values.astype(int) - (54, 221, 240)).max() <= 1
    assert "CMYK" in told


def black_alone() -> bytes:
    """Return an ICC profile by which black ink alone counts: Lab's L* falls from 100 without it to 0, coloured inks do nothing."""
    matrix = struct.pack(">9i", *(65536 * (place % 4 == 0) for place in range(9)))
    ramp, corners = bytes(range(256)), bytes([255, 128, 128, 0, 128, 128]) * 8  # of the cube of inks, black fastest
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + corners + ramp * 3
    head = struct.pack(">4sI4s4s4s", b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp" + bytes(28)
    head += struct.pack(">3i", 63190, 65536, 54061) + bytes(48)  # the light is D50
    body = head + struct.pack(">I4sII", 1, b"A2B0", 144, len(lut)) + lut
    return struct.pack(">I", 4 + len(body)) + body


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_the_profile_in_a_picture_says_what_its_print_colours_mean(kind):
    values, _ = noticed(saved(Image.new("CMYK", (16, 16), (200, 30, 10, 127)), kind, icc_profile=black_alone()))
    # L* = 100 * 128 / 255 = 50.2: luminance ((50.2 + 16) / 116) ** 3 = 0.186, 255 * (1.055 * 0.186 ** (1 / 2.4) - 0.055) = 119.4
    assert np.abs(values.astype(int) - 119).max() <= 1


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_a_profile_that_does_not_fit_is_passed_over(profile):
    values, _ = noticed(saved(Image.new("CMYK", (16, 16), (200, 30, 10, 5)), "TIFF", icc_profile=profile))
    assert np.abs(values.astype(int) - (54, 221, 240)).max() <= 1


def test_palettes_single_bits_and_greys_are_taken_as_they_are():
    image = Image.new("P", (3, 2))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2, 2, 1, 0])
    assert quietly(saved(image, "PNG"))[0].tolist() == [[*RED], [*GREEN], [*BLUE]]
    assert quietly(saved(image, "GIF"))[1].tolist() == [[*BLUE], [*GREEN], [*RED]]
    assert quietly(saved(image.convert("L").point(lambda grey: 255 * (grey > 100)).convert("1"), "PNG")).max() == 255
    assert quietly(png(2, 2, 1, 0, [b"\x40"] * 2))[0].tolist() == [[0] * 3, [255] * 3]  # bits 01
    assert quietly(png(2, 2, 8, 0, [b"\x07\xc8"] * 2))[1].tolist() == [[7] * 3, [200] * 3]


def test_what_is_transparent_lies_on_white():
    # Red at alpha 51 / 255 = 0.2 on white: (255, 0.8 * 255, 0.8 * 255); black at 0 is white.
    image = Image.new("RGBA", (3, 2), (*RED, 51))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.putpixel((2, 0), (*BLUE, 255))
    for kind in ("PNG", "TIFF"):
        values, told = noticed(saved(image, kind))
        assert values[0].tolist() == [[255, 204, 204], [*WHITE], [*BLUE]] and "on white" in told
    assert noticed(saved(Image.new("LA", (2, 2), (0, 51)), "PNG"))[0][0, 0].tolist() == [204] * 3
    assert noticed(saved(image, "WEBP", lossless=True))[0][0, 1].tolist() == [*WHITE]


def test_a_palettes_and_a_colours_transparency_lie_on_white_too():
    image = Image.new("P", (2, 2))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    for options in ({"transparency": 1}, {"transparency": bytes([255, 0])}):
        assert noticed(saved(image, "PNG", **options))[0][0].tolist() == [[*RED], [*WHITE]]
    rows = [bytes([*RED, *GREEN])] * 2
    keyed = png(2, 2, 8, 2, rows, chunk(b"tRNS", struct.pack(">3H", *GREEN)))
    assert noticed(keyed)[0][0].tolist() == [[*RED], [*WHITE]]


def test_a_picture_with_alpha_that_is_nowhere_transparent_gives_no_notice():
    assert quietly(saved(Image.new("RGBA", (2, 2), (*RED, 255)), "PNG"))[0, 0].tolist() == [*RED]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    first, *rest = (Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE))
    values, told = noticed(saved(first, kind, save_all=True, append_images=rest))
    assert np.abs(values.astype(int) - RED).max() <= 2  # WebP is not exact
    assert "the first of its 3 frames or pages" in told


def test_a_telephones_photograph_with_its_own_small_copy_is_no_animation():
    source = saved(Image.fromarray(NOISE), "MPO", save_all=True, append_images=[Image.fromarray(NOISE[:20, :30])])
    with Image.open(io.BytesIO(source)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert quietly(source).shape == (40, 60, 3)


# --- upright, and not too large

# What an eye should see is red and green above, blue and white below; EXIF's table says where row and column 0 lie.
UPRIGHT = np.array([[RED, GREEN], [RED, GREEN], [BLUE, WHITE]], dtype=np.uint8)  # 2 wide, 3 high
STORED = {
    1: UPRIGHT,  # row 0 above, column 0 on the left
    2: UPRIGHT[:, ::-1],  # above, right
    3: UPRIGHT[::-1, ::-1],  # below, right
    4: UPRIGHT[::-1],  # below, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, above
    6: UPRIGHT.transpose(1, 0, 2)[::-1],  # right, above: stored row 0 is what is seen on the right
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],  # right, below
    8: UPRIGHT.transpose(1, 0, 2)[:, ::-1],  # left, below
}


@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_stands_upright_as_exif_says(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = saved(np.ascontiguousarray(STORED[orientation]), "PNG", exif=exif)
    for each in (source, Image.open(io.BytesIO(source))):
        assert quietly(each).tolist() == UPRIGHT.tolist()


def test_16_bits_are_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    values, _ = noticed(saved(np.array([[0, 25700, 65535], [257, 514, 771]], np.uint16), "PNG", exif=exif))
    assert values[:, :, 0].tolist() == [[1, 0], [2, 100], [3, 255]]


@pytest.mark.parametrize(("kind", "decoded"), [("JPEG", (5000, 75)), ("PNG", (20000, 300))])
def test_a_long_picture_is_scaled_down_and_a_jpeg_of_it_is_decoded_in_a_fraction(monkeypatch, kind, decoded):
    wide = np.zeros((300, 20000, 3), np.uint8)
    wide[:, 10000:] = RED
    source, sizes, upright = saved(wide, kind), [], ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: sizes.append(image.size) or upright(image))
    values, told = noticed(source)
    assert values.shape == (31, 2048, 3)  # 300 * 2048 / 20000 = 30.7
    assert values[15, 900].max() <= 3 and np.abs(values[15, 1100].astype(int) - RED).max() <= 3
    assert "from 20,000 to 2,048 pixels" in told and sizes == [decoded]  # a quarter: twice what is asked for, or more
    assert quietly(source, longest=20000).shape == (300, 20000, 3)


def test_a_jpeg_that_is_scaled_down_looks_the_same():
    smooth = np.add.outer(np.arange(1200) / 8, np.arange(1600) / 20).astype(np.uint8)  # 0 to 229
    values, _ = noticed(saved(smooth, "JPEG", quality=95), longest=200)
    assert values.shape == (150, 200, 3)
    assert np.abs(values[..., 0] - smooth.reshape(150, 8, 200, 8).mean(axis=(1, 3))).max() < 2


def bomb(side: int) -> bytes:
    return png(side, side, 8, 2, [b"\0" * 100])


@pytest.mark.parametrize("side", [9_500, 60_000])  # PIL warns above 89 million pixels, and raises above twice as many
def test_a_bomb_is_refused_before_it_is_decoded(side):
    start = time.perf_counter()
    with pytest.raises(PictureError, match=f"too large to decode safely.*{side**2}.*Make it smaller"):
        quietly(bomb(side))
    assert time.perf_counter() - start < 0.5


def test_pils_limits_stay_as_they_are():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    with pytest.raises(PictureError):
        load_picture(bomb(60_000))
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)) == before


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (0, 5), (4, 801), (801, 4)])
def test_a_picture_that_is_next_to_a_line_is_refused(size):
    with pytest.raises(PictureError, match=f"{size[0]:,} x {size[1]:,} pixels.*cut a part out"):
        load_picture(Image.new("RGB", size))
    assert quietly(Image.new("RGB", (4, 800))).shape == (800, 4, 3)


def test_several_losses_make_one_notice():
    image = Image.new("RGBA", (64, 64), (*RED, 0))
    source = saved(image, "PNG", save_all=True, append_images=[Image.new("RGBA", (64, 64), (*BLUE, 9))])
    values, told = noticed(source, longest=16)
    assert values.shape == (16, 16, 3) and values.min() == 255
    assert told.count(";") == 2 and "2 frames" in told and "on white" in told and "from 64 to 16" in told


# --- files that are none, and other sources


def test_a_missing_file_is_met_with_the_nearest_names(tmp_path):
    for name in ("harbour.jpg", "lighthouse.png"):
        (tmp_path / name).write_bytes(saved(NOISE, "PNG"))
    with pytest.raises(PictureError, match=r"no file .*Harbor.JPG; did you mean harbour.jpg\?"):
        load_picture(tmp_path / "Harbor.JPG")
    with pytest.raises(PictureError, match=r"no file .*xyz; check the spelling and the folder"):
        load_picture(str(tmp_path / "xyz"))
    with pytest.raises(PictureError, match=r"no folder .*pictures either"):
        load_picture(tmp_path / "pictures" / "harbour.jpg")


def test_a_folder_and_impossible_names_are_refused(tmp_path):
    for source in (tmp_path, str(tmp_path), ""):
        with pytest.raises(PictureError, match="no file but a folder; name one picture"):
            load_picture(source)
    with pytest.raises(PictureError, match="cannot be read: File name too long"):
        load_picture("picture " * 100)
    with pytest.raises(PictureError, match="no file"):
        load_picture("a\0b")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\n<!DOCTYPE html>\n<html><body><svg></svg></body></html>", "a web page"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'/>", r"\(SVG\): export it as PNG"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "PostScript"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a film"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"a picture of a harbour", "no picture that PIL knows"),
        (bytes(100), "no picture that PIL knows"),
        (saved(NOISE, "PNG")[:12], "the beginning of a picture only"),
        (png(0, 5, 8, 2, []), "or broken"),
    ],
)
def test_a_file_that_is_no_picture_says_what_it_looks_like(tmp_path, content, says):
    (tmp_path / "photo.jpg").write_bytes(content)
    with pytest.raises(PictureError, match=f"^photo.jpg is .*{says}"):
        load_picture(tmp_path / "photo.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_a_file_that_breaks_off_is_refused(tmp_path, kind):
    content = saved(NOISE, kind)
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    with pytest.raises(PictureError, match=r"^half (cannot be decoded \(.*may be half a download|is the beginning)"):
        load_picture(tmp_path / "half")


def test_damage_anywhere_gives_a_picture_or_the_one_typed_error():
    rng = np.random.default_rng(0)
    seen = set()
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        content = saved(NOISE, kind)
        for _ in range(40):
            damaged = bytearray(content)
            for place in rng.integers(0, min(len(content), 500), 3):
                damaged[place] = rng.integers(0, 256)
            try:
                with warnings.catch_warnings(record=True):
                    seen.add(load_picture(bytes(damaged)).mode)
            except PictureError:
                seen.add("refused")
    assert seen == {"RGB", "refused"}


def test_a_source_of_another_kind_is_refused_with_the_remedy():
    for source in (3, None, NOISE, [saved(NOISE, "PNG")]):
        with pytest.raises(PictureError, match=rf"this is {type(source).__name__} \(of an array, make one with PIL"):
            load_picture(source)


# --- addresses


class Answers(BaseHTTPRequestHandler):
    """A server of every fault."""

    SLOW = ("silent", "drip", "endless")
    agents: set = set()  # noqa: RUF012

    def do_GET(self):
        self.agents.add(self.headers["User-Agent"])
        kind = self.path.strip("/").removesuffix(".png")
        if kind in ("moved", "round"):
            self.send_response(302)
            self.send_header("Location", "/noise.png" if kind == "moved" else "/round")
            return self.end_headers()
        if kind not in ("noise", "noise.png?size=a%20b", "caf%C3%A9%20noir", "page", "nothing", "half", *self.SLOW):
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        content = {"page": b"<html><img></html>", "nothing": b""}.get(kind, saved(NOISE, "PNG"))
        self.wfile.write(content[: len(content) // 2 if kind == "half" else None])
        if kind in self.SLOW:
            self.more(kind)

    def more(self, kind):
        with suppress(OSError):
            for _ in range(40):
                time.sleep(0.05 if kind != "endless" else 0)
                self.wfile.write(b"" if kind == "silent" else bytes(1 if kind == "drip" else 100_000))

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(pictures, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(pictures, "MAX_BYTES", 1_000_000)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize(
    "path", ["/noise.png", "/moved", "/noise.png?size=a%20b#top", "/caf\u00e9 noir.png", "/noise.png\n"]
)
def test_a_picture_comes_from_an_address_also_after_a_redirect(server, path):
    assert (quietly(f" {server}{path}") == NOISE).all()
    assert Answers.agents == {"finetuning-workbook"}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/missing", r"the server answers 404 \(Not Found\); if a browser shows it, save it"),
        ("/round", "the server answers 302"),
        ("/page", r"a web page \(HTML\): copy the address of the picture in it"),
        ("/nothing", "is empty"),
        ("/half", "cannot be decoded"),
        ("/silent", "no whole answer within 0.5 seconds"),
        ("/drip", "no whole answer within 0.5 seconds"),
        ("/endless", "it has more than 1 MB"),
    ],
)
def test_an_address_without_a_picture_is_refused_in_time(server, path, says):
    start = time.perf_counter()
    with pytest.raises(PictureError, match=f"^{server}{path} .*{says}"):
        load_picture(server + path)
    assert time.perf_counter() - start < 1.5


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://127.0.0.1:1/x.png", "the host refuses the connection"),
        ("http://no-such-host.invalid/x.png", "no such host was found"),
        ("https://127.0.0.1:1/x.png", "the host refuses the connection"),
        ("http://", "no host given"),
        ("http://[x/y.png", "cannot be fetched"),
        ("http://x:y/z.png", "cannot be fetched"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused(monkeypatch, url, says):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(PictureError, match=says):
        load_picture(url)


def test_what_never_answers_is_left_after_the_time_though_it_hangs_before_any_timeout(monkeypatch):
    monkeypatch.setattr(pictures, "TIMEOUT_S", 0.2)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(2))
    start = time.perf_counter()
    with pytest.raises(PictureError, match=r"no whole answer within 0\.2 seconds"):
        load_picture("http://slow.invalid/x.png")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "url", ["file:///photo.png", "ftp://host/photo.png", "data:image/png;base64,AAAA", "s3://b/p.png"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(PictureError, match=r"is no http\(s\) address"):
        load_picture(url)


# --- real photographs


def test_every_real_photograph_loads_as_rgb(real_data):
    files = sorted(path for path in (real_data / "images").iterdir() if path.suffix in (".png", ".jpg"))
    assert len(files) == 7
    for path in files:
        with Image.open(path) as image:
            assert quietly(path).shape == (image.height, image.width, 3)
            assert (quietly(path) == np.asarray(image.convert("RGB"))).all()
    values = quietly(str(real_data / "images" / "astronaut.png"))
    assert (values == np.asarray(Image.open(real_data / "images" / "astronaut.png"))).all()  # RGB as it lies there
    camera = quietly(real_data / "images" / "camera.png")
    assert (camera == camera[..., :1]).all() and camera.std() > 50


# --- drawn


def drawn(axes) -> np.ndarray:
    """Return the pixels of a figure, shape (height, width, 3)."""
    figure = axes[0].figure
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def at(axes, number: int, x: float, y: float) -> list[int]:
    """Return the colour that is drawn at a picture's pixel (x, y)."""
    shown = drawn(axes)
    column, up = axes[number].transData.transform((x, y))
    return shown[int(len(shown) - up), int(column)].tolist()


def test_pictures_stand_in_rows_under_their_titles():
    named = {f"number {n}": Image.fromarray(NOISE) for n in range(5)}
    axes = plots.pictures(named, columns=3)
    assert [ax.get_title() for ax in axes] == list(named) and len(axes[0].figure.axes) == 5
    assert axes[3].get_position().y1 < axes[0].get_position().y0
    assert not any([*ax.get_xticks(), *ax.get_yticks()] for ax in axes)
    assert (axes[4].images[0].get_array() == NOISE).all()
    assert alt_text(axes[0].figure).startswith('Pictures of 60 x 40 pixels: "number 0"; "number 1"')


def test_long_titles_are_folded_and_lines_kept():
    (ax,) = plots.pictures({"asked: what is it?\nsaid: a red circle to the left of a blue square": NOISE})
    assert ax.get_title() == "asked: what is it?\nsaid: a red circle to the left\nof a blue square"


@pytest.mark.parametrize(("side", "interpolation"), [(199, "nearest"), (200, "auto")])
def test_small_pictures_show_their_pixels(side, interpolation):
    (ax,) = plots.pictures({"a": np.zeros((8, side, 3), np.uint8)})
    assert ax.images[0].get_interpolation() == interpolation


def test_the_grid_is_seen_on_light_and_dark_and_numbered():
    light, dark = np.full((32, 48, 3), 255, np.uint8), np.zeros((32, 48, 3), np.uint8)
    axes = plots.pictures({"light": light, "dark": dark}, patch=16)
    for ax in axes:
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"]
        assert ax.get_xticks().tolist() == [7.5, 23.5, 39.5]
        assert [line.get_segments()[0][0].tolist() for line in ax.collections] == [[-0.5, 15.5], [15.5, -0.5]]
    shown = drawn(axes).sum(axis=2)
    for ax, seen in zip(axes, (lambda row: row.min() < 300, lambda row: row.max() > 450), strict=True):
        (left, up), (right, _) = ax.transData.transform([(11.5, 7), (19.5, 7)])  # across the line at 15.5
        assert seen(shown[int(len(shown) - up), int(left) : int(right)])  # black casing on white, white line on black
    assert "48 x 32 pixels in 2 rows and 3 columns of patches" in alt_text(axes[0].figure)


def test_many_patches_are_numbered_sparsely_and_half_ones_too():
    (ax,) = plots.pictures({"a": np.zeros((20, 336, 3), np.uint8)}, patch=14)
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(n) for n in range(0, 24, 2)]
    assert ax.get_yticks().tolist() == [6.5, 16.5]  # the second has rows 14 to 19


def test_heat_lies_where_the_weights_are_on_a_greyed_picture():
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:] = RED
    weights = np.array([[0, 0.1, 0], [0.05, 0, 0.2]])
    axes = plots.pictures({"cold": picture, "hot": picture}, heat={"hot": weights}, patch=8)
    assert len(axes[0].images) == 1 and at(axes, 0, 12, 4) == [*RED]
    grey = 170 + 0.299 * 255 / 3  # 195
    assert at(axes, 1, 4, 4) == [int(grey)] * 3  # no weight: the grey shines through
    hottest = [0.15 * int(grey) + 0.85 * part for part in (0x08, 0x30, 0x6B)]
    assert np.abs(np.array(at(axes, 1, 20, 12)) - hottest).max() <= 2
    half = [0.575 * int(grey) + 0.425 * part for part in (0x08, 0x30, 0x6B)]
    assert np.abs(np.array(at(axes, 1, 12, 4)) - half).max() <= 2
    assert '"cold"; "hot", heaviest at patch row 1, column 2.' in alt_text(axes[0].figure)


def test_heat_is_told_from_none_in_grey_print_on_the_darkest_picture():
    axes = plots.pictures({"a": np.zeros((16, 16, 3), np.uint8)}, heat={"a": np.eye(2)})
    light = [np.array(at(axes, 0, x, 4)) @ (0.2126, 0.7152, 0.0722) for x in (4, 12)]
    assert light[1] - light[0] > 80


def test_weights_that_are_all_zero_are_no_heat():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = plots.pictures({"a": NOISE}, heat={"a": np.zeros((2, 3))})
    assert alt_text(axes[0].figure) == 'Pictures of 60 x 40 pixels: "a", no heat.'
    drawn(axes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shown": {}}, "no pictures"),
        ({"shown": {"a": NOISE[..., 0]}}, r"'a' must be RGB.*\(40, 60\)"),
        ({"shown": {"a": NOISE / 255}}, "0 to 255.*float64"),
        ({"shown": {"a": NOISE}, "heat": {"b": np.ones((2, 2))}}, "heat for 'b', but the pictures are 'a'"),
        ({"shown": {"a": NOISE}, "heat": {"a": -np.ones((2, 2))}}, "weights >= 0"),
        ({"shown": {"a": NOISE}, "heat": {"a": np.full((2, 2), np.nan)}}, "weights >= 0"),
        ({"shown": {"a": NOISE}, "heat": {"a": np.ones(6)}}, r"\(rows, columns\); it has \(6,\)"),
        (
            {"shown": {"a": NOISE}, "heat": {"a": np.ones((3, 2))}, "patch": 20},
            r"\(3, 2\), the grid of patches \(2, 3\)",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, says):
    with pytest.raises(DataError, match=says):
        plots.pictures(**options)


@pytest.fixture(autouse=True)
def _close_figures():
    import matplotlib.pyplot as plt

    yield
    plt.close("all")
