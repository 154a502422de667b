"""Resizes and crops: the published test vectors of spec 6.3, every crop mode, every limit."""

import math
from dataclasses import replace

import pytest
from reverie_trainer.jobs.preparing.geometry import (
    Geometry,
    ImagePlan,
    ImageSize,
    LeftOut,
    align,
    plan_choice,
    plan_images,
    square_edge,
    target_size,
)
from reverie_trainer.jobs.spec import CropAspect, DatasetChoice, JobSpec

MEGAPIXEL = 1024 * 1024
PLAIN = Geometry(resolution=1024, resolution_type="pixel_area", max_pixels=MEGAPIXEL, seed=42)


def geometry(resolution: float, **changes: object) -> Geometry:
    return replace(PLAIN, resolution=resolution, **changes)  # type: ignore[arg-type]


def image(width: int, height: int, key: str = "a") -> ImageSize:
    return ImageSize(key=key, width=width, height=height)


def planned(images: list[ImageSize], chosen: Geometry) -> list[ImagePlan]:
    plans = plan_images(images, chosen)
    assert all(isinstance(plan, ImagePlan) for plan in plans)
    return [plan for plan in plans if isinstance(plan, ImagePlan)]


def left_out(size: tuple[int, int], chosen: Geometry) -> str | None:
    plan = plan_images([image(*size)], chosen)[0]
    return plan.message if isinstance(plan, LeftOut) else None


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
    assert target_size(image(*size), geometry(1024)) == at_1024
    assert target_size(image(*size), geometry(512)) == at_512


@pytest.mark.parametrize(
    ("size", "aspect"), [((1344, 768), 1.75), ((768, 1344), 0.57), ((1216, 832), 1.46), ((1152, 896), 1.29)]
)
def test_bucket_aspects_are_those_of_the_specification(size: tuple[int, int], aspect: float) -> None:
    assert round(size[0] / size[1], 2) == aspect


@pytest.mark.parametrize(("pixels", "aligned"), [(0, 64), (31, 64), (96, 128), (160, 128), (95.9, 64), (1000, 1024)])
def test_alignment_rounds_exact_halves_to_the_even_multiple(pixels: float, aligned: int) -> None:
    assert align(pixels) == aligned


def test_square_bucket_does_not_pass_the_canvas() -> None:
    assert target_size(image(3000, 3000), geometry(2048)) == (1024, 1024)
    assert target_size(image(3000, 3000), geometry(2048, crop=True)) == (1024, 1024)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (500, 500), (1000, 90), (90, 1000), (10_000, 10)])
def test_small_canvas_bounds_every_aspect(size: tuple[int, int]) -> None:
    width, height = target_size(image(*size), geometry(1024, max_pixels=256 * 256))
    assert width * height <= 256 * 256
    assert width % 64 == height % 64 == 0


def test_pixel_means_the_shorter_edge() -> None:
    assert target_size(image(1600, 1200), geometry(512, resolution_type="pixel")) == (704, 512)
    assert target_size(image(1200, 1600), geometry(512, resolution_type="pixel")) == (512, 704)


def test_crop_makes_squares_of_every_aspect() -> None:
    plans = planned(
        [image(900, 300), image(300, 900, "b")],
        geometry(256, crop=True),
    )
    assert [(plan.width, plan.height) for plan in plans] == [(256, 256), (256, 256)]
    assert (plans[0].resize_width, plans[0].resize_height, plans[0].crop_left) == (768, 256, 256)


def test_first_image_of_an_aspect_fixes_the_size_for_all() -> None:
    # 1.50 and 1.52 have targets of the same rounded aspect; both go where the first one goes.
    plans = planned([image(1500, 1000), image(1520, 1000, "b")], geometry(1024))
    assert {(plan.width, plan.height) for plan in plans} == {(1216, 832)}


@pytest.mark.parametrize("size", [(1920, 1080), (333, 777), (64, 64), (5000, 100), (1217, 833)])
def test_resize_covers_the_bucket_and_the_crop_lies_inside(size: tuple[int, int]) -> None:
    plan = planned([image(*size)], geometry(512))[0]
    assert plan.resize_width >= plan.crop_left + plan.width
    assert plan.resize_height >= plan.crop_top + plan.height
    assert plan.width * plan.height <= MEGAPIXEL


def test_center_crop_is_in_the_middle_and_corner_crop_at_the_origin() -> None:
    center = planned([image(1920, 1080)], geometry(512))[0]
    corner = planned([image(1920, 1080)], geometry(512, crop_style="corner"))[0]
    assert center.crop_top == (center.resize_height - center.height) // 2
    assert (corner.crop_left, corner.crop_top) == (0, 0)


def test_random_crop_depends_on_the_seed_and_the_image_alone() -> None:
    images = [image(2000, 500, key) for key in ("a", "b")]
    lefts = [plan.crop_left for plan in planned(images, geometry(512, crop=True, crop_style="random"))]
    again = [plan.crop_left for plan in planned(images, geometry(512, crop=True, crop_style="random"))]
    other = [plan.crop_left for plan in planned(images, geometry(512, crop=True, crop_style="random", seed=1))]
    assert lefts == again
    assert lefts != other
    assert lefts[0] != lefts[1]


def test_area_counts_in_megapixels_and_pixel_area_in_edges() -> None:
    sizes = [(1920, 1080), (1500, 1000), (4000, 1000), (800, 800)]
    for size in sizes:
        by_edge = target_size(image(*size), geometry(1024))
        assert target_size(image(*size), geometry(1.048576, resolution_type="area")) == by_edge
    assert [square_edge(0.25, "area"), square_edge(0.5, "area"), square_edge(512, "pixel_area")] == [500, 707, 512]


def test_nothing_snaps_to_favoured_sizes() -> None:
    # 460 x 460 is within 0.05 megapixels of 0.25, which SimpleTuner makes 512 of (spec 6.3, decision 6).
    assert target_size(image(900, 900), geometry(460, crop=True)) == (448, 448)


def test_rounding_decides_which_aspects_share_a_bucket() -> None:
    images = [image(800, 1000), image(850, 1000, "b"), image(770, 1000, "c")]
    fine, coarse = (planned(images, geometry(768, rounding=rounding)) for rounding in (2, 1))
    # 704x832 is 0.85 and 704x896 is 0.79; both are 0.8 to one decimal, and the first picture decides.
    assert [(plan.width, plan.height) for plan in fine] == [(704, 832), (704, 832), (704, 896)]
    assert [(plan.width, plan.height) for plan in coarse] == [(704, 832)] * 3


def test_a_crop_that_preserves_the_aspect_goes_where_the_picture_would_go() -> None:
    plan = planned([image(1920, 1080)], geometry(1024, crop=True, crop_aspect="preserve"))[0]
    assert plan == planned([image(1920, 1080)], geometry(1024))[0]
    assert (plan.width, plan.height) == (1344, 768)


def test_the_closest_aspect_is_closest_by_ratio() -> None:
    aspects = (CropAspect(aspect=0.5), CropAspect(aspect=1.0), CropAspect(aspect=2.0))
    chosen = geometry(512, crop=True, crop_aspect="closest", crop_aspect_buckets=aspects)
    shapes = {
        size: (plan.width, plan.height)
        for size in [(1000, 720), (720, 1000), (1000, 700), (700, 1000), (1000, 300)]
        for plan in planned([image(*size)], chosen)
    }
    # sqrt(2) lies between 1 and 2, and its inverse between 1/2 and 1.
    assert shapes == {
        (1000, 720): (512, 512),
        (720, 1000): (512, 512),
        (1000, 700): (704, 384),
        (700, 1000): (384, 704),
        (1000, 300): (704, 384),
    }


def test_random_aspects_come_by_their_weights_and_by_image() -> None:
    aspects = (CropAspect(aspect=1.0, weight=0.8), CropAspect(aspect=2.0, weight=0.2))
    chosen = geometry(512, crop=True, crop_aspect="random", crop_aspect_buckets=aspects)
    images = [image(1600, 1000, f"{number}") for number in range(1000)]
    plans = planned(images, chosen)
    assert 160 < sum(plan.width > plan.height for plan in plans) < 240
    assert plans == planned(images, chosen)
    assert plans != planned(images, replace(chosen, seed=1))


def test_random_aspects_without_weights_are_alike() -> None:
    aspects = (CropAspect(aspect=1.0), CropAspect(aspect=2.0))
    chosen = geometry(512, crop=True, crop_aspect="random", crop_aspect_buckets=aspects)
    plans = planned([image(1600, 1000, f"{number}") for number in range(1000)], chosen)
    assert 450 < sum(plan.width > plan.height for plan in plans) < 550


@pytest.mark.parametrize(
    ("resolution_type", "limit", "below", "enough"),
    [
        ("pixel_area", 1024.0, (1024, 1023), (1024, 1024)),
        ("pixel_area", 1024.0, (2047, 512), (2048, 512)),
        ("area", 0.5, (999, 500), (1000, 500)),
        ("pixel", 512.0, (2000, 511), (512, 512)),
    ],
)
def test_pictures_below_the_minimum_are_left_out(
    resolution_type: str, limit: float, below: tuple[int, int], enough: tuple[int, int]
) -> None:
    chosen = geometry(
        0.2 if resolution_type == "area" else 512, resolution_type=resolution_type, minimum_image_size=limit
    )
    assert "below minimum_image_size" in (left_out(below, chosen) or "")
    assert left_out(enough, chosen) is None


def test_the_reference_sizes_drop_what_is_below_a_megapixel_and_resize_the_rest() -> None:
    chosen = geometry(
        1024,
        crop=True,
        minimum_image_size=1024.0,
        maximum_image_size=1024.0,
        target_downsample_size=1024.0,
    )
    assert left_out((1200, 800), chosen) is not None
    plans = planned([image(1024, 1024), image(6000, 4000, "b"), image(1300, 900, "c")], chosen)
    assert [(plan.resize_width, plan.resize_height) for plan in plans] == [(1024, 1024), (1536, 1024), (1479, 1024)]


def test_a_crop_is_cut_out_of_a_picture_that_is_brought_down_only_above_the_maximum() -> None:
    chosen = geometry(512, crop=True, maximum_image_size=2048.0, target_downsample_size=1024.0)
    above, at, below = planned([image(4096, 4096), image(2048, 2048, "b"), image(600, 600, "c")], chosen)
    assert (above.resize_width, above.resize_height) == (1024, 1024)
    assert (at.resize_width, at.resize_height, at.crop_left) == (2048, 2048, 768)
    assert (below.resize_width, below.resize_height) == (600, 600)
    assert {(plan.width, plan.height) for plan in (above, at, below)} == {(512, 512)}


@pytest.mark.parametrize(
    ("resolution_type", "resolution", "maximum", "target", "expected"),
    [("area", 0.25, 4.0, 1.0, (1414, 707)), ("pixel", 512.0, 1024.0, 768.0, (1536, 768))],
)
def test_the_maximum_is_in_the_unit_of_the_resolution(
    resolution_type: str, resolution: float, maximum: float, target: float, expected: tuple[int, int]
) -> None:
    chosen = geometry(
        resolution,
        resolution_type=resolution_type,
        crop=True,
        maximum_image_size=maximum,
        target_downsample_size=target,
    )
    plan = planned([image(4000, 2000)], chosen)[0]
    assert (plan.resize_width, plan.resize_height) == expected


def test_aspects_outside_the_limits_are_left_out() -> None:
    chosen = geometry(512, minimum_aspect_ratio=0.5, maximum_aspect_ratio=2.0)
    assert "below minimum_aspect_ratio 0.5" in (left_out((499, 1000), chosen) or "")
    assert "above maximum_aspect_ratio 2" in (left_out((1000, 499), chosen) or "")
    assert left_out((500, 1000), chosen) is None
    assert left_out((1000, 500), chosen) is None


def test_pictures_that_would_be_enlarged_too_much_are_left_out() -> None:
    chosen = geometry(512, max_upscale_threshold=4.0)
    assert left_out((256, 256), chosen) is None
    assert "4.03 times its area" in (left_out((255, 255), chosen) or "")


def test_so_many_samples_as_asked_for_are_chosen_by_the_seed() -> None:
    images = [image(800, 600, f"{number}") for number in range(20)] + [image(10, 10, "small")]
    choice = DatasetChoice(dataset="cats", resolution=512, max_num_samples=5, minimum_image_size=64)
    plans = plan_choice(images, choice, JobSpec(seed=1), MEGAPIXEL)
    kept = [index for index, plan in enumerate(plans) if isinstance(plan, ImagePlan)]
    other = plan_choice(images, choice, JobSpec(seed=2), MEGAPIXEL)
    assert len(kept) == 5
    assert isinstance(plans[20], LeftOut)
    assert plan_choice(images, choice, JobSpec(seed=1), MEGAPIXEL) == plans
    assert [index for index, plan in enumerate(other) if isinstance(plan, ImagePlan)] != kept


@pytest.mark.parametrize("crop_aspect", ["square", "preserve", "random", "closest"])
@pytest.mark.parametrize("crop_style", ["center", "corner", "random"])
@pytest.mark.parametrize("size", [(4000, 1000), (1000, 4000), (333, 777), (3000, 3000)])
def test_every_mode_stays_on_the_canvas_and_inside_the_picture(
    crop_aspect: str, crop_style: str, size: tuple[int, int]
) -> None:
    aspects = (CropAspect(aspect=3.0), CropAspect(aspect=0.4)) if crop_aspect in ("random", "closest") else ()
    chosen = geometry(
        2048,
        crop=True,
        crop_aspect=crop_aspect,
        crop_style=crop_style,
        crop_aspect_buckets=aspects,
        max_pixels=512 * 512,
    )
    plan = planned([image(*size)], chosen)[0]
    assert plan.width * plan.height <= 512 * 512
    assert plan.width % 64 == plan.height % 64 == 0
    assert plan.crop_left + plan.width <= plan.resize_width
    assert plan.crop_top + plan.height <= plan.resize_height
    assert math.isclose(plan.resize_width / plan.resize_height, size[0] / size[1], rel_tol=0.02)
