"""How the photographs beside this file were made from the sample photographs inside scikit-image's wheel.

Not needed to run anything: the results are committed. To make them again:

    pip install scikit-image pillow && python examples/quickstart/make_photos.py

Photographs with an EXIF orientation are stored turned, as a camera held upright stores them; they look right only to a
reader that honours the tag.
"""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from PIL import Image

PHOTOS = Path(__file__).parent / "photos"
ORIENTATION_TAG = 0x0112
# What brings the upright picture to the pixels that a file with this EXIF orientation stores.
STORED = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Photo:
    """One photograph of the quickstart."""

    name: str
    source: str
    """File in scikit-image's data folder."""
    box: tuple[int, int, int, int] | None = None
    """Crop (left, top, right, bottom) in pixels of the source; none takes all of it."""
    longest: int = 640
    """Longest edge in pixels; a larger crop is scaled down to it."""
    orientation: int = 1
    """EXIF orientation to store it with: 1 is upright."""
    caption: str


ALL = [
    Photo(name="astronaut", source="astronaut.png", caption="a photo of a smiling astronaut in an orange suit"),
    Photo(
        name="astronaut_portrait",
        source="astronaut.png",
        box=(80, 0, 380, 450),
        orientation=6,
        caption="a portrait photo of an astronaut, an american flag behind her",
    ),
    Photo(
        name="cat",
        source="chelsea.png",
        caption="a photo of a ginger cat looking at the camera\na close-up photo of a tabby cat with green eyes",
    ),
    Photo(
        name="cat_upright",
        source="chelsea.png",
        box=(90, 0, 315, 300),
        orientation=8,
        caption="a photo of the face of a ginger cat",
    ),
    Photo(
        name="clock",
        source="clock_motion.png",
        orientation=3,
        caption="a blurred black and white photo of a wall clock",
    ),
    Photo(
        name="coffee",
        source="coffee.png",
        caption="a photo of a red cup of espresso on a wooden table\na cup of coffee with a spoon",
    ),
    Photo(
        name="coffee_table",
        source="coffee.png",
        box=(0, 60, 600, 397),
        caption="a wide photo of a red cup of coffee on a table",
    ),
    Photo(
        name="brick_wall",
        source="brick.png",
        box=(64, 0, 448, 512),
        caption="a black and white photo of a brick wall",
    ),
    Photo(
        name="grass",
        source="grass.png",
        box=(0, 128, 512, 384),
        caption="a black and white photo of grass seen from above",
    ),
    Photo(name="gravel", source="gravel.png", longest=400, caption="a black and white photo of gravel"),
    Photo(
        name="galaxies",
        source="hubble_deep_field.jpg",
        longest=560,
        caption="a photo of thousands of galaxies in a black sky",
    ),
    Photo(
        name="photographer",
        source="camera.png",
        box=(0, 0, 512, 384),
        caption="a black and white photo of a man with a camera on a tripod",
    ),
    Photo(name="rocket", source="rocket.jpg", caption="a photo of a rocket on its launch pad in the evening"),
    Photo(
        name="rocket_tower",
        source="rocket.jpg",
        box=(210, 0, 450, 427),
        orientation=6,
        caption="a tall photo of a white rocket under a blue evening sky",
    ),
]


def make(photo: Photo) -> None:
    """Write one photograph and its caption file."""
    picture = Image.open(Path(str(files("skimage"))) / "data" / photo.source).convert("RGB")
    picture = picture.crop(photo.box) if photo.box else picture
    picture.thumbnail((photo.longest, photo.longest), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    if photo.orientation != 1:
        exif[ORIENTATION_TAG] = photo.orientation
        picture = picture.transpose(STORED[photo.orientation])
    picture.save(PHOTOS / f"{photo.name}.jpg", quality=85, optimize=True, exif=exif)
    (PHOTOS / f"{photo.name}.txt").write_text(photo.caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    for each in ALL:
        make(each)
