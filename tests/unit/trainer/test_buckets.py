"""Buckets, resizes and crops: the published test vectors of spec 6.3, and the rules around them."""

import pytest
from reverie_trainer.jobs.buckets import (
    Bucket,
    Geometry,
    ImageSize,
    align,
    count_buckets,
    describe_empty,
    describe_underfilled,
    minimum_repeats,
    plan_images,
    steps_per_epoch,
    target_size,
)

MEGAPIXEL = 1024 * 1024


def geometry(
    resolution: int,
    *,
    resolution_type: str = "pixel_area",
    crop: bool = False,
    crop_style: str = "center",
    max_pixels: int = MEGAPIXEL,
    seed: int = 42,
) -> Geometry:
    return Geometry(
        resolution=resolution,
        resolution_type=resolution_type,
        crop=crop,
        crop_style=crop_style,
        max_pixels=max_pixels,
        seed=seed,
    )


@pytest.mark.parametrize(
    ("size", "at_1024", "at_512"),
    [
        ((1024, 1024), (1024, 1024), (512, 512)),
        ((1010, 1000), (1024, 1024), (512, 512)),
        ((1920, 1080), (1344, 768), (704, 384)),
        ((1080, 1920), (768, 1344), (384, 704)),
        ((1500, 1000), (1216, 832), (640, 448)),
        ((1600, 1200), (1152, 896), (576, 448)),
        ((4000, 1000), (2048, 512), (1024, 256)),
    ],
)
def test_targets_are_those_of_the_specification(
    size: tuple[int, int], at_1024: tuple[int, int], at_512: tuple[int, int]
) -> None:
    assert target_size(*size, geometry(1024)) == at_1024
    assert target_size(*size, geometry(512)) == at_512


@pytest.mark.parametrize(
    ("size", "aspect"), [((1344, 768), 1.75), ((768, 1344), 0.57), ((1216, 832), 1.46), ((1152, 896), 1.29)]
)
def test_bucket_aspects_are_those_of_the_specification(size: tuple[int, int], aspect: float) -> None:
    assert round(size[0] / size[1], 2) == aspect


@pytest.mark.parametrize(("pixels", "aligned"), [(0, 64), (31, 64), (96, 128), (160, 128), (95.9, 64), (1000, 1024)])
def test_alignment_rounds_exact_halves_to_the_even_multiple(pixels: float, aligned: int) -> None:
    assert align(pixels) == aligned


def test_square_bucket_does_not_pass_the_canvas() -> None:
    assert target_size(3000, 3000, geometry(2048)) == (1024, 1024)
    assert target_size(3000, 3000, geometry(2048, crop=True)) == (1024, 1024)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (500, 500), (1000, 90), (90, 1000), (10_000, 10)])
def test_small_canvas_bounds_every_aspect(size: tuple[int, int]) -> None:
    width, height = target_size(*size, geometry(1024, max_pixels=256 * 256))
    assert width * height <= 256 * 256
    assert width % 64 == height % 64 == 0


def test_pixel_means_the_shorter_edge() -> None:
    assert target_size(1600, 1200, geometry(512, resolution_type="pixel")) == (704, 512)
    assert target_size(1200, 1600, geometry(512, resolution_type="pixel")) == (512, 704)


def test_crop_makes_squares_of_every_aspect() -> None:
    plans = plan_images(
        [ImageSize(key="a", width=900, height=300), ImageSize(key="b", width=300, height=900)],
        geometry(256, crop=True),
    )
    assert [(plan.width, plan.height) for plan in plans] == [(256, 256), (256, 256)]
    assert (plans[0].resize_width, plans[0].resize_height, plans[0].crop_left) == (768, 256, 256)


def test_first_image_of_an_aspect_fixes_the_size_for_all() -> None:
    # 1.50 and 1.52 have targets of the same rounded aspect; both go where the first one goes.
    plans = plan_images(
        [ImageSize(key="a", width=1500, height=1000), ImageSize(key="b", width=1520, height=1000)], geometry(1024)
    )
    assert {(plan.width, plan.height) for plan in plans} == {(1216, 832)}


@pytest.mark.parametrize("size", [(1920, 1080), (333, 777), (64, 64), (5000, 100), (1217, 833)])
def test_resize_covers_the_bucket_and_the_crop_lies_inside(size: tuple[int, int]) -> None:
    plan = plan_images([ImageSize(key="a", width=size[0], height=size[1])], geometry(512))[0]
    assert plan.resize_width >= plan.crop_left + plan.width
    assert plan.resize_height >= plan.crop_top + plan.height
    assert plan.width * plan.height <= MEGAPIXEL


def test_center_crop_is_in_the_middle_and_corner_crop_at_the_origin() -> None:
    image = ImageSize(key="a", width=1920, height=1080)
    center = plan_images([image], geometry(512))[0]
    corner = plan_images([image], geometry(512, crop_style="corner"))[0]
    assert center.crop_top == (center.resize_height - center.height) // 2
    assert (corner.crop_left, corner.crop_top) == (0, 0)


def test_random_crop_depends_on_the_seed_and_the_image_alone() -> None:
    images = [ImageSize(key=key, width=2000, height=500) for key in ("a", "b")]
    lefts = [plan.crop_left for plan in plan_images(images, geometry(512, crop=True, crop_style="random"))]
    again = [plan.crop_left for plan in plan_images(images, geometry(512, crop=True, crop_style="random"))]
    other = [plan.crop_left for plan in plan_images(images, geometry(512, crop=True, crop_style="random", seed=1))]
    assert lefts == again
    assert lefts != other
    assert lefts[0] != lefts[1]


def test_repeats_are_extra_passes() -> None:
    bucket = Bucket(dataset="cats", repeats=1000, width=512, height=512, num_images=20)
    assert steps_per_epoch([bucket], 1, 1) == 20_020


def test_epoch_counts_batches_by_bucket_and_rounds_up() -> None:
    buckets = [
        Bucket(dataset="cats", repeats=0, width=512, height=512, num_images=5),
        Bucket(dataset="cats", repeats=0, width=640, height=448, num_images=4),
    ]
    assert steps_per_epoch(buckets, 4, 1) == 3
    assert steps_per_epoch(buckets, 4, 2) == 2


def test_buckets_are_counted_largest_first() -> None:
    buckets = count_buckets("cats", 0, [(512, 512), (640, 448), (640, 448)])
    assert [(bucket.width, bucket.num_images) for bucket in buckets] == [(640, 2), (512, 1)]


def test_underfilled_bucket_is_told_with_the_repeats_that_it_needs() -> None:
    buckets = [
        Bucket(dataset="cats", repeats=0, width=512, height=512, num_images=8),
        Bucket(dataset="cats", repeats=0, width=640, height=448, num_images=3),
    ]
    message = describe_underfilled(buckets, 4, 2)
    assert message is not None
    assert "zero usable batches" in message
    assert "cats | 640x448 | 3 | 0 | 3 | 2" in message
    assert "512x512" not in message
    assert "Minimum repeats required: 2" in message
    assert describe_underfilled(buckets, 3, 1) is None


@pytest.mark.parametrize(("images", "effective", "repeats"), [(1, 1, 0), (3, 8, 2), (4, 8, 1), (1, 8, 7), (9, 8, 0)])
def test_minimum_repeats_are_those_of_the_specification(images: int, effective: int, repeats: int) -> None:
    assert minimum_repeats(images, effective) == repeats


def test_empty_dataset_is_told_in_the_words_that_guides_use() -> None:
    assert "no images detected in dataset" in describe_empty("cats", 0)
    assert "3 images were rejected" in describe_empty("cats", 3)
