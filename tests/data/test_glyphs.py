"""The drawn data set."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="the fonts extra is not installed")

from limpq_ext.data import glyphs
from limpq_ext.data.datasets import load_data
from limpq_ext.data.glyphs import CLASSES, GlyphImages, matplotlib_fonts
from limpq_ext.data.loading import make_loader

FEW = {"train_images": 102, "test_images": 68}


def test_an_image_depends_on_seed_split_and_index_alone():
    images = GlyphImages(68, "train")
    backwards = [images.read(index)[0] for index in reversed(range(68))][::-1]
    more = GlyphImages(102, "train")
    more.load()
    for index in range(68):
        assert torch.equal(backwards[index], more.read(index)[0])
    first = backwards[0]
    for other in (GlyphImages(68, "test"), GlyphImages(68, "train", seed=1)):
        assert not torch.equal(first, other.read(0)[0])


def test_the_classes_are_balanced_in_every_split():
    data = load_data("glyphs", glyphs=FEW, val_fraction=1 / 3)
    assert data.num_classes == 34
    for split, count in (("train", 2), ("val", 1), ("test", 2)):
        assert set(data.record["images_per_class"][split]) == {count}


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (57, 1)])
def test_any_size(size, channels):
    data = load_data("glyphs", image_size=size, channels=channels, glyphs=FEW)
    image, _ = data.train[0]
    assert image.shape == data.image_shape == (channels, size, size)
    assert image.abs().max() <= 2


def test_what_is_drawn_on_the_fly_is_what_is_cached():
    cached, drawn = (
        load_data("glyphs", glyphs={**FEW, "cache": cache}).test for cache in (True, False)
    )
    for ours, theirs in zip(
        make_loader(cached, batch_size=34, train=False),
        make_loader(drawn, batch_size=34, train=False, workers=1),
        strict=True,
    ):
        assert torch.equal(ours[0], theirs[0])


def test_without_difficulty_the_glyphs_of_one_class_look_alike():
    def spread(difficulty):
        images = GlyphImages(340, "train", channels=1, difficulty=difficulty)
        fives = torch.stack([images.read(index)[0].float() for index in range(5, 340, 34)])
        # Dark on light and light on dark alike.
        fives = (fives - fives.flatten(1).median(1).values[:, None, None, None]).abs()
        return (fives / fives.amax((1, 2, 3), keepdim=True)).std(0).mean()

    assert spread(0) < 0.75 * spread(1)


def test_characters_that_look_the_same_are_of_one_class():
    assert len(CLASSES) == 34
    assert len(set("".join(CLASSES))) == len("".join(CLASSES))
    assert {"0Oo", "1Il"} <= set(CLASSES)


def test_fonts_of_symbols_are_left_out():
    names = {path.stem for path in matplotlib_fonts()}
    assert {"DejaVuSans", "STIXGeneral", "cmr10"} <= names
    assert not names & {"cmsy10", "cmex10", "LastResortHE-Regular", "STIXSizOneSymReg"}


def test_every_character_of_every_font_is_drawn_and_differs():
    fonts = matplotlib_fonts()
    atlas = glyphs._atlas(fonts, 24)
    assert (atlas.max(axis=(2, 3)) == 255).all()
    for font in atlas:
        assert len(np.unique(font.reshape(len(font), -1), axis=0)) > 40


def test_more_fonts_give_other_images(tmp_path):
    font = next(path for path in matplotlib_fonts() if path.stem == "cmr10")
    (tmp_path / "mine.ttf").write_bytes(font.read_bytes())
    plain, more = (GlyphImages(34, "test", fonts=fonts) for fonts in ((), [tmp_path / "mine.ttf"]))
    assert plain.identity() != more.identity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 10}, "10 images are too few for 34 classes"),
        ({"size": 4}, "the image size is 4"),
        ({"channels": 2}, "channels is 2, expected 1 or 3"),
        ({"difficulty": 5}, "difficulty is 5, expected 0 to 3"),
        ({"fonts": ["none.ttf"]}, "the font 'none.ttf' does not exist"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        GlyphImages(options.pop("count", 34), "train", **options)


def test_a_font_that_does_not_fit_is_named(tmp_path):
    (tmp_path / "text.ttf").write_text("no font")
    with pytest.raises(ValueError, match=r"'.*text\.ttf' is not a font"):
        GlyphImages(34, "train", fonts=[tmp_path / "text.ttf"])
    symbols = next(matplotlib_fonts()[0].parent.glob("STIXSizOneSymReg.ttf"))
    with pytest.raises(ValueError, match=r"STIXSizOneSymReg\.ttf' has no '0'"):
        GlyphImages(34, "train", fonts=[symbols])
