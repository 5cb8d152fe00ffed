"""Loading data: digits, image folders, CIFAR in its real file format, and what bad input gets."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from convsurgery.adapt import DataSplit, input_spec, list_datasets, load_data
from convsurgery.errors import DataError


def write_images(folder: Path, classes: dict[str, tuple[int, int, int]], count: int) -> None:
    """One flat colour per class, so that a loaded image tells its class."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 10), colour).save(folder / name / f"{index}.png")


COLOURS = {"ant": (250, 0, 0), "bee": (0, 250, 0), "cat": (0, 0, 250)}


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "train", COLOURS, 4)
    write_images(tmp_path / "val", COLOURS, 2)
    return tmp_path


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, per_file: int = 4) -> np.ndarray:
    """The five training files, the test file and the names, as torchvision unpacks them.

    torchvision compares each file's md5 with the published one; only these sums are replaced, by those of the files
    written here, so that everything else of its reader runs.
    """
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sums, test_data = {}, None
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (per_file, 3072), dtype=np.uint8)
        test_data = data
        entry = {"data": data, "labels": [i % 10 for i in range(per_file)], "filenames": ["x.png"] * per_file}
        content = pickle.dumps(entry)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(content)
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": hashlib.md5(content).hexdigest()})
    return test_data


class TestDigits:
    def test_split_is_stratified_disjoint_and_whole(self) -> None:
        data = load_data("digits", img_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
        train, val = (
            torch.stack([loader.dataset[i][0] for i in range(len(loader.dataset))]) for loader in (data.train, data.val)
        )
        assert (len(train), len(val), data.num_classes) == (1347, 450, 10)
        from sklearn.datasets import load_digits

        # As multisets of images the two parts are the whole: nothing lost, nothing in both.
        whole = sorted(map(bytes, load_digits().images.astype("uint8")))
        assert sorted(map(bytes, (torch.cat([train, val])[:, 0] * 16).to(torch.uint8).numpy())) == whole
        counts = torch.bincount(data.val.dataset.targets)
        assert counts.min() >= 43
        assert counts.max() <= 46

    def test_split_does_not_depend_on_the_seed(self) -> None:
        one, two = (load_data("digits", img_size=8, seed=seed).val.dataset.images for seed in (1, 2))
        assert torch.equal(one, two)

    def test_pixels_and_normalisation(self) -> None:
        from sklearn.datasets import load_digits

        data = load_data("digits", input_size=(2, 8, 8), mean=(0.5, 0.25), std=(0.5, 2.0))
        image, label = data.val.dataset[0]
        raw = (image[0] * 0.5 + 0.5) * 16
        digits = load_digits()
        place = next(i for i, pixels in enumerate(digits.images) if np.allclose(pixels, raw))
        assert digits.target[place] == label
        assert torch.allclose(image[1] * 2.0 + 0.25, raw / 16)

    def test_size_and_channels_come_from_the_model(self) -> None:
        model = timm.create_model("resnet10t", in_chans=1, num_classes=10)
        images, labels = next(iter(load_data("digits", model=model, batch_size=3).train))
        assert images.shape == (3, 1, 176, 176)
        assert labels.dtype == torch.int64
        # One channel: the mean of ImageNet's three.
        assert input_spec(model).mean == pytest.approx([0.449], abs=1e-3)

    def test_val_is_the_same_each_time_and_train_follows_the_seed(self) -> None:
        first, again, other = (load_data("digits", img_size=8, batch_size=64, seed=seed) for seed in (3, 3, 4))
        order = [torch.cat([labels for _, labels in data.train]) for data in (first, again, other)]
        assert torch.equal(order[0], order[1])
        assert not torch.equal(order[0], order[2])
        kept = [torch.cat([labels for _, labels in data.val]) for data in (first, first, other)]
        assert torch.equal(kept[0], kept[1])
        assert torch.equal(kept[0], kept[2])

    def test_missing_sklearn_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(DataError, match=r"pip install 'convsurgery\[demo\]'"):
            load_data("digits")


class TestFolder:
    @pytest.mark.parametrize("name", ["val", "validation"])
    def test_labels_follow_the_colours(self, image_folder: Path, name: str) -> None:
        (image_folder / "val").rename(image_folder / name)
        data = load_data(image_folder, img_size=8, mean=(0.0,) * 3, std=(1.0,) * 3, batch_size=5, augment=False)
        assert data.num_classes == 3
        for loader, samples in ((data.train, 10), (data.val, 6)):
            batches = list(loader)
            images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
            assert images.shape == (samples, 3, 8, 8)
            assert torch.equal(images.mean((2, 3)).argmax(1), labels)

    def test_class_missing_in_val_does_not_shift_the_labels(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", COLOURS, 2)
        write_images(tmp_path / "val", {"cat": COLOURS["cat"]}, 2)
        labels = next(iter(load_data(tmp_path, img_size=8).val))[1]
        assert labels.tolist() == [2, 2]

    def test_grey_model_gets_grey_images(self, image_folder: Path) -> None:
        images, _ = next(iter(load_data(str(image_folder), input_size=(1, 8, 8)).val))
        assert images.shape == (6, 1, 8, 8)

    def test_augmentation_can_be_chosen(self, image_folder: Path) -> None:
        plain = load_data(image_folder, img_size=8, augment=False).train.dataset.transform
        assert "RandomResizedCrop" not in repr(plain)
        chosen = load_data(image_folder, img_size=8, augment={"hflip": 0.0, "vflip": 0.7}).train.dataset.transform
        assert "RandomVerticalFlip(p=0.7)" in repr(chosen)
        assert "HorizontalFlip" not in repr(chosen)
        with pytest.raises(DataError, match=r"augment: .*'hflop'"):
            load_data(image_folder, augment={"hflop": 1})

    def test_root_is_the_folder_when_nothing_is_named(self, image_folder: Path) -> None:
        assert load_data(root=image_folder, img_size=8).num_classes == 3

    def test_lacking_part_says_what_was_sought_and_found(self, image_folder: Path) -> None:
        (image_folder / "val").rename(image_folder / "holdout")
        with pytest.raises(DataError, match=r"has no val/ \(looked for val/, validation/.*found holdout/, train/\)"):
            load_data(image_folder)
        (image_folder / "train").rename(image_folder / "more")
        with pytest.raises(DataError, match=r"has no train/ .*found holdout/, more/\)"):
            load_data(image_folder)

    def test_empty_stray_and_loose(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", COLOURS, 1)
        (tmp_path / "val" / "ant").mkdir(parents=True)
        with pytest.raises(DataError, match=r"no images in .*val"):
            load_data(tmp_path)
        write_images(tmp_path / "val", {"dog": (1, 1, 1)}, 1)
        with pytest.raises(DataError, match=r"val has classes .*train lacks: dog"):
            load_data(tmp_path)
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / "loose.png")
        with pytest.raises(DataError, match="images outside class folders"):
            load_data(tmp_path)

    def test_classes_must_be_the_models(self, image_folder: Path) -> None:
        model = timm.create_model("resnet10t", num_classes=10)
        with pytest.raises(DataError, match=r"has 3 classes, the model has 10; .*--num-classes 3"):
            load_data(image_folder, model=model)


class TestTorchvision:
    def test_cifar10(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = write_cifar10(tmp_path, monkeypatch)
        data = load_data(
            "torch/cifar10", root=tmp_path, img_size=32, mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0, batch_size=8
        )
        assert (len(data.train.dataset), len(data.val.dataset), data.num_classes) == (20, 4, 10)
        images, labels = next(iter(data.val))
        assert labels.tolist() == [0, 1, 2, 3]
        assert torch.equal((images * 255).round().to(torch.uint8), torch.from_numpy(raw.reshape(-1, 3, 32, 32)))

    def test_altered_file_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_cifar10(tmp_path, monkeypatch)
        with (tmp_path / "cifar-10-batches-py" / "test_batch").open("ab") as file:
            file.write(b"x")
        with pytest.raises(DataError, match=r"torch/cifar10 is not complete in .*--dataset-download"):
            load_data("torch/cifar10", root=tmp_path)

    def test_set_timm_does_not_know(self, tmp_path: Path) -> None:
        folder = tmp_path / "stl10_binary"
        with pytest.raises(DataError, match="torch/stl10 is not complete"):
            load_data("torch/stl10", root=tmp_path)
        from torchvision.datasets import STL10

        folder.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
        sums = {}
        for split in ("train", "test"):
            (folder / f"{split}_X.bin").write_bytes(pixels.tobytes())
            (folder / f"{split}_y.bin").write_bytes(bytes([1, 10, 3]))
        (folder / "class_names.txt").write_text("\n".join(map(str, range(10))))
        (folder / "unlabeled_X.bin").write_bytes(b"")
        (folder / "fold_indices.txt").write_text("")
        for path in folder.iterdir():
            sums[path.name] = hashlib.md5(path.read_bytes()).hexdigest()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("train_list", "test_list"):
                patch.setattr(STL10, name, [[file, sums[file]] for file, _ in getattr(STL10, name)])
            data = load_data("torch/stl10", root=tmp_path, img_size=96, batch_size=3)
            assert next(iter(data.val))[1].tolist() == [0, 9, 2]

    def test_unknown_name_and_missing_root(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no data set 'torch/cifar11'; did you mean 'torch/cifar10'"):
            load_data("torch/cifar11", root=tmp_path)
        with pytest.raises(DataError, match=r"root=\.\.\. \(--data-dir\)"):
            load_data("torch/cifar10")

    def test_every_listed_class_exists_with_its_splits(self) -> None:
        import inspect

        import torchvision

        from convsurgery.adapt.data import _TORCHVISION

        for kind, *_ in _TORCHVISION.values():
            assert {"root", "split", "transform"} <= set(
                inspect.signature(getattr(torchvision.datasets, kind)).parameters
            )
        assert "torch/stl10" in list_datasets()


class TestOwn:
    def test_datasets_and_loaders(self) -> None:
        dataset = TensorDataset(torch.zeros(10, 1, 2, 2), torch.arange(10))
        data = load_data((dataset, dataset), batch_size=4)
        assert [len(labels) for _, labels in data.train] == [4, 4]
        assert [labels.tolist() for _, labels in data.val] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        loader = DataLoader(dataset, batch_size=3)
        assert load_data(loader).train is loader
        assert load_data(loader).val is None
        assert load_data([loader, dataset]).train is loader
        split = DataSplit(loader, None, 10, "mine")
        assert load_data(split) is split

    def test_small_set_keeps_its_only_batch(self) -> None:
        dataset = TensorDataset(torch.zeros(3, 1), torch.arange(3))
        assert [len(labels) for _, labels in load_data((dataset, dataset), batch_size=8).train] == [3]

    def test_anything_else(self) -> None:
        with pytest.raises(DataError, match=r"data must be a name .* not int"):
            load_data(3)
        with pytest.raises(DataError, match="not Linear, Linear"):
            load_data((nn.Linear(1, 1), nn.Linear(1, 1)))
        with pytest.raises(DataError, match=r"no data set 'digit': .*did you mean 'digits'"):
            load_data("digit")
        with pytest.raises(DataError, match="no data given"):
            load_data()
        with pytest.raises(DataError, match="no argument 'imgsize'; did you mean 'img_size'"):
            load_data("digits", imgsize=8)


class TestInputSpec:
    def test_timm(self) -> None:
        model = timm.create_model("convnext_atto.d2_in1k")
        spec = input_spec(model)
        assert spec.input_size == (3, 224, 224)
        assert (spec.interpolation, spec.crop_pct) == ("bicubic", model.pretrained_cfg["crop_pct"])

    def test_torchvision(self) -> None:
        import torchvision

        spec = input_spec(torchvision.models.resnet18())
        assert (spec.input_size, spec.interpolation, spec.crop_pct) == ((3, 224, 224), "bilinear", 0.875)

    def test_first_conv_tells_the_channels(self) -> None:
        model = timm.create_model("resnet18", in_chans=5)
        del model.in_chans
        assert input_spec(model).input_size[0] == 5
        with pytest.raises(DataError, match="1 or 3 channels, the model takes 5"):
            load_data("torch/cifar10", model=model, root=".")
