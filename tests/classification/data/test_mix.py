"""Mixup and CutMix of batches."""

import pytest
import torch

from resnet_backbone.classification.data.batch import DataError
from resnet_backbone.classification.data.mix import BatchMixer


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 4, 0])


def test_a_mix_is_a_function_of_seed_and_iteration(batch):
    mixer = BatchMixer(5)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    images, labels = mixer(*batch, 7)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(4)
    again, _ = BatchMixer(5)(*batch, 7)
    assert torch.equal(images, again)
    assert not torch.equal(images, mixer(*batch, 8)[0])
    assert not torch.equal(images, BatchMixer(5, seed=1)(*batch, 7)[0])
    assert labels.shape == (6, 5) and images.shape == batch[0].shape


def test_labels_follow_the_images_of_mixup(batch):
    images, labels = batch
    mixed, soft = BatchMixer(5, mixup=1.0, cutmix=0)(images, labels, 0)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    share = soft[1, 1]  # image 1 is mixed with image 0
    assert 0 < share < 1 and torch.isclose(soft[1, 0], 1 - share)
    torch.testing.assert_close(mixed[1], share * images[1] + (1 - share) * images[0])


def test_labels_follow_the_area_of_cutmix(batch):
    images, labels = batch
    for iteration in range(5):
        mixed, soft = BatchMixer(5, mixup=0, cutmix=1.0)(images, labels, iteration)
        kept = (mixed[2] == images[2]).all(0).float().mean()
        pasted = (mixed[2] == images[1]).all(0).float().mean()
        assert kept + pasted == 1
        assert torch.isclose(soft[2, 2], kept, atol=1e-6)


def test_both_are_used(batch):
    mixer, pasted = BatchMixer(5), []
    for iteration in range(20):
        mixed, _ = mixer(*batch, iteration)
        pasted.append(bool(((mixed == batch[0]) | (mixed == batch[0].roll(1, 0))).all()))
    assert 3 < sum(pasted) < 17


def test_a_batch_of_one_is_not_mixed():
    images, labels = torch.randn(1, 3, 8, 8), torch.tensor([2])
    mixed, soft = BatchMixer(5)(images, labels, 0)
    assert torch.equal(mixed, images) and soft.tolist() == [[0, 0, 1, 0, 0]]


@pytest.mark.parametrize("options", [{"mixup": 0, "cutmix": 0}, {"mixup": -1}])
def test_nothing_to_mix_is_refused(options):
    with pytest.raises(DataError, match="alphas"):
        BatchMixer(5, **options)
