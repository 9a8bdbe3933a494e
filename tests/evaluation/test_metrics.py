"""The Fréchet distance against its closed forms, and the feature spaces that it is taken in."""

import pytest
import torch

from sdekit.evaluation.inception import InceptionV3
from sdekit.evaluation.metrics import frechet_distance, inception_extractor, load_feature_extractor


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, cov, n=200, seed=0):
    """Rows whose sample mean and (unbiased) sample covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    x = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return mean + x @ torch.linalg.cholesky(cov).T


def test_gaussians_that_commute_have_the_textbook_distance():
    a = with_moments(torch.tensor([0.0, 1.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()))
    b = with_moments(torch.tensor([1.0, 1.0, 0.0]).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()), seed=1)
    assert frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 + 0 + 4), rel=1e-9)  # means, then (s_a - s_b)^2


def test_gaussians_that_do_not_commute_have_the_trace_of_the_root():
    ca, cb = (torch.cov(normal(5, 50, seed=seed)) for seed in (3, 4))
    a, b = with_moments(torch.zeros(5).double(), ca), with_moments(torch.ones(5).double(), cb, seed=1)
    # eigenvalues of C_a C_b, another way to the same trace
    root = torch.linalg.eigvals(ca @ cb).real.sqrt().sum()
    assert frechet_distance(a, b) == pytest.approx(float(5 + ca.trace() + cb.trace() - 2 * root), rel=1e-9)


def test_it_is_zero_for_equal_sets_symmetric_and_blind_to_order():
    a, b = normal(300, 6), 2 * normal(200, 6, seed=1) + 1
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) > 1


def test_fewer_samples_than_features_are_no_trouble():
    a, b = normal(20, 64), normal(30, 64, seed=1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-4)  # the root of rounding: sqrt(1e-16) per direction


def test_float32_features_far_from_zero_keep_their_digits():
    a = normal(500, 3).float() + 1000
    assert frechet_distance(a, a + 1) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(5), torch.zeros(5, 2), "features_a"),
        (torch.zeros(5, 2), torch.zeros(1, 2), "features_b"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "same width"),
        (torch.full((5, 2), float("nan")), torch.zeros(5, 2), "non-finite"),
    ],
)
def test_bad_features_are_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_the_digits_features_tell_digits_from_noise_and_from_blur():
    digits = pytest.importorskip("sdekit.training.digits")
    pytest.importorskip("sklearn")
    images, _ = digits.load_digits()
    extract = load_feature_extractor("digits")
    features = extract(images)
    assert features.shape == (1797, 48)
    assert not features.requires_grad
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    floor = frechet_distance(features[order[:898]], features[order[898:]])
    noise = torch.randn(900, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    assert floor < 1
    assert frechet_distance(extract(blurred), features) > 5 * floor
    assert frechet_distance(extract(noise), features) > 20 * floor


def test_an_unknown_extractor_is_named_with_the_near_ones():
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        load_feature_extractor("digit")


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of pytorch-fid's form with random weights; batch norms that are not the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        network = InceptionV3()
    weights = network.state_dict()
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if name.endswith(("bn.bias", "running_mean")):
            weight.normal_(0, 0.1, generator=generator)
        elif name.endswith("conv.weight"):  # a variance that 94 layers keep, or every image looks alike
            weight.normal_(0, (2 / weight[0].numel()) ** 0.5, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: w for name, w in weights.items() if not name.endswith("num_batches_tracked")}, path)
    return path


def test_inception_is_the_published_network():
    with torch.device("meta"):
        network = InceptionV3()
    # torchvision's inception_v3 without its auxiliary head has 23,834,568 weights for 1000 classes; here are 8 more.
    assert sum(weight.numel() for weight in network.parameters()) == 23_834_568 + 8 * 2049
    names = network.state_dict().keys()
    assert len({name.rsplit(".", 2)[0] for name in names if name.endswith("conv.weight")}) == 94
    for name in ("Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_2.bn.running_var", "Mixed_6a.branch3x3.conv.weight",
                 "Mixed_6e.branch7x7dbl_5.conv.weight", "Mixed_7a.branch7x7x3_4.bn.weight",
                 "Mixed_7c.branch3x3dbl_3b.conv.weight", "Mixed_7c.branch_pool.conv.weight", "fc.weight"):  # fmt: skip
        assert name in names


def test_inception_features_are_batch_independent_and_leave_the_global_rng(inception_weights):
    before = torch.random.get_rng_state()
    extract = inception_extractor(inception_weights)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = extract(images)
    assert features.shape == (2, 2048)
    assert torch.isfinite(features).all()
    assert torch.allclose(features[1:], extract(images[1:]), rtol=1e-3, atol=1e-5)
    assert (features[0] - features[1]).norm() > 0.01 * features[0].norm()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_inception_pools_as_the_fid_does():
    with torch.device("meta"):
        network = InceptionV3()
    ones = torch.ones(1, 1, 4, 4)
    for block in (network.Mixed_5b, network.Mixed_6b, network.Mixed_7b):
        assert torch.equal(block.pool(ones), ones)  # padding that counts would darken the border
    peak = torch.zeros(1, 1, 5, 5)
    peak[..., 2, 2] = 1
    assert network.Mixed_7c.pool(peak).sum() == 9  # a maximum spreads the peak over 3 x 3


@pytest.mark.parametrize("content", [b"", b"no weights", None, {"conv.weight": torch.ones(1)}, [1, 2]])
def test_files_that_are_not_inception_are_refused(tmp_path, content):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="not pytorch-fid's InceptionV3"):
        inception_extractor(path)


def test_missing_inception_weights_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="2015-12-05"):
        inception_extractor(tmp_path / "none.pth")
