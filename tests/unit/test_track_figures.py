import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.track.figures import ColourBasis, curve_figure, feature_figure, neighbour_figure


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(3, 16, 4, 4, generator=generator)
    return {
        "input": torch.rand(3, 3, 32, 32, generator=generator),
        "mask": (torch.rand(3, 1, 4, 4, generator=generator) < 0.5).float(),
        "teacher": teacher,
        "student": teacher + 0.1,
        "teacher/8": torch.randn(3, 8, 8, 8, generator=generator),
        "student/8": torch.randn(3, 5, 8, 8, generator=generator),
        "student/4": torch.randn(3, 5, 16, 16, generator=generator),
    }


def test_colours_do_not_depend_on_the_order_of_images(parts):
    teacher = parts["teacher"]
    one, two = ColourBasis.fit(teacher), ColourBasis.fit(teacher.flip(0))
    np.testing.assert_allclose(one.axes, two.axes, atol=1e-5)
    np.testing.assert_allclose(one.colours(teacher), two.colours(teacher), atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 40])
def test_any_number_of_channels_gives_rgb(channels):
    features = torch.randn(2, channels, 3, 5)
    colours = ColourBasis.fit(features).colours(features)
    assert colours.shape == (2, 3, 5, 3)
    assert 0 <= colours.min() <= colours.max() <= 1


def test_feature_figure_keeps_its_colours_when_told(parts, tmp_path):
    used = feature_figure(tmp_path / "figures" / "a.png", parts, step=100, title="run")
    assert set(used) == {"", "8", "student/4"}
    again = feature_figure(tmp_path / "b.png", {**parts, "teacher": parts["teacher"] * 3}, step=200, basis=used)
    assert again[""] is used[""]
    with Image.open(tmp_path / "figures" / "a.png") as picture:
        assert picture.width > picture.height  # seven columns, three rows
    assert (tmp_path / "figures" / "a.png").stat().st_size < 300_000


def test_the_other_pictures_are_written(parts, tmp_path):
    images = parts["input"]
    found = images[None].expand(3, -1, -1, -1, -1)
    neighbour_figure(tmp_path / "n.png", images, found, torch.rand(3, 3), torch.eye(3), step=1)
    curve_figure(tmp_path / "c.png", {"loss": [(0, 1.0), (1, 0.5)], "none": []}, title="loss", unit="loss")
    for name in ("n.png", "c.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
