"""From an encoded image to the float pixels a teacher wants."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np

# Pillow mode -> the mode we keep: 8-bit grey or RGB. Alpha is dropped, palettes are looked up.
# Wider modes (I;16, I, F) are absent on purpose: Pillow clips them to 8 bits instead of scaling.
_KEPT_MODES = {
    "1": "L",
    "L": "L",
    "LA": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGB": "RGB",
    "RGBA": "RGB",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
_INTERPOLATIONS = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a teacher wants its pixels; part of the teacher's metadata. Hashable.

    Attributes:
      mean: per channel, in units of [0, 1] pixels; its length (1 or 3) is the number of channels.
      std: per channel, same units and length as `mean`.
      size: side of the square input, pixels.
      resize: the shorter side is resized to this many pixels (antialiased, as Pillow does) before
        the centre crop to `size`. None: images must already be `size` x `size`.
      interpolation: of the resize, "bilinear" or "bicubic".

    Sequences given for `mean` and `std` (JSON has only lists) are stored as tuples of floats.

    Raises:
      ValueError: values that no image could be preprocessed with.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(
                f"preprocessing: found mean {self.mean} and std {self.std}, expected one value a "
                "channel in both: 1 (grey) or 3 (RGB)"
            )
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError(
                f"preprocessing: found mean {self.mean} and std {self.std}, expected finite means "
                "and positive stds, in units of [0, 1] pixels"
            )
        if self.size < 1:
            raise ValueError(f"preprocessing: found size {self.size}, expected at least 1 pixel")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(
                f"preprocessing: found resize {self.resize} below size {self.size}; the centre "
                "crop needs resize >= size"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"preprocessing: found interpolation {self.interpolation!r}, expected one of "
                f"{_INTERPOLATIONS}"
            )

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return len(self.mean)


def decode_image(encoded: bytes) -> tuple[np.ndarray, str]:
    """Decodes one image file, as stored: no resize, no EXIF rotation; of an animation, frame one.

    Args:
      encoded: the bytes of a file in any format Pillow reads.

    Returns:
      The pixels, uint8 [H, W, C] with C = 1 (grey) or 3 (RGB), and Pillow's name of the format.

    Raises:
      ValueError: the bytes are no image, a broken one, or one of more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            found, mode = image.format or "", image.mode
            kept = _KEPT_MODES.get(mode)
            image.info.pop("transparency", None)  # or convert() warns that it drops the alpha
            pixels = np.array(image.convert(kept), np.uint8) if kept else None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise ValueError(
            f"found {len(encoded)} bytes that Pillow cannot decode ({error}), expected a whole "
            "PNG, JPEG, WebP, BMP or PPM image; replace the file or remove it"
        ) from error
    if pixels is None:
        raise ValueError(
            f"found an image of mode {mode!r}, expected 8 bits a channel ({', '.join(_KEPT_MODES)})"
            "; convert it first"
        )
    return (pixels[:, :, None] if pixels.ndim == 2 else pixels), found


def encode_png(pixels: np.ndarray) -> bytes:
    """Lossless PNG bytes of uint8 [H, W, C], C = 1 or 3."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Resizes, crops and normalises one image: `(pixels / 255 - mean) / std`.

    Args:
      image: uint8 [H, W, C], C = 1 (grey) or 3 (RGB). Where the teacher wants the other number
        of channels, grey is repeated and RGB becomes ITU-R 601 luma (Pillow's "L").
      preprocessing: what the teacher wants.

    Returns:
      float32 [size, size, len(mean)].

    Raises:
      ValueError: see `crop`.
    """
    return normalise(crop(image, preprocessing)[None], preprocessing)[0]


def crop(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """The uint8 part of `preprocess`: channels, resize, centre crop.

    The resized longer side is cut to an integer and the crop's corner rounded half to even, as
    torchvision's Resize and CenterCrop do: published teachers were measured with those.

    Args:
      image: uint8 [H, W, C].
      preprocessing: what the teacher wants.

    Returns:
      uint8 [size, size, len(mean)].

    Raises:
      ValueError: not uint8 [H, W, 1 or 3]; or not `size` x `size` while `resize` is None.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            f"found an image {image.dtype}{list(image.shape)}, expected uint8[H, W, 1 or 3]; "
            "convert it first"
        )
    size, resize = preprocessing.size, preprocessing.resize
    height, width = image.shape[:2]
    if resize is None and (height, width) != (size, size):
        way_out = (
            f"set resize (for instance resize={min(height, width)}) to have larger images cropped"
            if min(height, width) >= size
            else f"set resize={size} or more to have them enlarged"
        )
        raise ValueError(
            f"found an image {height} x {width} pixels, expected {size} x {size} because "
            f"preprocessing.resize is None; {way_out}"
        )
    if image.shape[2] == 3 and preprocessing.channels == 1:
        image = _luma(image)
    if resize is not None:
        image = _resize(image, resize, preprocessing.interpolation)
        top, left = (round((side - size) / 2) for side in image.shape[:2])
        image = image[top : top + size, left : left + size]
    if image.shape[2] != preprocessing.channels:
        image = np.repeat(image, preprocessing.channels, axis=2)
    return image


def normalise(
    pixels: np.ndarray, preprocessing: Preprocessing, out: np.ndarray | None = None
) -> np.ndarray:
    """`(pixels / 255 - mean) / std` in float32.

    Args:
      pixels: uint8 [..., C].
      preprocessing: gives mean and std, each [C].
      out: float32 [..., C] to write into, or None to make it.

    Returns:
      float32 [..., C].
    """
    out = np.empty(pixels.shape, np.float32) if out is None else out
    np.divide(pixels, np.float32(255), out=out, dtype=np.float32)
    out -= np.asarray(preprocessing.mean, np.float32)
    out /= np.asarray(preprocessing.std, np.float32)
    return out


def _luma(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> [H, W, 1]."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]


def _resize(image: np.ndarray, shorter: int, interpolation: str) -> np.ndarray:
    """uint8 [H, W, C] -> uint8 with its shorter side of `shorter` pixels, aspect ratio kept."""
    from PIL import Image

    height, width = image.shape[:2]
    if min(height, width) == shorter:
        return image
    if width <= height:
        target = (shorter, int(shorter * height / width))  # Pillow's order: width, height
    else:
        target = (int(shorter * width / height), shorter)
    method = Image.Resampling[interpolation.upper()]
    resized = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).resize(
        target, method
    )
    return np.asarray(resized).reshape(target[1], target[0], image.shape[2])
