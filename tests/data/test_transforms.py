"""What happens to images between file and network."""

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.transforms import v2

from limpq_ext.data.transforms import evaluation_transform, training_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)


def test_evaluation_is_what_the_field_does_for_imagenet(image):
    ours = evaluation_transform(224, MEAN, STD, resize=True, crop_share=0.875)(image)
    steps = [v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True)]
    assert torch.equal(ours, v2.Compose([*steps, v2.Normalize(MEAN, STD)])(image))


def test_images_that_have_the_size_are_normalised_and_nothing_else(image):
    ours = evaluation_transform(300, MEAN, STD, resize=False)(image)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close(ours, (image / 255 - mean) / std)


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip", "resized_crop_flip"])
def test_training_images_have_the_size_and_depend_on_the_seed_alone(image, augment):
    transform = training_transform(augment, 32, MEAN, STD, resize=True)
    draws = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        draws.append(transform(image))
    assert all(draw.shape == (3, 32, 32) for draw in draws)
    assert torch.equal(draws[0], draws[1])
    assert (len(torch.stack(draws).unique(dim=0)) == 1) == (augment == "none")


def test_a_crop_moves_by_an_eighth_at_most_and_does_not_mirror():
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[:, 8, 3] = 255
    transform = training_transform("crop", 16, (0.0,), (1.0,), resize=False)
    torch.manual_seed(0)
    places = {
        tuple(place) for _ in range(200) for place in transform(image).nonzero()[:, 1:].tolist()
    }
    assert places == {(y, x) for y in range(6, 11) for x in range(1, 6)}
