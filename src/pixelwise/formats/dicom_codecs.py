"""Decoders for compressed DICOM: pydicom's own plugins, and imagecodecs for what they leave out.

pydicom decodes RLE by itself, and JPEG and JPEG 2000 of 8 bits through Pillow. JPEG lossless, which many CT and MR archives
hold, JPEG of 12 bits, JPEG-LS and High-Throughput JPEG 2000 come from imagecodecs, which pixelwise needs anyway. Every other
transfer syntax is named in an error, with what to install.
"""

import struct
from typing import Any

import numpy as np

from pixelwise.errors import DataError

DECODER_DEPENDENCIES = {
    "1.2.840.10008.1.2.4.51": ("imagecodecs",),  # JPEG, 12 bits
    "1.2.840.10008.1.2.4.57": ("imagecodecs",),  # JPEG lossless
    "1.2.840.10008.1.2.4.70": ("imagecodecs",),  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": ("imagecodecs",),  # JPEG-LS; pyjpegls takes memory for any size that a frame claims
    "1.2.840.10008.1.2.4.81": ("imagecodecs",),
    "1.2.840.10008.1.2.4.90": ("imagecodecs",),  # JPEG 2000; Pillow cannot decode colours of more than 8 bits
    "1.2.840.10008.1.2.4.91": ("imagecodecs",),
    "1.2.840.10008.1.2.4.201": ("imagecodecs",),  # High-Throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": ("imagecodecs",),
    "1.2.840.10008.1.2.4.203": ("imagecodecs",),
}
"""As pydicom asks of a plugin: the transfer syntaxes, and what they need."""

PLUGIN = "pixelwise"
"""Its name there."""

_PILLOW_FIRST = ("1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_JPEG_2000, _JPEG = b"\xff\x4f\xff\x51", b"\xff\xd8"
_JPEG_LS = 0xF7
_END = b"\xff\xd9"
_DEFLATED = "1.2.840.10008.1.2.1.99"


def check_decoder(syntax: Any) -> None:
    """Make sure that a transfer syntax can be decoded.

    Args:
        syntax: a pydicom UID.

    Raises:
        DataError: there is no decoder; the message names the transfer syntax and the packages to install.

    Example:
        >>> from pydicom.uid import JPEGLosslessSV1, MPEG2MPML
        >>> check_decoder(JPEGLosslessSV1)
        >>> check_decoder(MPEG2MPML)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: its pixels are compressed as MPEG2 Main Profile / Main Level ..., which cannot be ...
    """
    from pydicom.pixels import get_decoder

    if syntax == _DEFLATED:
        raise DataError(
            "it is deflated as a whole (Deflated Explicit VR Little Endian), so its header cannot be read alone. Convert "
            "it, for example with `dcmconv +te`."
        )
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise DataError(
            f"its pixels are compressed as {_name(syntax)}, which cannot be decoded. Convert it to Explicit VR Little "
            "Endian, for example with dcmdjpeg or gdcmconv."
        ) from error
    if syntax in DECODER_DEPENDENCIES and PLUGIN not in decoder.available_plugins:
        decoder.add_plugin(PLUGIN, (__name__, "decode"))
    if not decoder.is_available:
        raise DataError(
            f"its pixels are compressed as {_name(syntax)}, for which no decoder is installed. Install one: pip install "
            "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg pylibjpeg-rle."
        )


def is_available(uid: str) -> bool:
    """Whether `decode` knows a transfer syntax; pydicom asks this of a plugin."""
    return uid in DECODER_DEPENDENCIES


def plugin_for(syntax: Any) -> str:
    """The name of the plugin that must decode a transfer syntax; empty where pydicom may choose.

    Example:
        >>> plugin_for("1.2.840.10008.1.2.4.70"), plugin_for("1.2.840.10008.1.2.5")
        ('pixelwise', '')
    """
    return PLUGIN if syntax in DECODER_DEPENDENCIES and syntax not in _PILLOW_FIRST else ""


def decode(source: bytes, runner: Any) -> bytes:
    """Decode one frame; pydicom calls this with the frame's bytes and what the header says of it.

    Raises:
        ValueError: the frame claims another size than the header, and is not decoded, or is damaged.
    """
    import imagecodecs

    rows, columns, bits, is_signed, is_ls = _claims(source)
    if (rows, columns) != (runner.rows, runner.columns):
        raise ValueError("the frame has another size than the header says")
    samples = runner.samples_per_pixel
    shape = (rows, columns) if samples == 1 else (rows, columns, samples)
    frame = np.zeros(shape, f"{'i' if is_signed else 'u'}{1 if bits <= 8 else 2}")
    if source[:2] != _JPEG:
        imagecodecs.jpeg2k_decode(source, out=frame)
        if runner.photometric_interpretation in ("YBR_ICT", "YBR_RCT"):  # turned back by the decoder
            runner.set_option("photometric_interpretation", "RGB")
    elif is_ls:
        if not source.rstrip(b"\0").endswith(_END):  # CharLS would look for more for seconds
            raise ValueError("the frame ends early")
        imagecodecs.jpegls_decode(source, out=frame)
    else:
        # the same space in and out: whether colours must be turned is for pydicom to decide, by the header
        space = "YCBCR" if samples == 3 else None
        imagecodecs.jpeg8_decode(source, colorspace=space, outcolorspace=space, out=frame)
    if samples > 1:
        runner.set_option("planar_configuration", 0)
    runner.set_option("bits_allocated", frame.itemsize * 8)
    return frame.tobytes()


def _claims(source: bytes) -> tuple[int, int, int, bool, bool]:
    """What a frame says of itself: rows, columns, bits of a sample, whether these have a sign, whether it is JPEG-LS."""
    if source[:4] == _JPEG_2000 and len(source) > 42:  # SIZ (T.800 A.5.1)
        right, bottom, left, top = struct.unpack(">4I", source[8:24])
        return bottom - top, right - left, (source[42] & 127) + 1, bool(source[42] & 128), False
    at = 2
    while source[:2] == _JPEG and at + 9 <= len(source) and source[at] == 0xFF:
        marker = source[at + 1]
        if marker == _JPEG_LS or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # SOF (T.81 B.2.2)
            bits, rows, columns = struct.unpack(">BHH", source[at + 4 : at + 9])
            return rows, columns, bits, False, marker == _JPEG_LS
        at += 2 + int.from_bytes(source[at + 2 : at + 4], "big")
    raise ValueError("the frame does not begin as JPEG or JPEG 2000 does")


def _name(syntax: Any) -> str:
    return f"{syntax.name} ({syntax})" if syntax.name != syntax else safe_text(syntax)


def safe_text(value: Any) -> str:
    """Text of a file as a terminal can take it, at most 64 letters.

    Example:
        >>> safe_text("scout\x1b[31m")
        'scout?[31m'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in str(value))[:64]
